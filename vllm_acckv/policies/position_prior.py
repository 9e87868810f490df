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


class PositionPrior(AccKV):
    """AccKV whose scores are 1 / (l - j).

    Summed over text rows only, eq. 1 is a recency prior (erratum E2 in docs/policies.md). What
    AccKV gains over this control is what attention adds; without focusing and calibration it is
    ``recent``.
    """

    name: ClassVar[str] = "position_prior"
    needs_trailing_text: ClassVar[bool] = False

    def first_query(self, layout: Layout) -> int:
        return layout.length

    def weights(self, layout: Layout) -> Weights | None:
        return None

    def select(
        self,
        scores: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        length = prompt.layout.length
        left = torch.arange(length, 0, -1, device=key.device, dtype=torch.float32)
        return super().select((1 / left).expand(len(key), length), key, value, prompt, layer)
