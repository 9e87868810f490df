# SPDX-License-Identifier: Apache-2.0
"""Which modality every prompt token has, for the models with sound and pictures that vLLM serves.

Most other tests are about Qwen2.5-Omni. The truth here comes from the tokens of the expanded
prompt, never from vLLM's features; how many there are of a modality, from the length of the clips.
Where a KV policy runs, the scheduler's and the worker's plans of an engine are looked at; where
none does, the plan of what vLLM hands its scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.conftest import Media
from tests.engines import Ask
from tests.native_models import checkpoints
from tests.native_models.serving import FrontEnd, Seen, count_frames, see_in_engine
from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.policies import make_policy
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

Truth = Callable[[list[str]], list[int]]


def by_token(video: str, audio: str) -> Truth:
    """Each modality has a token of its own."""
    codes = {video: VIDEO, audio: AUDIO}
    return lambda tokens: [codes.get(token, TEXT) for token in tokens]


def by_bracket(pad: str, video: str, audio: str) -> Truth:
    """``pad`` stands for both; what opened the bracket around it tells."""
    opens = {video: VIDEO, audio: AUDIO}

    def truth(tokens: list[str]) -> list[int]:
        inside, codes = TEXT, []
        for token in tokens:
            inside = opens.get(token, inside)
            codes.append(inside if token == pad else TEXT)
        return codes

    return truth


@dataclass(frozen=True)
class Model:
    """What is known of a model without asking vLLM.

    Attributes:
        video, audio: tokens of 4 seconds of pictures and of 6 seconds of sound.
        refused: architecture that a KV policy refuses; None if an engine can run one.
    """

    build: Callable[[Path], None]
    truth: Truth
    video: int
    audio: int
    refused: str | None = None


QWEN = by_token(video="<|video_pad|>", audio="<|audio_pad|>")
GEMMA = by_token(video="<|video|>", audio="<|audio|>")
MINICPM = by_bracket("<unk>", video="<image>", audio="<|audio_start|>")
FRAMES = 32  # all of the clip; Qwen3-Omni takes 2 per second, and 2 for a token
MODELS = {
    "qwen3_omni": Model(checkpoints.qwen3_omni, QWEN, 4 * 12, 6 * 13),
    "minicpm_o": Model(checkpoints.minicpm_o, MINICPM, FRAMES * 4, 6 * 25),
    "mimo_v2": Model(
        checkpoints.mimo_v2, QWEN, FRAMES // 2 * 12, 6 * 25 // 4 + 1, "MiMoV2OmniForCausalLM"
    ),
    "gemma4": Model(
        checkpoints.gemma4, GEMMA, FRAMES * 63, 6 * 25, "Gemma4ForConditionalGeneration"
    ),
    "gemma4_unified": Model(
        checkpoints.gemma4_unified,
        GEMMA,
        FRAMES * 63,
        6 * 25,
        "Gemma4UnifiedForConditionalGeneration",
    ),
}
COMPRESSED = [name for name, model in MODELS.items() if model.refused is None]
REFUSED = [name for name in MODELS if name not in COMPRESSED]
# ``v`` for a video, ``a`` for a recording, ``t`` for text between them.
LAYOUTS = {"video": "v", "audio": "a", "both": "va", "sound first": "av", "two clips": "vatav"}
# Seconds of the clips -> Qwen3-Omni's tokens of their sound, which AAC makes a little longer.
SOUNDTRACK = {4: 53, 3: 40}


def question(media: Media, parts: str) -> Ask:
    made = {
        "v": lambda seed: media.video(seed=seed, sound=False),
        "a": lambda seed: media.audio(seconds=6, seed=seed),
        "t": lambda _: {"type": "text", "text": "and then"},
    }
    return media.ask(*(made[part](seed) for seed, part in enumerate(parts)), max_tokens=3)


class Zoo:
    """Checkpoints, and vLLM on each of them, made when first asked for."""

    def __init__(self, folder: Path, media: Media) -> None:
        self.folder, self.media = folder, media
        self.front_end = cache(lambda name: FrontEnd(self.checkpoint(name)))
        self.in_engine = cache(self._in_engine)

    def checkpoint(self, name: str) -> Path:
        directory = self.folder / name
        if not directory.exists():
            directory.mkdir()
            MODELS[name].build(directory)
        return directory

    def truth(self, name: str, prompt: list[int]) -> list[int]:
        tokenizer = Tokenizer.from_file(str(self.checkpoint(name) / "tokenizer.json"))
        return MODELS[name].truth([tokenizer.id_to_token(token) for token in prompt])

    def see(self, name: str, layout: str) -> Seen:
        if name in COMPRESSED:
            return self.in_engine(name)[layout]
        return self.front_end(name).see(question(self.media, LAYOUTS[layout]))

    def _in_engine(self, name: str) -> dict[str, Seen]:
        """All layouts, for engines are slow to start."""
        asks = {layout: question(self.media, parts) for layout, parts in LAYOUTS.items()}
        if name == "qwen3_omni":
            asks["audio in video"] = self.media.interleaved(max_tokens=3)
            asks["audio in two videos"] = self.media.two_interleaved(max_tokens=3)
        seen = see_in_engine(self.checkpoint(name), list(asks.values()))
        return dict(zip(asks, seen, strict=True))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, media: Media) -> Iterator[Zoo]:
    from vllm.multimodal import audio
    from vllm.transformers_utils.processors import mimo_v2_omni

    # MiMo's sound takes torchaudio, which has no CPU build here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "resample_audio_torchaudio", audio.resample_audio_scipy)
        patch.setattr(mimo_v2_omni, "_MelSpectrogram", count_frames)
        yield Zoo(tmp_path_factory.mktemp("native"), media)


def counts(modalities: list[int]) -> list[int]:
    """Of video and audio."""
    return np.bincount(modalities, minlength=3)[1:].tolist()


def turns(modalities: list[int]) -> list[tuple[int, int]]:
    """Code and length of the runs of video and of audio, markers and timestamps left out."""
    return [(code, len(list(same))) for code, same in groupby(modalities) if code != TEXT]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_modality_of_every_token(zoo: Zoo, name: str, layout: str) -> None:
    seen, model = zoo.see(name, layout), MODELS[name]
    truth = zoo.truth(name, seen.prompt)
    assert seen.modalities == [truth] * (2 if name in COMPRESSED else 1)
    parts = LAYOUTS[layout]
    assert counts(truth) == [model.video * parts.count("v"), model.audio * parts.count("a")]


@pytest.mark.parametrize(
    ("layout", "seconds"), [("audio in video", [4]), ("audio in two videos", [4, 3])]
)
def test_qwen3_omni_audio_in_video(zoo: Zoo, layout: str, seconds: list[int]) -> None:
    """Pictures and sound take turns by their timestamps, pictures first."""
    seen = zoo.see("qwen3_omni", layout)
    truth = zoo.truth("qwen3_omni", seen.prompt)
    assert seen.modalities == [truth] * 2
    assert counts(truth) == [12 * sum(seconds), sum(SOUNDTRACK[length] for length in seconds)]
    # The processor counts a second per frame unless told another rate ("fps").
    assert turns(truth)[:4] == [(VIDEO, 12), (AUDIO, 2 * 13)] * 2


@pytest.mark.parametrize("name", COMPRESSED)
def test_blocks_are_freed(zoo: Zoo, name: str) -> None:
    for layout, seen in zoo.in_engine(name).items():
        assert seen.held[1] < seen.held[0], layout


@pytest.mark.parametrize("name", REFUSED)
def test_a_policy_is_refused_by_name(zoo: Zoo, name: str) -> None:
    from vllm_acckv.engine.supported import check_supported

    with pytest.raises(KVPolicyError) as refusal:
        check_supported(zoo.front_end(name).config, make_policy("acckv"))
    assert str(refusal.value) == (
        f"--kv-policy acckv does not support {MODELS[name].refused}: it uses sliding-window "
        "attention. Serve it without a KV policy."
    )


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen3_omni"])
def test_no_audio_in_video(zoo: Zoo, name: str) -> None:
    """vLLM takes the sound out of the clip, but the prompts of these have no place for it."""
    with pytest.raises(AssertionError, match=r"prompt replacement for mm_items\['audio'\]\[0\]"):
        zoo.front_end(name).request(zoo.media.interleaved())


def test_mimo_sound_inside_a_video_feature(zoo: Zoo) -> None:
    """vLLM's expansion of 4 seconds of pictures and their sound, one feature of both."""
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange
    from vllm.multimodal.parse import MultiModalDataItems
    from vllm.transformers_utils.processors.mimo_v2_omni import VideoAudioInput

    front_end = zoo.front_end("mimo_v2")
    processor = front_end.renderer.get_mm_processor()
    clip = VideoAudioInput(
        video=(torch.zeros(4, 3, 96, 128), torch.arange(4.0)),
        audio=(torch.zeros(4 * 24_000), 24_000),
    )
    processed = processor.info.get_hf_processor()(
        text="<|vision_start|><|video_pad|><|vision_end|>", video_audio=[clip], return_tensors="pt"
    )
    items = MultiModalKwargsItems.from_hf_inputs(
        processed, processor._get_mm_fields_config(processed, {})
    )
    updates = processor._get_prompt_updates(MultiModalDataItems({}), {}, items)
    (expand,) = (update for update in updates if update.modality == "video")
    content = expand.resolve(0).content
    place = PlaceholderRange(2, len(content.full), content.is_embed(content.full))
    request = SimpleNamespace(
        mm_features=[SimpleNamespace(modality="video", mm_position=place)],
        prompt_token_ids=[1, 2, *content.full, 3, 4, 5],
        num_prompt_tokens=len(content.full) + 5,
        sampling_params=None,
    )
    plan = partial(plan_request, request, make_policy("acckv"), 32, 2)
    modalities = plan(front_end.config.model_config.hf_config).layout.modalities.tolist()
    assert modalities == zoo.truth("mimo_v2", request.prompt_token_ids)
    # Two frames are 12 tokens, a second of sound 6.25.
    assert turns(modalities) == [(VIDEO, 12), (AUDIO, 12), (VIDEO, 12), (AUDIO, 13)]
    assert counts(plan(SimpleNamespace()).layout.modalities.tolist()) == [49, 0]


def test_mimo_sound_inside_a_video_feature_cannot_be_asked_for(zoo: Zoo) -> None:
    """vLLM 0.32 expands it, but takes no such item, from clients or from Python."""
    processor = zoo.front_end("mimo_v2").renderer.get_mm_processor()
    with pytest.raises(ValueError, match="video_audio"):
        processor.info.parse_mm_data({"video_audio": [(np.zeros((4, 96, 128, 3)), np.zeros(9))]})
