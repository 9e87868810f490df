# SPDX-License-Identifier: Apache-2.0
"""AccKV+: what the text looks at, but from every part of the clip.

A policy of this project, not of the paper; docs/results.md says how it was found and what it is
worth. AccKV and SnapKV keep what the text behind the clips attends to. An answer also needs what
its own later words will look for, which nobody knows yet. So a share of the budget is spent on
coverage: each modality is cut into equally long parts, and the best token of each part stays.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from vllm_acckv.policies.base import Layer, Policy, Prompt, Ratio
from vllm_acckv.selection import Selection, ranked, select_best
from vllm_acckv.spans import TEXT, Layout
from vllm_acckv.states import States


class AccKVPlus(Policy):
    """Keep all text, the best token of each part of the clip, and the best of the rest.

    Attributes:
        coverage: share of the kept audio-video tokens that are the best of their part; half of the
            parts are of each modality. 0 keeps what the text attends to and nothing else.
        head_mode: one selection per ``layer``, or one per KV ``head``.
    """

    name: ClassVar[str] = "acckv_plus"
    layers_alike: ClassVar[bool] = True

    coverage: Ratio = 1.0
    head_mode: Literal["layer", "head"] = "head"

    def kept(self, layout: Layout) -> int:
        """Audio-video tokens that stay (k)."""
        return max(0, self.capacity(layout) - layout.text)

    def entries(self, layout: Layout, layer: Layer) -> int:
        return layout.text + self.kept(layout)

    def needs_trailing_text(self, layout: Layout) -> bool:
        return True

    def first_query(self, layout: Layout) -> int:
        return layout.text_start

    def parts(self, layout: Layout) -> dict[int, int]:
        """Parts of each modality, by its code. Tokens of several clips count as one clip's."""
        present = layout.present
        total = round(self.coverage * self.kept(layout))
        shares = {code: (total + i) // len(present) for i, code in enumerate(present)}
        return {code: min(count, layout.counts[code]) for code, count in shares.items()}

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        if self.head_mode == "layer":
            scores = layer.ranks.mean(scores.mean(-2, keepdim=True))
        text = prompt.modality == TEXT
        rank = ranked(scores.masked_fill(text, -torch.inf))
        # Ranks, not scores: no two are equal, so that each part has one best token.
        order = torch.where(self._best(rank, prompt), rank - len(text), rank)
        return select_best(-order.float(), self.entries(prompt.layout, layer), protected=text)

    def _best(self, rank: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """bool like ``rank`` ``[..., S, l]``, whether a token is the best of its part."""
        part = torch.full_like(prompt.modality, 0, dtype=torch.int64)
        parts = 1  # the first takes what is in none
        for code, count in self.parts(prompt.layout).items():
            if count:
                mine = prompt.modality == code
                place = mine.cumsum(-1) - 1
                here = parts + place * count // prompt.layout.counts[code]
                part = torch.where(mine, here, part)
                parts += count
        part = part.expand_as(rank)
        best = torch.full_like(rank[..., :1], rank.shape[-1]).expand(*rank.shape[:-1], parts)
        best = best.scatter_reduce(-1, part, rank, "amin")
        return (rank == best.gather(-1, part)) & (part > 0)
