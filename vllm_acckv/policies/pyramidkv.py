# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: SnapKV with more entries in low layers than in high ones (arXiv 2406.02069)."""

from __future__ import annotations

from typing import ClassVar

from vllm_acckv.policies.base import Layer, Positive
from vllm_acckv.policies.snapkv import SnapKV
from vllm_acckv.spans import Layout


class PyramidKV(SnapKV):
    """SnapKV whose budget falls linearly with depth; the budget is the mean over the layers.

    vLLM's layers share their block tables, so there the widest layer decides how many blocks come
    back.

    Attributes:
        beta: steepness; the top layer keeps 1 / beta of the mean beyond the window.
        window: as in SnapKV (the authors' runs use 8).
        kernel, pooling: as in SnapKV (the authors' runs use 7 and max).
    """

    name: ClassVar[str] = "pyramidkv"

    beta: Positive = 20

    def entries(self, layout: Layout, layer: Layer) -> int:
        size = super().entries(layout, layer)
        window = layout.length - self.first_query(layout)
        # What is kept beyond the window: at most everything, on average ``mean``.
        most, mean = layout.length - window, size - window
        if mean <= 0 or size >= layout.length or layout.length < 2 * mean:
            return size
        low = mean / self.beta
        high = 2 * mean - low
        if high > most:
            high, low = most, 2 * mean - most
        step = (high - low) / max(layer.count - 1, 1)
        entries = window + round(high - layer.index * step)
        return max(entries, self._protected(layout)) if self.protect_text else entries
