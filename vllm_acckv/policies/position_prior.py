# SPDX-License-Identifier: Apache-2.0
"""Control: AccKV without attention, only the position factor of its eq. 1."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.policies.base import Layer, Prompt
from vllm_acckv.scores import Weights
from vllm_acckv.selection import Selection
from vllm_acckv.spans import Layout
from vllm_acckv.states import States


class PositionPrior(AccKV):
    """AccKV whose scores are those of uniform attention: 1 / (l - j), the factor of eq. 1.

    Summed over text rows only, eq. 1 is a recency prior (see the errata in docs/policies.md). What
    AccKV gains over this control is what attention adds; without focusing and calibration it is
    ``recent``. Under another ``redistribution`` than the paper's all scores are equal.
    """

    name: ClassVar[str] = "position_prior"

    def needs_trailing_text(self, layout: Layout) -> bool:
        return False

    def first_query(self, layout: Layout) -> int:
        return layout.length

    def weights(self, layout: Layout, device: torch.device | None = None) -> Weights | None:
        return None

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        length = prompt.layout.length
        prior = torch.ones(length, device=scores.device)
        if self.redistribution == "paper":
            prior = 1 / torch.arange(length, 0, -1, device=scores.device, dtype=torch.float32)
        return super().select(prior.expand_as(scores), states, prompt, layer)
