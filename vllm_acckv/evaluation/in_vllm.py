# SPDX-License-Identifier: Apache-2.0
"""Answers through vLLM, in this process. One engine serves every arm by policies of requests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.samples import Sample

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_BATCH = 64
"""Questions at once; answers are written down after each batch."""


class InVLLM:
    """An engine that answers under the policy of each arm."""

    def __init__(self, model: str, media: Path, max_tokens: int, **options: Any) -> None:
        """
        Args:
            media: folder under which all clips lie.
            max_tokens: of an answer.
            options: of ``vllm.LLM``.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        if not torch.cuda.is_available():
            options = {"enforce_eager": True, "block_size": 32, **options}
        self.llm = LLM(
            model,
            allowed_local_media_path=str(media.resolve()),
            additional_config={"kv_policy": "acckv"},
            **options,
        )
        self.max_tokens = max_tokens
        self.block_size = self.llm.llm_engine.vllm_config.cache_config.block_size

    def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
        """In the order of ``samples``.

        Raises:
            KVPolicyError: for a batch that vLLM refuses.
        """
        from vllm import SamplingParams

        settings = SamplingParams(
            temperature=0, max_tokens=self.max_tokens, extra_args=arm.request()
        )
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            self.llm.collective_rpc("kv_policy_record")
            messages: Any = [conversation(sample) for sample in batch]
            try:
                outputs = self.llm.chat(messages, settings, use_tqdm=False)
            except ValueError as error:  # too long, too many clips, a policy that does not fit
                first = str(error).partition("\n")[0]
                names = f"{batch[0].id} to {batch[-1].id}"
                raise KVPolicyError(f"{arm.name}, questions {names}: {first}") from None
            found = self.llm.collective_rpc("kv_policy_take_records")[0]
            # vLLM appends random letters to the ids it gives.
            records = {name.rpartition("-")[0]: layers for name, layers in found.items()}
            for sample, output in zip(batch, outputs, strict=True):
                layers = list(records.get(output.request_id, {}).values())
                yield self._answer(arm, sample, output, layers)

    def _answer(
        self, arm: Arm, sample: Sample, output: Any, layers: list[dict[str, Any]]
    ) -> Answer:
        """``layers``: what each of them kept; none if the request was left alone."""
        tokens = len(output.prompt_token_ids)
        entries = float(tokens)
        if layers:
            entries = fmean(tokens - layer["freed_blocks"] * self.block_size for layer in layers)
        weights = [layer["video_weight"] for layer in layers if layer["video_weight"]]
        filtered = sum(layer["filtered"] for layer in layers)
        return Answer(
            sample.id,
            arm.name,
            output.outputs[0].text,
            entries,
            tokens,
            sum(layer["rejected"] for layer in layers) / filtered if filtered else None,
            tuple(map(fmean, weights)),
        )


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """The user's turn: video, sound where it is a file of its own, question."""
    content: list[dict[str, Any]] = []
    for kind, path in (("video_url", sample.video), ("audio_url", sample.audio)):
        if path is not None:
            content.append({"type": kind, kind: {"url": path.resolve().as_uri()}})
    content.append({"type": "text", "text": sample.question})
    return [{"role": "user", "content": content}]
