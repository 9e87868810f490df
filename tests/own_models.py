# SPDX-License-Identifier: Apache-2.0
"""The models that this package brings, through transformers: what vLLM's answers must equal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from tests.engines import Ask
from vllm_acckv.config import from_mapping
from vllm_acckv.evaluation import media as decoding
from vllm_acckv.hf import kv_policy
from vllm_acckv.models import register_with_transformers
from vllm_acckv.models.processing import AUDIO_TAG, VIDEO_TAG
from vllm_acckv.models.sound import clip_sound

if TYPE_CHECKING:
    from tests.conftest import Media
    from tests.engines import Trace

BLOCK_SIZE = 32


def layouts(media: Media) -> dict[str, Ask]:
    """Requests by what they consist of."""
    mute, clip = media.video(sound=False), media.video()
    return {
        "clip with sound": media.ask(clip),
        "clip without sound": media.ask(mute),
        "clip and recording": media.separate(),
        "recording": media.ask(media.audio()),
        "two clips": media.ask(clip, media.video(seconds=3, seed=1)),
        "two clips, one mute": media.ask(mute, media.video(seconds=3, seed=1)),
        "short clip": media.ask(media.video(seconds=1, seed=2)),
    }


class OwnModel:
    """Processor and model of a checkpoint, fp32."""

    def __init__(self, checkpoint: Path) -> None:
        register_with_transformers()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._prepared: dict[str, Any] = {}

    def prepare(self, ask: Ask) -> dict[str, Any]:
        """Inputs of the model for a request, whose files are decoded by PyAV (vLLM has OpenCV)."""
        key = repr(ask.messages)
        if key not in self._prepared:
            (message,) = ask.messages
            parts = [part for part in message["content"] if part["type"] != "text"]
            videos = [path_of(part) for part in parts if part["type"] == "video_url"]
            audio = [path_of(part) for part in parts if part["type"] == "audio_url"]
            text = self.processor.apply_chat_template(
                ask.messages, add_generation_prompt=True, tokenize=False
            )
            rate = self.processor.sampling_rate
            own = [clip_sound(path, rate) if not audio else None for path in videos]
            of_clips = any(sound is not None for sound in own)
            sounds = [decoding.sound(path, rate) for path in audio]
            if of_clips:  # a tag behind each clip that has sound
                head, *rest = text.split(VIDEO_TAG)
                tags = [VIDEO_TAG + AUDIO_TAG * (sound is not None) for sound in own]
                text = head + "".join(tag + part for tag, part in zip(tags, rest, strict=True))
                sounds = [sound for sound in own if sound is not None]
            tensors = self.processor.audio_to_tensors(sounds, of_video=of_clips) if sounds else {}
            inputs = self.processor(text=None, videos=[decoding.frames(path)[0] for path in videos])
            ids = self.processor.expand(self.processor.tokenizer(text)["input_ids"])
            self._prepared[key] = {"input_ids": torch.tensor([ids]), **inputs, **tensors}
        return self._prepared[key]

    @torch.inference_mode()
    def run_policy(
        self, ask: Ask, settings: dict[str, Any], forced: list[int]
    ) -> tuple[list[int], np.ndarray, list[list[list[int]]]]:
        """As :meth:`tests.conftest.Reference.run_policy`."""
        inputs, rows = self.prepare(ask), []
        length = inputs["input_ids"].shape[1]
        with kv_policy(self.model, from_mapping(settings), block_size=BLOCK_SIZE) as run:
            out = self.model(**inputs, use_cache=True)
            for step, token in enumerate(forced):
                rows.append(out.logits[0, -1].log_softmax(-1))
                out = self.model(
                    input_ids=torch.tensor([[token]]),
                    position_ids=torch.tensor([[length + step]]),
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
        heads = self.model.config.num_key_value_heads
        kept = [
            [
                sorted(one for one in head if one >= 0)
                for head in layer.positions.expand(heads, -1).tolist()
            ]
            for layer in run.layers
        ]
        return inputs["input_ids"][0].tolist(), torch.stack(rows).numpy(), kept


def path_of(part: dict[str, Any]) -> Path:
    """File of a part of a chat message."""
    return Path(unquote(urlparse(part[part["type"]]["url"]).path))


def with_policy(ask: Ask, policy: str, **options: Any) -> Ask:
    return Ask(ask.messages, xargs={"kv_policy": policy, "kv_policy_config": options})


def assert_like_transformers(
    trace: Trace, asks: list[Ask], own: OwnModel, *, first_heads: bool = False
) -> None:
    """Prompt, tokens, log-probabilities and kept entries of every request.

    Args:
        first_heads: what was kept is known of rank 0's heads only.
    """
    from tests.conftest import difference  # not for gpu_check.py, which does without pytest

    for number, (ask, answer) in enumerate(zip(asks, trace.answers, strict=True)):
        settings = {"policy": ask.xargs["kv_policy"], **ask.xargs["kv_policy_config"]}
        prompt, logprobs, layers = own.run_policy(ask, settings, answer.tokens)
        assert answer.prompt == prompt
        assert difference(answer, logprobs) < 1e-3, settings
        assert answer.tokens == logprobs.argmax(-1).tolist(), settings
        for name, layer in trace.kept.get(f"r{number}", {}).items():
            expected = layers[int(name.split(".")[-3])]
            heads = len(layer["tokens"]) if first_heads else len(expected)
            assert layer["tokens"] == expected[:heads], (settings, name)
