# SPDX-License-Identifier: Apache-2.0
"""Control: merge unimportant audio with video, or evict both (Table 2 of the AccKV paper)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.scores import Weights
from vllm_acckv.selection import Kept, Merged, Selection, ranked, select_best
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import States

# Largest number of similarities held at once (fp32, so 64 MiB).
_MAX_SIMILARITIES = 1 << 24


class CrossMerge(Policy):
    """Keep all text and, of each modality, the same share of its tokens: those that the trailing
    text attends to most, as AccKV without calibration scores them. One selection per layer.

    Attributes:
        unimportant: what becomes of the other tokens. ``evict`` drops them. ``pooled`` joins all of
            them, audio and video, in one entry: the mean of their keys and that of their values.
            ``nearest`` merges across modalities as LOOK-M's ``pivot`` does: each unimportant audio
            token x goes into the kept video token p with the most similar cached key (cosine, mean
            over KV heads), as (x + p) / 2 into a mean that includes p. Unimportant video is dropped
            then. A pair of unimportant tokens, which the paper's words suggest, would store an
            entry per pair; this way there are no more entries than with ``evict``.
        redistribution: AccKV's eq. 1 on the scores.
    """

    name: ClassVar[str] = "cross_merge"

    unimportant: Literal["evict", "pooled", "nearest"] = "pooled"
    redistribution: Literal["paper", "visible", "off"] = "paper"

    def important(self, layout: Layout) -> tuple[int, int]:
        """Video and audio tokens that stay. A ratio is rounded half up in each modality; a number
        of tokens is shared in proportion and never exceeded."""
        _, video, audio = layout.counts
        if self.budget_scope == "av" and self.budget <= 1:
            return self.tokens(video), self.tokens(audio)
        room = max(0, self.capacity(layout) - layout.text)
        if room >= layout.av:
            return video, audio
        if self.budget_scope == "total" and self.unimportant == "pooled":
            room = max(0, room - 1)
        share = (2 * room * video + layout.av) // (2 * layout.av)
        return share, room - share

    def entries(self, layout: Layout, layer: Layer) -> int:
        important = sum(self.important(layout))
        pooled = self.unimportant == "pooled" and important < layout.av
        return layout.text + important + int(pooled)

    def needs_trailing_text(self, layout: Layout) -> bool:
        return True

    def first_query(self, layout: Layout) -> int:
        return layout.text_start

    def weights(self, layout: Layout, device: torch.device | None = None) -> Weights | None:
        return AccKV(redistribution=self.redistribution).weights(layout, device)

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        scores = layer.ranks.mean(scores.mean(-2, keepdim=True))
        important = self.important(prompt.layout)
        keep = prompt.modality == TEXT
        for code, count in zip((VIDEO, AUDIO), important, strict=True):
            mine = prompt.modality == code
            rank = ranked(scores.masked_fill(~mine, -torch.inf))
            keep = keep | ((rank < count) & mine)
        size = prompt.layout.text + sum(important)
        chosen = select_best(scores, size, protected=keep)
        if self.unimportant != "pooled" or size == prompt.layout.length:
            return chosen
        sources = ~chosen.keep[..., None, :]
        key, value = states.means(sources)
        both = torch.full((1,), VIDEO | AUDIO, dtype=torch.int8, device=scores.device)
        dtype = states.dtype
        merged = Merged(key.to(dtype), value.to(dtype), sources.any(-1), sources, both)
        return replace(chosen, size=size + 1, merged=merged)

    def fold(
        self, kept: Kept, key: torch.Tensor, value: torch.Tensor, prompt: Prompt, layer: Layer
    ) -> tuple[Kept, torch.Tensor, torch.Tensor]:
        if self.unimportant == "nearest" and kept.freed_blocks and len(prompt.layout.present) == 2:
            return _fold_audio(kept, key, value, prompt, layer)
        return kept, key, value


def _fold_audio(
    kept: Kept, key: torch.Tensor, value: torch.Tensor, prompt: Prompt, layer: Layer
) -> tuple[Kept, torch.Tensor, torch.Tensor]:
    """Merge every audio token that is not kept into the nearest kept video token, if there is one.

    Args:
        kept: with one decision for all KV heads.
        key, value: ``[G, l, D]``.

    Returns:
        as :meth:`Policy.fold`.
    """
    _, num_video, num_audio = prompt.layout.counts
    stays = kept.tokens[0]
    video = _places(prompt.modality == VIDEO, num_video)
    audio = _places(prompt.modality == AUDIO, num_audio)
    both = torch.cat([key, value], -1)
    rows = both.float().nan_to_num()
    # The product over all heads' dimensions orders as the mean of the heads' cosines does.
    unit = normalize(key.float().nan_to_num(), dim=-1).movedim(0, 1).flatten(1)
    slots = torch.arange(num_video, device=key.device)[:, None]
    total = torch.zeros_like(rows[:, video])
    number = total.new_zeros(num_video, 1)
    step = max(1, _MAX_SIMILARITIES // num_video)
    for start in range(0, num_audio, step):
        part = audio[start : start + step]
        similarity = layer.ranks.mean(unit[part] @ unit[video].T)
        nearest = similarity.masked_fill(~stays[video], -torch.inf).argmax(-1)
        # A product with the assignment, not index_add, whose order of summation is free.
        assigned = ((slots == nearest) & ~stays[part] & stays[video][:, None]).float()
        total += assigned @ rows[:, part]
        number += assigned.sum(-1, keepdim=True)
    # (p + sum of (x + p) / 2) / (n + 1)
    mean = (rows[:, video] * (1 + number / 2) + total / 2) / (1 + number)
    merged = torch.where(number > 0, mean.to(both.dtype), both[:, video])
    key, value = both.index_copy(1, video, merged).split([key.shape[-1], value.shape[-1]], -1)
    pivots = (kept.tokens & (prompt.modality == VIDEO)).any(-1, keepdim=True)
    folded = ~kept.tokens & (prompt.modality == AUDIO) & pivots
    return replace(kept, folded=folded), key, value


def _places(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Positions int64 ``[count]`` of the tokens in ``mask`` bool ``[l]``, whose number the host
    knows from the layout."""
    return mask.int().argsort(descending=True, stable=True)[:count]
