# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: attention sinks and the latest tokens (arXiv 2309.17453)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_acckv.policies.base import Count, Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import Layout
from vllm_acckv.states import States


class Streaming(Policy):
    """Keep the first tokens and the latest, text or not, without looking at attention.

    Positions stay those of the prompt; the paper renumbers them inside the cache.

    Attributes:
        sinks: tokens to keep at the beginning (the paper's 4).
    """

    name: ClassVar[str] = "streaming"
    layers_alike: ClassVar[bool] = True

    sinks: Count = 4

    def entries(self, layout: Layout, layer: Layer) -> int:
        return self.capacity(layout)

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        position = torch.arange(prompt.layout.length, device=scores.device, dtype=torch.float32)
        size = self.entries(prompt.layout, layer)
        sinks = position < min(self.sinks, size)
        return select_best(position[None], size, protected=sinks)
