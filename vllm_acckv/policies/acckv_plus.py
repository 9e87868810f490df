# SPDX-License-Identifier: Apache-2.0
"""AccKV+: something of every part of the clip, and of each part what stands out.

A policy of this project, not of the paper; docs/policies.md says how it was found, and
docs/results-quality.md what it is worth. AccKV and SnapKV keep what the text behind the clips
attends to. An answer also needs what its own later words will look for, which nobody knows yet. So
each modality is cut into parts, more of them where the text attends more, and the best token of
each part stays.

What is best is told by attention and by the keys themselves: tokens that others will attend to have
keys far from those of text. Rows of the clip itself tell as much (docs/results-quality.md), but
would cost the prefix cache: those of a cached clip are not computed again.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from vllm_acckv.policies.base import Layer, Policy, Prompt, Ratio
from vllm_acckv.selection import Selection, ranked, select_best
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import States


class AccKVPlus(Policy):
    """Keep all text, the best token of each part of the clip, and the best of the rest.

    Attributes:
        coverage: share of the kept audio-video tokens that are the best of their part. 0 keeps
            what is best in the whole clip and nothing else.
        focusing: divide the parts between the modalities by the root of the mean attention that
            their tokens get, per selection; without, each modality gets half of them.
        distinct: a token's score is its attention times the fourth power of the distance of its
            key from the mean key of all text, before rotary embedding; without, its attention
            alone.
        head_mode: one selection per ``layer``, or one per KV ``head``.
    """

    name: ClassVar[str] = "acckv_plus"
    layers_alike: ClassVar[bool] = True

    coverage: Ratio = 1.0
    focusing: bool = True
    distinct: bool = True
    head_mode: Literal["layer", "head"] = "head"

    @property
    def needs_angles(self) -> bool:
        return self.distinct

    def kept(self, layout: Layout) -> int:
        """Audio-video tokens that stay (k)."""
        return max(0, self.capacity(layout) - layout.text)

    def entries(self, layout: Layout, layer: Layer) -> int:
        return layout.text + self.kept(layout)

    def needs_trailing_text(self, layout: Layout) -> bool:
        return True

    def first_query(self, layout: Layout) -> int:
        return layout.text_start

    def parts(self, layout: Layout) -> int:
        """Parts of all clips together; several clips of a modality count as one."""
        return round(self.coverage * self.kept(layout))

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        worth = scores * self._distinctness(states, prompt) if self.distinct else scores
        if self.head_mode == "layer":
            both = torch.stack([scores, worth]).mean(-2, keepdim=True)
            scores, worth = layer.ranks.mean(both).unbind()
        text = prompt.modality == TEXT
        rank = ranked(worth.masked_fill(text, -torch.inf))
        # Ranks, not scores: no two are equal, so that each part has one best token.
        order = torch.where(self._best(rank, scores, prompt), rank - len(text), rank)
        return select_best(-order.float(), self.entries(prompt.layout, layer), protected=text)

    def _distinctness(self, states: States, prompt: Prompt) -> torch.Tensor:
        """fp32 ``[..., G, l]``, 1 for text and for tokens of a modality's mean squared distance.

        Before rotary embedding, a bias of keys is the same for all tokens and drops out.
        """
        text = (prompt.modality == TEXT)[None]
        centre, _ = states.means(text[:, None], prompt.angles)
        square = states.distances(centre[..., 0, :], ~text, prompt.angles)
        # A token whose key is broken has no worth; a broken centre says nothing about any.
        square = square.nan_to_num(posinf=0)
        total = torch.ones_like(square)
        for code in prompt.layout.present:
            mine = prompt.modality == code
            mean = (square * mine).sum(-1, keepdim=True) / prompt.layout.counts[code]
            known = mine & mean.isfinite() & (mean > 0)
            total = torch.where(known, (square / mean).square(), total)
        return total

    def _best(self, rank: torch.Tensor, scores: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """bool like ``rank`` ``[..., S, l]``, whether a token is the best of its part."""
        _, num_video, num_audio = prompt.layout.counts
        total = self.parts(prompt.layout)
        video = self._video_parts(scores, prompt)[..., None]
        part = torch.zeros_like(rank)  # the first takes what is in none
        for code, parts, before, count in (
            (VIDEO, video, 0, num_video),
            (AUDIO, total - video, video, num_audio),
        ):
            mine = prompt.modality == code
            place = mine.cumsum(-1) - 1
            here = 1 + before + place * parts // max(1, count)
            part = torch.where(mine & (parts > 0), here, part)
        best = torch.full_like(rank[..., :1], rank.shape[-1]).expand(*rank.shape[:-1], total + 1)
        best = best.scatter_reduce(-1, part, rank, "amin")
        return (rank == best.gather(-1, part)) & (part > 0)

    def _video_parts(self, scores: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """int64 ``[..., S]``; the other parts are of audio."""
        _, num_video, num_audio = prompt.layout.counts
        total = self.parts(prompt.layout)
        share = torch.full_like(scores[..., 0], 0.5)
        if self.focusing and num_video and num_audio:
            video = ((scores * (prompt.modality == VIDEO)).sum(-1) / num_video).sqrt()
            audio = ((scores * (prompt.modality == AUDIO)).sum(-1) / num_audio).sqrt()
            share = video / (video + audio)
            share = torch.where(share.isfinite(), share, 0.5)
        # No more parts than tokens.
        return (share * total).round().long().clamp(max(0, total - num_audio), num_video)
