# SPDX-License-Identifier: Apache-2.0
"""Controls: evict a whole modality (Tables 1 and 3 of the AccKV paper)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_acckv.policies.base import Budget, Count, Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import States


class _Drop(Policy):
    """Evict one modality; of the other, keep what the budget allows.

    With the default budget all of the other modality stays, as in the tables. With a smaller one
    its tokens compete by the attention that the trailing text pays them, so that the control can
    be compared with other policies at equal size.

    Attributes:
        first_layer: layers below it keep everything (Table 1 evicts in the higher half only).
    """

    layers_alike: ClassVar[bool] = True
    dropped: ClassVar[int]

    budget: Budget = 1.0
    first_layer: Count = 0

    def _rest(self, layout: Layout) -> int:
        """Audio-video tokens of the modality that is not dropped."""
        return layout.av - layout.counts[self.dropped]

    def _competing(self, layout: Layout) -> bool:
        return self.capacity(layout) < layout.text + self._rest(layout)

    def entries(self, layout: Layout, layer: Layer) -> int:
        if layer.index < self.first_layer:
            return layout.length
        size = min(self.capacity(layout), layout.text + self._rest(layout))
        return max(size, layout.text)

    def needs_trailing_text(self, layout: Layout) -> bool:
        return self._competing(layout)

    def first_query(self, layout: Layout) -> int:
        return layout.text_start if self._competing(layout) else layout.length

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        return select_best(
            layer.ranks.mean(scores.mean(-2, keepdim=True)),
            self.entries(prompt.layout, layer),
            protected=prompt.modality == TEXT,
            candidates=prompt.modality != self.dropped,
        )


class DropAudio(_Drop):
    """Evict all audio."""

    name: ClassVar[str] = "drop_audio"
    dropped: ClassVar[int] = AUDIO


class DropVideo(_Drop):
    """Evict all video."""

    name: ClassVar[str] = "drop_video"
    dropped: ClassVar[int] = VIDEO
