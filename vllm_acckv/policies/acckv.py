# SPDX-License-Identifier: Apache-2.0
"""AccKV: adaptive focusing and cross-calibration (arXiv 2511.11106).

Equation numbers are the paper's. Where the paper is ambiguous or misprinted the choice and its
reason stand in docs/design.md; every literal behaviour stays available as an option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_acckv.config import KVPolicyConfig
from vllm_acckv.policies.base import Prompt
from vllm_acckv.policies.rotary import rotate, unrotate
from vllm_acckv.scores import Weights
from vllm_acckv.selection import Merged, Ranks, Selection
from vllm_acckv.spans import AUDIO, TEXT, VIDEO


@dataclass(frozen=True)
class _Focus:
    """Scores and priorities of a layer; ``S`` is 1 (layer mode) or G (head mode).

    Attributes:
        scores: fp32 ``[S, l]``, eq. 6.
        top: bool ``[S, l]``, the union of the sets of eq. 10.
        video_weight: fp32 ``[S]``, W_v of eq. 4.
    """

    scores: torch.Tensor
    top: torch.Tensor
    video_weight: torch.Tensor


class AccKV:
    """The policy of the paper; options as in :class:`vllm_acckv.config.KVPolicyConfig`."""

    def __init__(self, config: KVPolicyConfig) -> None:
        self.config = config
        self.needs_angles = config.calibration and (
            config.tau_mode == "absolute_pre_rope" or config.merge_space == "pre_rope"
        )

    def budget(
        self, *, video: int, audio: int, prefix_text: int, trailing_text: int
    ) -> tuple[int, int]:
        config = self.config
        total = video + audio
        text = trailing_text + (prefix_text if config.keep_prefix else 0)
        present = (video > 0) + (audio > 0)
        merged = present if config.calibration else 0
        if config.budget_scope == "av":
            keep = self._tokens(total)
        else:
            keep = max(0, self._tokens(total + prefix_text + trailing_text) - text - merged)
        keep = min(keep, total)
        # Eq. 8-9 lift a modality without a heavy hitter to one token, beyond k (erratum E1).
        entries = min(max(keep + 1, present), total) + merged if config.calibration else keep
        return keep, min(text + entries, total + prefix_text + trailing_text)

    def _tokens(self, whole: int) -> int:
        budget = self.config.budget
        return math.floor(budget * whole + 0.5) if budget <= 1 else int(budget)

    def first_query(self, text_start: int) -> int:
        return text_start

    def weights(self, length: int, text_start: int) -> Weights | None:
        """Attention redistribution, eq. 1. ``visible`` undoes the bias that the summed rows
        really have: every audio-video column is seen by all of them (erratum E2)."""
        if self.config.redistribution == "off":
            return None
        floor = text_start if self.config.redistribution == "visible" else 0

        def factor(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            return (rows + 1).float() / (length - columns.clamp(min=floor)).float()

        return factor

    def select(
        self,
        scores: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompt: Prompt,
        ranks: Ranks,
    ) -> Selection:
        modality = prompt.modality
        if self.config.head_mode == "layer":
            scores = ranks.mean(scores.mean(0, keepdim=True))
        focus = self._focus(scores, prompt)
        num_heads, length = key.shape[:2]
        keep = focus.top
        rejected = torch.zeros_like(keep)
        merged = None
        if self.config.calibration:
            merged = self._merge(focus.top, key, value, prompt)
            if _present(modality, VIDEO) and _present(modality, AUDIO):
                rejected, merged = self._calibrate(focus, key, merged, prompt, ranks)
                keep = keep & ~rejected
        text = modality == TEXT
        if not self.config.keep_prefix:
            text = text & (torch.arange(length, device=text.device) >= prompt.text_start)
        keep = keep | text
        fill_rank = _fill_rank(focus.scores, keep, rejected, modality)
        return Selection(
            keep.expand(num_heads, length),
            fill_rank.expand(num_heads, length),
            merged,
            focus.video_weight,
        )

    def _focus(self, scores: torch.Tensor, prompt: Prompt) -> _Focus:
        """Adaptive focusing (eq. 3-5) and the heavy hitters (eq. 6-10)."""
        video, audio = prompt.modality == VIDEO, prompt.modality == AUDIO
        num_video, num_audio = int(video.sum()), int(audio.sum())
        if num_video and num_audio:
            mean_video = (scores * video).sum(1) / num_video
            mean_audio = (scores * audio).sum(1) / num_audio
            weight = mean_video / (mean_video + mean_audio)
            weight = torch.where(weight.isfinite(), weight, 0.5)
            if self.config.focusing:
                scores = scores * torch.where(video, weight[:, None], 1 - weight[:, None])
        else:
            weight = torch.full_like(scores[:, 0], 1.0 if num_video else 0.0)
        av = video | audio
        order = scores.masked_fill(~av, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        top = (rank < prompt.budget) & av
        if self.config.calibration:
            for mask in (video, audio):
                # The best token of m is the one with the lowest rank among m.
                best = rank.masked_fill(~mask, scores.shape[1]).amin(1, keepdim=True)
                top = top | ((rank == best) & mask & ~(top & mask).any(1, keepdim=True))
        return _Focus(scores, top, weight)

    def _merge(
        self, top: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prompt: Prompt
    ) -> Merged:
        """One entry per modality for its tokens that are no heavy hitters (eq. 11-14)."""
        kinds = [code for code in (VIDEO, AUDIO) if _present(prompt.modality, code)]
        modality = torch.tensor(kinds, dtype=torch.int8, device=top.device)
        sources = (prompt.modality == modality[:, None]) & ~top[:, None, :]
        sources = sources.expand(key.shape[0], len(kinds), key.shape[1])
        count = sources.sum(-1, keepdim=True).clamp(min=1)
        mean = sources.float() / count
        if self.config.merge_space == "pre_rope":
            assert prompt.angles is not None
            plain = mean @ unrotate(key.float(), prompt.angles)
            merged_key = rotate(plain, mean @ prompt.angles)
        else:
            merged_key = mean @ key.float()
        return Merged(
            merged_key.to(key.dtype),
            (mean @ value.float()).to(value.dtype),
            sources.any(-1),
            sources,
            modality,
        )

    def _calibrate(
        self,
        focus: _Focus,
        key: torch.Tensor,
        merged: Merged,
        prompt: Prompt,
        ranks: Ranks,
    ) -> tuple[torch.Tensor, Merged]:
        """Filter the low-priority modality by its similarity to the other (eq. 15-18).

        Returns:
            bool ``[S, l]`` heavy hitters to drop, and the merged entries that remain.
        """
        unit, merged_unit = self._directions(key, merged, prompt)
        # The mean cosine to all anchors is the product with the mean of their directions, so
        # the matrix of eq. 15 is never formed.
        video_first = (focus.video_weight >= 0.5)[:, None]
        is_video = prompt.modality == VIDEO
        anchor = (focus.top & (is_video == video_first)).float()
        anchor_merged = (merged.valid & ((merged.modality == VIDEO) == video_first)).float()
        total = torch.einsum("gl,gld->gd", anchor.expand(len(unit), -1), unit)
        total = total + torch.einsum("gm,gmd->gd", anchor_merged, merged_unit)
        centre = total / (anchor.sum(1, keepdim=True) + anchor_merged.sum(1, keepdim=True))
        similarity = torch.einsum("gld,gd->gl", unit, centre)
        merged_similarity = torch.einsum("gmd,gd->gm", merged_unit, centre)
        if self.config.head_mode == "layer":
            similarity = ranks.mean(similarity.mean(0, keepdim=True))
            merged_similarity = ranks.mean(merged_similarity.mean(0, keepdim=True))
        low = focus.top & (is_video != video_first)
        low_merged = merged.valid & ((merged.modality == VIDEO) != video_first)
        threshold = self._threshold(similarity, low, merged_similarity, low_merged)
        valid = merged.valid & ~(low_merged & (merged_similarity < threshold))
        rejected = low & (similarity < threshold)
        return rejected, Merged(merged.key, merged.value, valid, merged.sources, merged.modality)

    def _directions(
        self, key: torch.Tensor, merged: Merged, prompt: Prompt
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit keys of tokens ``[G, l, D]`` and of merged entries ``[G, M, D]``, fp32."""
        key, merged_key = key.float(), merged.key.float()
        if self.config.tau_mode == "absolute_pre_rope":
            assert prompt.angles is not None
            key = unrotate(key, prompt.angles)
            count = merged.sources.sum(-1, keepdim=True).clamp(min=1)
            merged_key = (merged.sources.float() / count) @ key
        normalize = torch.nn.functional.normalize
        return normalize(key, dim=-1), normalize(merged_key, dim=-1)

    def _threshold(
        self,
        similarity: torch.Tensor,
        low: torch.Tensor,
        merged_similarity: torch.Tensor,
        low_merged: torch.Tensor,
    ) -> float | torch.Tensor:
        if self.config.tau_mode != "quantile":
            return self.config.tau
        rows = similarity.shape[0]
        values = torch.cat([similarity, merged_similarity.expand(rows, -1)], 1)
        considered = torch.cat([low, low_merged[:rows]], 1)
        return values.masked_fill(~considered, torch.nan).nanquantile(
            self.config.tau, dim=1, keepdim=True
        )


def _present(modality: torch.Tensor, code: int) -> bool:
    return bool((modality == code).any())


def _fill_rank(
    scores: torch.Tensor, keep: torch.Tensor, rejected: torch.Tensor, modality: torch.Tensor
) -> torch.Tensor:
    """Order of the dropped tokens: by score, those the filter rejected behind the others, then
    dropped text, the latest first. Kept tokens come last."""
    position = torch.arange(keep.shape[1], device=keep.device)
    text = modality == TEXT
    group = torch.where(keep, 3, torch.where(text, 2, rejected.long()))
    value = torch.where(text, position.to(scores.dtype), scores)
    order = value.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    return order.argsort(dim=1)
