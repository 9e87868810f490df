# SPDX-License-Identifier: Apache-2.0
"""Control: the latest audio-video tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import TEXT, Layout
from vllm_acckv.states import States


class Recent(Policy):
    """Keep all text and the latest audio-video tokens, without looking at attention."""

    name: ClassVar[str] = "recent"
    layers_alike: ClassVar[bool] = True

    def entries(self, layout: Layout, layer: Layer) -> int:
        return max(self.capacity(layout), layout.text)

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        position = torch.arange(prompt.layout.length, device=scores.device, dtype=torch.float32)
        size = self.entries(prompt.layout, layer)
        return select_best(position[None], size, protected=prompt.modality == TEXT)
