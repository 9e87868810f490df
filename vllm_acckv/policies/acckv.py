# SPDX-License-Identifier: Apache-2.0
"""AccKV: adaptive focusing and cross-calibration (arXiv 2511.11106).

Equation numbers are the paper's. Where the paper is ambiguous or misprinted the choice and its
reason stand in docs/policies.md; every literal behaviour stays available as an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch.nn.functional import normalize

from vllm_acckv.policies.base import Count, Layer, Policy, Prompt, number_in
from vllm_acckv.rotary import rotate
from vllm_acckv.scores import Weights
from vllm_acckv.selection import Merged, Selection, ranked
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import States

# What ``preset`` stands for: the letter of the paper (with the one correction without which eq. 8-9
# make no sense), and the reading that undoes its errata; see docs/policies.md.
PAPER: Mapping[str, Any] = {
    "redistribution": "paper",
    "focusing": True,
    "calibration": True,
    "head_mode": "layer",
    "tau_mode": "absolute",
    "merge_space": "post_rope",
    "budget_scope": "av",
    "keep_prefix": True,
    "min_per_modality": True,
    "strict_budget": "off",
    "filter_merged": True,
    "min_keep_low": 0,
}
CORRECTED: Mapping[str, Any] = {
    **PAPER,
    "redistribution": "visible",
    "tau_mode": "absolute_pre_rope",
    "merge_space": "pre_rope",
    "budget_scope": "total",
}


def _tau(value: Any, info: pydantic.ValidationInfo) -> float:
    low = 0 if info.data.get("tau_mode") == "quantile" else -1
    return number_in(value, f"a number in [{low}, 1]", lambda number: low <= number <= 1)


@dataclass(frozen=True)
class _Focus:
    """Priorities of layers; ``S`` is 1 (layer mode) or G (head mode).

    Attributes:
        rank: int64 ``[..., S, l]``, order of the audio-video tokens by the scores of eq. 6, best
            first; all others behind them.
        top: bool ``[..., S, l]``, the union of the sets of eq. 10.
        video_weight: fp32 ``[..., S]``, W_v of eq. 4.
    """

    rank: torch.Tensor
    top: torch.Tensor
    video_weight: torch.Tensor


class AccKV(Policy):
    """The policy of the paper. Its three modules are ``redistribution`` (A-R), ``focusing``
    (A-F) and ``calibration`` (C-C); Table 6 switches them off one after the other.

    Attributes:
        tau_mode: cosine of the cached keys (``absolute``), of the keys before rotary embedding
            (``absolute_pre_rope``), or the ``quantile`` of each layer's own similarities.
        tau: similarity below which a low-priority token is dropped (eq. 17). The paper uses
            0.6 and 0.9 and names no default.
        redistribution: eq. 1 as printed (``paper``), corrected for the rows that are summed
            (``visible``), or not at all (``off``).
        focusing: weigh tokens by the attention their modality gets in the layer (eq. 3-5).
        calibration: merge inside each modality and filter by similarity (eq. 8-18).
        head_mode: one selection per ``layer``, or one per KV ``head``.
        merge_space: average keys as cached (``post_rope``), or un-rotated and rotated back to
            the mean position (``pre_rope``).
        keep_prefix: keep text in front of and between the clips (the paper's eq. 17 would drop
            it together with the attention sink).
        min_per_modality: keep the best token of a modality that has no heavy hitter (eq. 8-9).
        strict_budget: that token comes on top of the budget (``off``, as in the paper), in place
            of one of the other modality (``tokens``), and the merged entries count in the
            budget, too (``entries``).
        filter_merged: the filter may drop the merged entry as well (eq. 17).
        min_keep_low: heavy hitters of the low-priority modality that the filter never drops.
    """

    name: ClassVar[str] = "acckv"
    layers_alike: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER, "corrected": CORRECTED}

    # In front of tau, whose range depends on it.
    tau_mode: Literal["absolute", "absolute_pre_rope", "quantile"] = "absolute"
    tau: Annotated[float, pydantic.BeforeValidator(_tau)] = 0.6
    redistribution: Literal["paper", "visible", "off"] = "paper"
    focusing: bool = True
    calibration: bool = True
    head_mode: Literal["layer", "head"] = "layer"
    merge_space: Literal["post_rope", "pre_rope"] = "post_rope"
    keep_prefix: bool = True
    min_per_modality: bool = True
    strict_budget: Literal["off", "tokens", "entries"] = "off"
    filter_merged: bool = True
    min_keep_low: Count = 0

    @property
    def needs_angles(self) -> bool:
        return self.calibration and (
            self.tau_mode == "absolute_pre_rope" or self.merge_space == "pre_rope"
        )

    def heavy_hitters(self, layout: Layout) -> int:
        """k of eq. 7: audio-video tokens to select before merging."""
        if self.budget_scope == "av":
            merged = self._merged(layout) if self.strict_budget == "entries" else 0
            keep = self.tokens(layout.av)
        else:
            merged = self._merged(layout)
            keep = self.tokens(layout.length) - self._text(layout)
        if keep >= layout.av:
            return layout.av
        return max(0, keep - merged)

    def _text(self, layout: Layout) -> int:
        return layout.text if self.keep_prefix else layout.trailing_text

    def _merged(self, layout: Layout) -> int:
        return len(layout.present) if self.calibration else 0

    def entries(self, layout: Layout, layer: Layer) -> int:
        keep = self.heavy_hitters(layout)
        if keep >= layout.av:
            return layout.length
        if self.calibration and self.min_per_modality:
            # Eq. 8-9 lift a modality without a heavy hitter to one token, beyond k (erratum E1).
            # That takes two modalities, and k tokens of the other one.
            _, video, audio = layout.counts
            if self.strict_budget == "off" and video and audio and keep <= max(video, audio):
                keep += 1
            keep = max(keep, len(layout.present))
        return min(self._text(layout) + keep + self._merged(layout), layout.length)

    def keeps_all(self, layout: Layout, layer: Layer) -> bool:
        # The filter works on heavy hitters, also when all tokens are.
        filters = self.calibration and len(layout.present) == 2
        return super().keeps_all(layout, layer) and self.keep_prefix and not filters

    def needs_trailing_text(self, layout: Layout) -> bool:
        return True

    def first_query(self, layout: Layout) -> int:
        return layout.text_start

    def weights(self, layout: Layout, device: torch.device | None = None) -> Weights | None:
        """Attention redistribution, eq. 1. ``visible`` undoes the bias that the summed rows
        really have: every audio-video column is seen by all of them (erratum E2)."""
        if self.redistribution == "off":
            return None
        floor = layout.text_start if self.redistribution == "visible" else 0
        position = torch.arange(layout.length, device=device)
        seen_by = layout.length - position.clamp(min=floor)
        return Weights(rows=(position + 1).float(), columns=1 / seen_by.float())

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        if self.head_mode == "layer":
            scores = layer.ranks.mean(scores.mean(-2, keepdim=True))
        focus = self._focus(scores, prompt)
        keep = focus.top
        filtered = rejected = merged = None
        if self.calibration:
            merged, directions = self._merge(focus.top, states, prompt)
            if len(prompt.layout.present) == 2:
                filtered, rejected, merged = self._calibrate(
                    focus, states, merged, directions, prompt, layer
                )
                keep = keep & ~rejected
        text = prompt.modality == TEXT
        if not self.keep_prefix:
            position = torch.arange(len(text), device=text.device)
            text = text & (position >= prompt.layout.text_start)
        keep = keep | text
        fill_rank = _fill_rank(focus.rank, keep, rejected, prompt.modality)
        size = None
        if not self.calibration:
            size = self._text(prompt.layout) + self.heavy_hitters(prompt.layout)
        return Selection(keep, fill_rank, size, merged, focus.video_weight, filtered, rejected)

    def _focus(self, scores: torch.Tensor, prompt: Prompt) -> _Focus:
        """Adaptive focusing (eq. 3-5) and the heavy hitters (eq. 6-10)."""
        video, audio = prompt.modality == VIDEO, prompt.modality == AUDIO
        _, num_video, num_audio = prompt.layout.counts
        if num_video and num_audio:
            mean_video = (scores * video).sum(-1) / num_video
            mean_audio = (scores * audio).sum(-1) / num_audio
            weight = mean_video / (mean_video + mean_audio)
            weight = torch.where(weight.isfinite(), weight, 0.5)
            if self.focusing:
                factor = torch.where(video, weight[..., None], 1 - weight[..., None])
                scores = scores * factor
        else:
            weight = torch.full_like(scores[..., 0], 1.0 if num_video else 0.0)
        av = video | audio
        rank = ranked(scores.masked_fill(~av, -torch.inf))
        top = (rank < self.heavy_hitters(prompt.layout)) & av
        if self.calibration and self.min_per_modality:
            top = self._at_least_one(top, rank, video, audio)
        return _Focus(rank, top, weight)

    def _at_least_one(
        self, top: torch.Tensor, rank: torch.Tensor, video: torch.Tensor, audio: torch.Tensor
    ) -> torch.Tensor:
        """Lift a modality without a heavy hitter to its best token (eq. 8-9)."""
        for mask, others in ((video, top & audio), (audio, top & video)):
            # The best token of m is the one with the lowest rank among m.
            best = rank.masked_fill(~mask, rank.shape[-1]).amin(-1, keepdim=True)
            lifted = (rank == best) & mask & ~(top & mask).any(-1, keepdim=True)
            if self.strict_budget != "off":
                worst = rank.masked_fill(~others, -1).amax(-1, keepdim=True)
                gives = lifted.any(-1, keepdim=True) & (others.sum(-1, keepdim=True) > 1)
                top = top & ~(gives & (rank == worst))
            top = top | lifted
        return top

    def _merge(
        self, top: torch.Tensor, states: States, prompt: Prompt
    ) -> tuple[Merged, torch.Tensor]:
        """One entry per modality for its tokens that are no heavy hitters (eq. 11-14).

        Returns:
            the entries, and unit keys fp32 ``[..., G, M, D]`` of them in the space of
            ``tau_mode``.
        """
        kinds = prompt.layout.present
        # Made on the device: an upload would wait for it.
        modality = torch.arange(kinds[0], kinds[-1] + 1, dtype=torch.int8, device=top.device)
        sources = (prompt.modality == modality[:, None]) & ~top[..., None, :]
        merged_angles = tau_angles = None
        if self.merge_space == "pre_rope":
            merged_angles = prompt.angles
        if self.tau_mode == "absolute_pre_rope":
            tau_angles = prompt.angles
        mean_key, value = states.means(sources, merged_angles)
        key = mean_key
        if merged_angles is not None:
            share = sources.double() / sources.sum(-1, keepdim=True).clamp(min=1)
            # Radians grow with the prompt; vLLM may let products of fp32 matrices be less precise.
            key = rotate(mean_key, (share @ merged_angles.double()).float())
        key, value = key.to(states.dtype), value.to(states.dtype)
        if tau_angles is None:
            unit = normalize(key.float(), dim=-1)
        elif merged_angles is not None:
            unit = normalize(mean_key, dim=-1)
        else:
            unit = normalize(states.means(sources, tau_angles)[0], dim=-1)
        return Merged(key, value, sources.any(-1), sources, modality), unit

    def _calibrate(
        self,
        focus: _Focus,
        states: States,
        merged: Merged,
        merged_unit: torch.Tensor,
        prompt: Prompt,
        layer: Layer,
    ) -> tuple[torch.Tensor, torch.Tensor, Merged]:
        """Filter the low-priority modality by its similarity to the other (eq. 15-18).

        Returns:
            bool ``[..., S, l]`` heavy hitters that were looked at, those of them to drop, and the
            merged entries that remain.
        """
        angles = prompt.angles if self.tau_mode == "absolute_pre_rope" else None
        # The mean cosine to all anchors is the product with the mean of their directions, so
        # the matrix of eq. 15 is never formed.
        video_first = (focus.video_weight >= 0.5)[..., None]
        is_video = prompt.modality == VIDEO
        anchor = focus.top & (is_video == video_first)
        anchor_merged = merged.valid & ((merged.modality == VIDEO) == video_first)
        total = states.directions(anchor, angles)
        total = total + (anchor_merged[..., None] * merged_unit).sum(-2)
        count = anchor.sum(-1, keepdim=True) + anchor_merged.sum(-1, keepdim=True)
        centre = total / count
        low = focus.top & (is_video != video_first)
        # A cosine rounded to below -1 would fall to a tau of -1.
        similarity = states.similarities(centre, low, angles).clamp(-1, 1)
        merged_similarity = (merged_unit * centre[..., None, :]).sum(-1).clamp(-1, 1)
        if self.head_mode == "layer":
            similarity = layer.ranks.mean(similarity.mean(-2, keepdim=True))
            merged_similarity = layer.ranks.mean(merged_similarity.mean(-2, keepdim=True))
        low_merged = merged.valid & ((merged.modality == VIDEO) != video_first)
        if not self.filter_merged:
            low_merged = torch.zeros_like(low_merged)
        threshold = self._threshold(similarity, low, merged_similarity, low_merged)
        rejected = low & (similarity < threshold)
        if self.min_keep_low:
            # How many of them have a better score.
            rank = ranked(-focus.rank.masked_fill(~low, len(prompt.modality)).float())
            rejected = rejected & (rank >= self.min_keep_low)
        valid = merged.valid & ~(low_merged & (merged_similarity < threshold))
        return low, rejected, replace(merged, valid=valid)

    def _threshold(
        self,
        similarity: torch.Tensor,
        low: torch.Tensor,
        merged_similarity: torch.Tensor,
        low_merged: torch.Tensor,
    ) -> float | torch.Tensor:
        if self.tau_mode != "quantile":
            return self.tau
        values = torch.cat([similarity, merged_similarity], -1)
        considered = torch.cat([low, low_merged], -1)
        return values.masked_fill(~considered, torch.nan).nanquantile(
            self.tau, dim=-1, keepdim=True
        )


def _fill_rank(
    rank: torch.Tensor,
    keep: torch.Tensor,
    rejected: torch.Tensor | None,
    modality: torch.Tensor,
) -> torch.Tensor:
    """Order of the dropped tokens: by ``rank``, those the filter rejected behind the others, then
    dropped text, the latest first. Kept tokens come last."""
    length = keep.shape[-1]
    text = modality == TEXT
    last = 0 if rejected is None else rejected.long()
    group = torch.where(keep, 3, torch.where(text, 2, last))
    latest_first = torch.arange(length - 1, -1, -1, device=keep.device)
    order = (group * length + torch.where(text, latest_first, rank)).argsort(dim=-1)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(length, device=keep.device).expand_as(order)
    )
