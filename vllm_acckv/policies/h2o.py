# SPDX-License-Identifier: Apache-2.0
"""H2O: heavy hitters and the latest tokens (arXiv 2306.14048)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from vllm_acckv.policies.base import Layer, Policy, Prompt, Ratio
from vllm_acckv.scores import Weights
from vllm_acckv.selection import Selection, ranked, select_best
from vllm_acckv.spans import TEXT, Layout
from vllm_acckv.states import States


class H2O(Policy):
    """Keep, per KV head, the tokens that all prompt rows attend to most, and the latest ones.

    Attributes:
        recent_ratio: share of the budget that goes to the latest tokens. The authors give heavy
            hitters and recent tokens 10 % of the prompt each.
        protect_text: spend the budget on audio-video tokens and keep all text.
        normalize: divide a token's score by the number of rows that see it, which takes the
            advantage from early tokens (the column half of AccKV's eq. 1).
        decode: ``static`` compresses once after prefill; ``evict`` goes on dropping one entry per
            generated token, as the authors do. vLLM serves ``static`` only.
    """

    name: ClassVar[str] = "h2o"
    layers_alike: ClassVar[bool] = True

    recent_ratio: Ratio = 0.5
    protect_text: bool = False
    normalize: bool = False
    decode: Literal["static", "evict"] = "static"

    @property
    def evicts_at_decode(self) -> bool:
        return self.decode == "evict"

    def entries(self, layout: Layout, layer: Layer) -> int:
        return max(self.capacity(layout), layout.text if self.protect_text else 0)

    def first_query(self, layout: Layout) -> int:
        return 0

    def weights(self, layout: Layout, device: torch.device | None = None) -> Weights | None:
        if not self.normalize:
            return None
        seen_by = torch.arange(layout.length, 0, -1, device=device).float()
        return Weights(rows=torch.ones_like(seen_by), columns=1 / seen_by)

    def recent(self, size: int) -> int:
        """Entries of ``size`` that go to the latest tokens."""
        return int(size * self.recent_ratio)

    def decode_entries(self, layout: Layout) -> int:
        """Entries that ``decode: evict`` allows (H + R), also after a shorter prompt."""
        size = self.entries(layout, Layer())
        if self.budget <= 1:
            return size
        return max(size, int(self.budget) + (layout.text if self.budget_scope == "av" else 0))

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        size = self.entries(prompt.layout, layer)
        position = torch.arange(prompt.layout.length, device=scores.device)
        if not self.protect_text:
            protected = position >= prompt.layout.length - self.recent(size)
        else:
            text = prompt.modality == TEXT
            latest = ranked(position.masked_fill(text, -1)) < self.recent(size - prompt.layout.text)
            protected = text | latest
        return select_best(scores, size, protected)
