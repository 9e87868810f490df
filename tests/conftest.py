# SPDX-License-Identifier: Apache-2.0
"""Shared checkpoints, clips, engines and the reference they are compared with."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"})
# Copies of the code that some checkpoints bring.
os.environ["HF_MODULES_CACHE"] = str(Path(__file__).parent.parent / ".pytest_cache" / "hf_modules")

import torch

from vllm_acckv import cpu_media

cpu_media.fix()

if not torch.cuda.is_available():
    # Triton decides while functions are defined, its own library's included, whether they will be
    # interpreted; so before vLLM imports it. Engines make their own choice.
    os.environ["TRITON_INTERPRET"] = "1"
    from vllm_acckv import kernels

    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    del os.environ["TRITON_INTERPRET"]

from tests.engines import RUNNER_V2, WITHOUT_PLUGIN, Answer, Ask, Engine  # noqa: E402
from vllm_acckv.tools import clips, tiny_model  # noqa: E402

BLOCK_SIZE = 32
CHUNK = 64
TEXT_ONLY = "Tell me something about colours, shapes and sounds."
QUESTION = "What happens in the clip?"
# Longer than a 64-token chunk, so that chunked prefill must split the trailing text.
LONG_QUESTION = (
    "Please describe, second by second, everything that can be seen and everything that can be "
    "heard, and say which sound belongs to which shape and which colour it has at that moment. "
    "Name the first and the last thing that happens. What is loud, what is bright, what moves?"
)


class Media:
    """Clips made on demand in one folder; contents depend on the arguments alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def video(self, seconds: int = 4, seed: int = 0, sound: bool = True) -> dict[str, Any]:
        path = self.folder / f"clip-{seconds}-{seed}-{sound}.mp4"
        if not path.exists():
            clips.make_clip(path, seconds=seconds, seed=seed, sound=sound)
        return {"type": "video_url", "video_url": {"url": path.as_uri()}}

    def audio(self, seconds: int = 3, seed: int = 0) -> dict[str, Any]:
        path = self.folder / f"sound-{seconds}-{seed}.wav"
        if not path.exists():
            clips.make_wav(path, seconds=seconds, seed=seed)
        return {"type": "audio_url", "audio_url": {"url": path.as_uri()}}

    def ask(self, *parts: dict[str, Any], question: str = QUESTION, **kwargs: Any) -> Ask:
        content = [*parts, {"type": "text", "text": question}] if question else list(parts)
        return Ask([{"role": "user", "content": content}], **kwargs)

    def separate(self, seed: int = 0, **kwargs: Any) -> Ask:
        """Video block, then audio block, then the question."""
        return self.ask(self.video(seed=seed, sound=False), self.audio(seed=seed), **kwargs)

    def long_separate(self, **kwargs: Any) -> Ask:
        """12 seconds each, so that text is a small part."""
        return self.ask(self.video(seconds=12, sound=False), self.audio(seconds=12), **kwargs)

    def interleaved(self, seed: int = 0, **kwargs: Any) -> Ask:
        """Audio inside video: two-second pieces of video and sound in turn."""
        return self.ask(self.video(seed=seed), audio_in_video=True, **kwargs)

    def two_separate(self, **kwargs: Any) -> Ask:
        return self.ask(
            self.video(seed=1, sound=False),
            self.audio(seed=1),
            {"type": "text", "text": "and then"},
            self.video(seconds=2, seed=2, sound=False),
            self.audio(seconds=2, seed=2),
            **kwargs,
        )

    def two_interleaved(self, **kwargs: Any) -> Ask:
        return self.ask(
            self.video(seed=1), self.video(seconds=3, seed=2), audio_in_video=True, **kwargs
        )

    def text(self, question: str = TEXT_ONLY, **kwargs: Any) -> Ask:
        return Ask([{"role": "user", "content": question}], **kwargs)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def start_engine(checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    """Start engines by settings; equal settings share one engine."""
    engines: dict[str, Engine] = {}

    def start(environment: dict[str, str] | None = None, **options: Any) -> Engine:
        key = repr((environment, sorted(options.items())))
        if key not in engines:
            engines[key] = Engine(checkpoint, environment, **options)
        return engines[key]

    yield start
    with ThreadPoolExecutor() as pool:  # each takes seconds, most of them waiting
        list(pool.map(Engine.close, engines.values()))


@pytest.fixture(scope="session")
def stock(start_engine: Callable[..., Engine]) -> Engine:
    """vLLM without this plugin."""
    return start_engine(WITHOUT_PLUGIN)


RUNNERS: dict[str, dict[str, str]] = {"V1": {}, "V2": RUNNER_V2}


@pytest.fixture(scope="session", params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> dict[str, str]:
    """Environment that chooses a model runner; a test with an engine runs on both."""
    return RUNNERS[request.param]


@pytest.fixture(scope="session")
def acckv(runner: dict[str, str], start_engine: Callable[..., Engine]) -> Engine:
    """Prompts in one chunk. Requests choose their own budget and tau."""
    return start_engine(runner, additional_config={"kv_policy": "acckv"})


@pytest.fixture(scope="session")
def acckv_chunked(runner: dict[str, str], start_engine: Callable[..., Engine]) -> Engine:
    """Prompts in chunks of 64 tokens."""
    return start_engine(
        runner, additional_config={"kv_policy": "acckv"}, max_num_batched_tokens=CHUNK
    )


@pytest.fixture(scope="session")
def acckv_caching(runner: dict[str, str], start_engine: Callable[..., Engine]) -> Engine:
    """With prefix caching, and what earlier tests left in it."""
    return start_engine(
        runner, additional_config={"kv_policy": "acckv"}, enable_prefix_caching=True
    )


_differences: list[float] = []


def difference(answer: Answer, logprobs: Any) -> float:
    """Largest difference of log-probability over the vocabulary and the answer's tokens."""
    _differences.append(float(np.abs(answer.logprobs - np.asarray(logprobs)).max()))
    return _differences[-1]


_stages: dict[str, float] = {}


def assert_stage(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """A stage of a model is that of an independent implementation, up to 1e-4 in fp32."""
    assert found.shape == expected.shape
    _stages[name] = float((found - expected).abs().max())
    assert _stages[name] <= 1e-4, name


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _stages:
        terminalreporter.write_line("largest difference of a stage to independent implementations:")
        for name, stage in _stages.items():
            terminalreporter.write_line(f"  {stage:.1e} {name}")
    if _differences:
        terminalreporter.write_line(
            f"largest difference of log-probability to transformers: {max(_differences):.1e} "
            f"over {len(_differences)} requests"
        )


class Reference:
    """The same requests answered by transformers with the naive AccKV, cached."""

    def __init__(self, checkpoint: Path) -> None:
        from tests.reference import hf_thinker

        self._checkpoint = checkpoint
        self._module = hf_thinker
        self._thinker = tiny_model.load_thinker(checkpoint)
        self._inputs: dict[str, Any] = {}
        self._answers: dict[str, Any] = {}

    def _prepared(self, ask: Ask) -> tuple[list[int], dict[str, Any], Any]:
        """Prompt ids, model inputs and vLLM's M-RoPE positions of a request."""
        key = repr((ask.messages, ask.audio_in_video))
        if key not in self._inputs:
            ids, inputs = self._module.prepare_inputs(
                self._checkpoint, ask.messages, ask.audio_in_video
            )
            positions = self._module.vllm_positions(self._thinker, inputs)
            self._inputs[key] = (ids, inputs, positions)
        return self._inputs[key]

    def selections_before_rope(self, ask: Ask, budget: float, **options: Any) -> list[Any]:
        """What the naive AccKV keeps when it sees keys before rotary embedding, per layer."""
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as hf

        ids, inputs, positions = self._prepared(ask)
        state = self._module.prefill(self._thinker, inputs, positions)
        modality = self.modality(ids)
        keep, _, _ = self._module.naive_plan(modality, budget, BLOCK_SIZE)
        settings = self._module.Options(k=keep, block_size=BLOCK_SIZE, **options)
        selections = []
        for layer, attention in zip(state.cache.layers, state.attentions, strict=True):
            cos, sin = self._thinker.model.rotary_emb(layer.keys, positions[:, None])
            plain, _ = hf.apply_rotary_pos_emb(layer.keys, layer.keys, cos, -sin)
            selections.append(
                self._module.naive_select(attention, plain[0], layer.values[0], modality, settings)
            )
        return selections

    def modality(self, prompt: list[int]) -> list[int]:
        """0 text, 1 video, 2 audio for every prompt token, from the token ids."""
        return self._module.modality_of(self._thinker, prompt)

    def answer(
        self, ask: Ask, budget: float, forced: list[int], hold_back: int = 0, **options: Any
    ) -> Any:
        """Prompt ids and a ``Generation`` for the request.

        Args:
            forced: tokens to follow.
            hold_back: last prompt tokens that are fed after compression, like generated ones.
        """
        key = repr((ask.messages, ask.audio_in_video))
        ids, inputs, positions = self._prepared(ask)
        if hold_back:
            forced = ids[-hold_back:] + forced
            cut = ("input_ids", "attention_mask")
            inputs = {k: v[:, :-hold_back] if k in cut else v for k, v in inputs.items()}
            positions = positions[:, :-hold_back]
        full = repr((key, budget, forced, sorted(options.items())))
        if full not in self._answers:
            scope = options.pop("scope", "av")
            settings = self._module.Options(block_size=BLOCK_SIZE, **options)
            policy = self._module.Policy(budget, settings, scope)
            self._answers[full] = self._module.generate(
                self._thinker, inputs, len(forced), policy, forced, positions
            )
        return ids, self._answers[full]

    def run_policy(
        self, ask: Ask, settings: dict[str, Any], forced: list[int]
    ) -> tuple[list[int], np.ndarray, list[list[list[int]]]]:
        """The request on transformers' model with the Hugging Face runner, blocks as in vLLM.

        Args:
            settings: the policy and its options.
            forced: tokens to follow.

        Returns:
            prompt ids, log-probabilities ``[tokens, vocabulary]``, and per layer and KV head the
            prompt positions kept.
        """
        import torch

        from vllm_acckv.config import from_mapping
        from vllm_acckv.hf import kv_policy

        ids, inputs, positions = self._prepared(ask)
        key = repr((ask.messages, ask.audio_in_video, sorted(settings.items()), forced))
        if key not in self._answers:
            policy, rows = from_mapping(settings), []
            with (
                torch.inference_mode(),
                kv_policy(self._thinker, policy, block_size=BLOCK_SIZE) as run,
            ):
                out = self._thinker(
                    **{**inputs, "position_ids": positions[:, None]}, use_cache=True
                )
                for step, token in enumerate(forced):
                    rows.append(out.logits[0, -1].float().log_softmax(-1))
                    where = torch.full((3, 1, 1), int(positions.max()) + 1 + step)
                    out = self._thinker(
                        input_ids=torch.tensor([[token]]),
                        position_ids=where,
                        past_key_values=out.past_key_values,
                        use_cache=True,
                    )
            heads = self._thinker.config.text_config.num_key_value_heads
            kept = [
                [
                    sorted(one for one in head if one >= 0)
                    for head in layer.positions.expand(heads, -1).tolist()
                ]
                for layer in run.layers
            ]
            self._answers[key] = (torch.stack(rows).numpy(), kept)
        return ids, *self._answers[key]


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)
