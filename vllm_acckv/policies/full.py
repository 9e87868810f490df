# SPDX-License-Identifier: Apache-2.0
"""The full cache: what every policy is compared with."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_acckv.policies.base import Budget, Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import Layout
from vllm_acckv.states import States


class Full(Policy):
    """Keep everything, whatever the budget."""

    name: ClassVar[str] = "full"

    budget: Budget = 1.0

    def entries(self, layout: Layout, layer: Layer) -> int:
        return layout.length

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        return select_best(scores, prompt.layout.length)
