# SPDX-License-Identifier: Apache-2.0
"""Answers through transformers, without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation import media
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.hf import Run, kv_policy
from vllm_acckv.models.sound import clip_sound

_FPS = 2.0
"""Pictures a second that a model sees, as Qwen2.5-Omni's own examples have it."""
_CLIPS = 1
"""Decoded clips that are kept, whole: neighbouring questions are often about the same one."""


class InHF:
    """A model of transformers that answers under the policy of each arm."""

    def __init__(self, model: str, max_tokens: int, block_size: int | None = None) -> None:
        """
        Args:
            model: folder or name of a checkpoint that ``AutoModelForMultimodalLM`` knows.
            max_tokens: of an answer.
            block_size: fill up to whole blocks, as vLLM does; by default budgets are exact.

        Raises:
            KVPolicyError: for a checkpoint that cannot be loaded.
        """
        from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

        from vllm_acckv.models import register_with_transformers
        from vllm_acckv.models.processing import TaggedProcessor

        register_with_transformers()
        try:
            config = AutoConfig.from_pretrained(model)
            # Of models that speak, the part that understands and writes.
            config = getattr(config, "thinker_config", config)
            loaded = AutoModelForMultimodalLM.from_pretrained(
                model, config=config, dtype="auto", key_mapping={r"^thinker\.": ""}
            )
            self.processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            first = str(error).partition("\n")[0]
            raise KVPolicyError(f"{model} cannot be loaded by transformers: {first}") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = loaded.to(device).eval()
        self.hears_clips = isinstance(self.processor, TaggedProcessor)
        self.max_tokens, self.block_size = max_tokens, block_size
        self.ends = _ends(self.model)
        self._clip = lru_cache(_CLIPS)(self._read)

    def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
        """In the order of ``samples``.

        Raises:
            DatasetError: for a clip that cannot be read.
        """
        policy = arm.made()
        for sample in samples:
            inputs = self.prepare(sample)
            draft = self.processor.tokenizer.encode(sample.answers[0], add_special_tokens=False)
            with kv_policy(self.model, policy, block_size=self.block_size) as run:
                said = self.generate(inputs, [*draft, self.ends[0]])
            text = self.processor.tokenizer.decode(said, skip_special_tokens=True)
            yield _answer(arm, sample, text, inputs["input_ids"].shape[1], run)

    def prepare(self, sample: Sample) -> dict[str, Any]:
        """Inputs of the model: ids ``[1, P]``, pictures and sound."""
        pictures, metadata, sound = self._clip(sample.video, sample.audio)
        # Some models look at the sound of a clip in another way than at a recording.
        of_clip = sound is not None and sample.audio is None and self.hears_clips
        content = [
            *([] if pictures is None else [{"type": "video"}]),
            *([] if sound is None or of_clip else [{"type": "audio"}]),
            {"type": "text", "text": sample.question},
        ]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        given: dict[str, Any] = {"text": text, "return_tensors": "pt"}
        if pictures is not None:
            given |= {"videos": [pictures], "video_metadata": [metadata]}
            given |= {"do_sample_frames": True, "fps": _FPS}
        if sound is not None:
            given["audio"] = [sound]
        if of_clip:
            given["use_audio_in_video"] = True
        inputs = self.processor(**given).to(self.model.device)
        if self.hears_clips:  # parts of these models differ in precision, and cast themselves
            return dict(inputs)
        cast = self.model.dtype
        return {
            name: value.to(cast) if value.is_floating_point() and value.dim() > 1 else value
            for name, value in inputs.items()
        }

    def _read(self, video: Path | None, audio: Path | None) -> tuple[Any, Any, Any]:
        """Pictures ``[n, 3, height, width]`` with what there is to know of them, and samples."""
        from transformers.video_utils import VideoMetadata

        pictures = metadata = sound = None
        if video is not None:
            shown, fps = media.frames(video)
            metadata = VideoMetadata(len(shown), fps, duration=len(shown) / fps)
            pictures = torch.from_numpy(shown).movedim(-1, 1)
        source = audio or video
        if source is not None:
            hears = self.processor if self.hears_clips else self.processor.feature_extractor
            if audio is None and self.hears_clips:
                sound = clip_sound(source, hears.sampling_rate)
            else:
                sound = media.sound(source, hears.sampling_rate)
        return pictures, metadata, sound if sound is not None and len(sound) else None

    @torch.inference_mode()
    def generate(self, inputs: dict[str, Any], draft: Sequence[int]) -> list[int]:
        """Greedy tokens, up to an end or ``max_tokens``.

        As in speculative decoding, several tokens of ``draft`` are checked at once, and only those
        that the model would have chosen itself stay. Where they differ, the model's token stands
        and the draft goes on behind it: answers that are wrong in one word cost little.
        """
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        length = inputs["input_ids"].shape[1]
        offset = length + int(getattr(self.model, "rope_deltas", None) or 0)
        said = [int(out.logits[0, -1].argmax())]
        at_once = self._can_forget(cache)
        while said[-1] not in self.ends and len(said) < self.max_tokens:
            # The cache holds all that was said but the last.
            guess = list(draft[len(said) : self.max_tokens - 1]) if at_once else []
            given = torch.tensor([[said[-1], *guess]], device=self.model.device)
            first = offset + len(said) - 1
            places = torch.arange(first, first + given.shape[1], device=given.device)[None]
            out = self.model(
                input_ids=given, past_key_values=cache, position_ids=places, use_cache=True
            )
            chosen = out.logits[0].argmax(-1).tolist()
            right = next((i for i, one in enumerate(guess) if chosen[i] != one), len(guess))
            said += chosen[: right + 1]
            end = next((i for i, token in enumerate(said) if token in self.ends), None)
            if end is not None:
                return said[:end]
            if right < len(guess):
                cache.crop(right - len(guess))
        return said[: self.max_tokens]

    @staticmethod
    def _can_forget(cache: Any) -> bool:
        """Whether tokens that were tried can be taken back; not where they evicted others."""
        return all(getattr(layer, "eviction", None) is None for layer in cache.layers)


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends)


def _answer(arm: Arm, sample: Sample, text: str, tokens: int, run: Run) -> Answer:
    entries = fmean(layer.length for layer in run.layers) if run.layers else float(tokens)
    filtered = sum(one.filtered or 0 for one in run.stats)
    rejected = sum(one.rejected for one in run.stats)
    weights = [one.video_weight for one in run.stats if one.video_weight is not None]
    return Answer(
        sample.id,
        arm.name,
        text,
        entries,
        tokens,
        rejected / filtered if filtered else None,
        tuple(weights) if len(weights) == len(run.stats) else (),
    )
