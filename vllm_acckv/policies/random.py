# SPDX-License-Identifier: Apache-2.0
"""Control: random tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar

import pydantic
import torch

from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import TEXT, Layout


class Random(Policy):
    """Keep random tokens, other ones in every layer, the same for prompts of equal length.

    Attributes:
        protect_text: choose among audio-video tokens and keep all text.
        seed: of the choice.
    """

    name: ClassVar[str] = "random"

    protect_text: bool = True
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] = 0

    def entries(self, layout: Layout, layer: Layer) -> int:
        return max(self.capacity(layout), layout.text if self.protect_text else 0)

    def select(
        self,
        scores: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        # Drawn on the host, so that every device and every rank gets the same numbers.
        generator = torch.Generator().manual_seed(self.seed + (layer.index << 32))
        drawn = torch.rand(1, prompt.layout.length, generator=generator).to(key.device)
        protected = prompt.modality == TEXT if self.protect_text else None
        return select_best(drawn, self.entries(prompt.layout, layer), protected)
