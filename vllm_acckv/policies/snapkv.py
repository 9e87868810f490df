# SPDX-License-Identifier: Apache-2.0
"""SnapKV: what the last rows attend to, smoothed (arXiv 2404.14469)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from pydantic_core import PydanticCustomError

from vllm_acckv.policies.base import Layer, Policy, Positive, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import TEXT, Layout
from vllm_acckv.states import States


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise PydanticCustomError("odd", "Input should be an odd number")
    return value


class SnapKV(Policy):
    """Keep, per KV head, the observation window and the tokens it attends to most.

    Attributes:
        window: rows at the end of the prompt that are observed and kept (authors' 32).
        kernel: width of the pooling along the prompt, odd (authors' 5); 1 does not pool.
        pooling: ``average`` or ``max`` (the authors' LongBench runs use max with 7).
        protect_text: spend the budget on audio-video tokens and keep all text.
    """

    name: ClassVar[str] = "snapkv"
    layers_alike: ClassVar[bool] = True

    window: Positive = 32
    kernel: Annotated[Positive, pydantic.AfterValidator(_odd)] = 5
    pooling: Literal["average", "max"] = "average"
    protect_text: bool = False

    def entries(self, layout: Layout, layer: Layer) -> int:
        size = self.capacity(layout)
        if not self.protect_text:
            return size
        return max(size, self._protected(layout))

    def _protected(self, layout: Layout) -> int:
        """Text, and what else lies in the window."""
        start = self.first_query(layout)
        return layout.length - start + layout.text_before(start)

    def first_query(self, layout: Layout) -> int:
        return max(0, layout.length - self.window)

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        size = self.entries(prompt.layout, layer)
        window = self.first_query(prompt.layout)
        position = torch.arange(prompt.layout.length, device=scores.device)
        protected = position >= max(window, prompt.layout.length - size)
        if self.protect_text:
            protected = protected | (prompt.modality == TEXT)
        return select_best(self._pooled(scores, window), size, protected)

    def _pooled(self, scores: torch.Tensor, window: int) -> torch.Tensor:
        """Smooth the columns in front of the window, ``[..., G, l]``."""
        if not window:
            return scores
        before, after = scores[..., :window], scores[..., window:]
        pool = torch.max_pool1d if self.pooling == "max" else torch.avg_pool1d
        rows = before.reshape(1, -1, window)
        pooled = pool(rows, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.cat([pooled.view_as(before), after], dim=-1)
