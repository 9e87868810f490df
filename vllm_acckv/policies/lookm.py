# SPDX-License-Identifier: Apache-2.0
"""LOOK-M: text first, and merge what is dropped into what is kept (arXiv 2406.18139)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from vllm_acckv.policies.base import Layer, Policy, Prompt, Ratio
from vllm_acckv.selection import Kept, Selection, select_best
from vllm_acckv.spans import TEXT, Layout
from vllm_acckv.states import States

# Largest number of similarities held at once (fp32, so 64 MiB).
_MAX_SIMILARITIES = 1 << 24


class LookM(Policy):
    """Keep, per KV head, all text, the latest tokens, and the audio-video tokens that all prompt
    rows attend to most; every dropped token is merged into the kept one its key is most like.

    Attributes:
        recent_ratio: share of the budget that goes to the latest tokens. The authors give heavy
            hitters and recent tokens 10 % of the prompt each.
        merge: what a pruned x adds to its nearest pivot p before the mean that includes p:
            ``pivot`` (x + p) / 2, ``average`` x, ``weighted`` x times their similarity, and only
            where that reaches the mean over the pruned tokens of the head; ``none`` adds nothing.
    """

    name: ClassVar[str] = "lookm"

    recent_ratio: Ratio = 0.5
    merge: Literal["pivot", "average", "weighted", "none"] = "pivot"

    def _recent(self, layout: Layout) -> int:
        return int(self.capacity(layout) * self.recent_ratio)

    def entries(self, layout: Layout, layer: Layer) -> int:
        recent = self._recent(layout)
        heavy = self.capacity(layout) - recent
        return max(heavy, layout.text_before(layout.length - recent)) + recent

    def first_query(self, layout: Layout) -> int:
        return 0

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        # The authors add -65516 to the columns that must not compete, which in half precision
        # rounds all other scores away; masks cannot.
        position = torch.arange(prompt.layout.length, device=scores.device)
        recent = position >= prompt.layout.length - self._recent(prompt.layout)
        text = prompt.modality == TEXT
        return select_best(scores, self.entries(prompt.layout, layer), text | recent)

    def fold(
        self, kept: Kept, key: torch.Tensor, value: torch.Tensor, prompt: Prompt, layer: Layer
    ) -> tuple[Kept, torch.Tensor, torch.Tensor]:
        if self.merge == "none" or kept.length in (0, key.shape[1]):
            return kept, key, value
        # Kept tokens first, then pruned ones, both in the order of the prompt.
        order = kept.tokens.int().argsort(dim=1, descending=True, stable=True)
        pivots, pruned = order[:, : kept.length], order[:, kept.length :]
        nearest, similarity = _nearest(_rows(key, pivots), _rows(key, pruned))
        weight = torch.ones_like(similarity)
        if self.merge == "weighted":
            reaches = similarity >= similarity.mean(1, keepdim=True)
            weight = torch.where(reaches, similarity, 0)
            folded = torch.zeros_like(kept.tokens).scatter(1, pruned, reaches)
        else:
            reaches = torch.ones_like(similarity, dtype=torch.bool)
            folded = ~kept.tokens
        key, value = (
            self._merged(states, pivots, pruned, nearest, reaches.float(), weight)
            for states in (key, value)
        )
        return replace(kept, folded=folded), key, value

    def _merged(
        self,
        states: torch.Tensor,
        pivots: torch.Tensor,
        pruned: torch.Tensor,
        nearest: torch.Tensor,
        counts: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Mean of every pivot and what was merged into it, written back to ``[G, l, D]``."""
        pivot, dropped = _rows(states, pivots), _rows(states, pruned)
        if self.merge == "pivot":
            dropped = (dropped + _rows(pivot, nearest)) / 2
        total, number = pivot, torch.ones_like(pivot[..., :1])
        slots = torch.arange(pivot.shape[1], device=pivot.device)
        step = max(1, _MAX_SIMILARITIES // (pivot.shape[0] * pivot.shape[1]))
        for part in range(0, dropped.shape[1], step):
            chunk = slice(part, part + step)
            # A product with the assignment, not scatter_add, whose order of summation is free.
            assigned = (slots[:, None] == nearest[:, None, chunk]).float()
            total = total + (assigned * weight[:, None, chunk]) @ dropped[:, chunk]
            number = number + assigned @ counts[:, chunk, None]
        return states.scatter(1, _wide(pivots, states), (total / number).to(states.dtype))


def _nearest(pivot: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every pruned key the pivot of highest cosine: its index and the cosine, ``[G, n]``."""
    pivot, pruned = normalize(pivot, dim=-1), normalize(pruned, dim=-1)
    step = max(1, _MAX_SIMILARITIES // (pivot.shape[0] * pivot.shape[1]))
    parts = [
        (pruned[:, start : start + step] @ pivot.transpose(1, 2)).max(-1)
        for start in range(0, pruned.shape[1], step)
    ]
    return torch.cat([part.indices for part in parts], 1), torch.cat(
        [part.values for part in parts], 1
    )


def _wide(rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return rows[..., None].expand(-1, -1, states.shape[-1])


def _rows(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """fp32 ``[G, n, D]`` of the given rows ``[G, n]``."""
    return states.gather(1, _wide(rows, states)).float().nan_to_num()
