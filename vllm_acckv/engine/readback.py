# SPDX-License-Identifier: Apache-2.0
"""What compaction did to a request: counts that come back from the device without waiting for it,
and for inspection, everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_acckv.metrics import RequestReport
from vllm_acckv.selection import Kept, Selection

if TYPE_CHECKING:
    from vllm_acckv.engine.rows import WorkerRequest


class Readback:
    """A request's counts on their way from the device; nobody waits for them."""

    def __init__(self, request: WorkerRequest, block_size: int, device: torch.device) -> None:
        self.request_id = request.request_id
        self._layout, self._block_size = request.plan.layout, block_size
        self._layers, self._untouched = len(request.freed), request.untouched
        self._seconds = request.seconds
        counts = torch.zeros(10, device=device)
        counts[:9] += request.fates.flatten() if isinstance(request.fates, torch.Tensor) else 0
        counts[9] += request.total_freed
        self._counts = torch.empty(10, pin_memory=counts.is_cuda)
        self._counts.copy_(counts, non_blocking=True)
        self._event = torch.cuda.Event() if counts.is_cuda else None
        if self._event is not None:
            self._event.record()

    @property
    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def report(self) -> RequestReport:
        *fates, freed = self._counts.tolist()
        entries = self._layers * self._layout.length - round(freed) * self._block_size
        report = RequestReport(self._layers, entries, seconds=self._seconds)
        report.count([fates[:3], fates[3:6], fates[6:]])
        whole = [self._untouched * count for count in self._layout.counts]
        report.count([whole, [0] * 3, [0] * 3])
        return report


def record(
    selection: Selection, kept: Kept, num_heads: int, place: int | None = None
) -> dict[str, Any]:
    """JSON-able form of what a layer kept: per KV head, token indices and merged modalities; how
    many tokens AccKV's filter looked at and dropped, once or per KV head. Waits for the device.

    Args:
        place: of the layer among those that were decided together.
    """

    def of_layer(numbers: torch.Tensor) -> torch.Tensor:
        return numbers if place is None else numbers[place]

    def number(tokens: torch.Tensor | None) -> int:
        return 0 if tokens is None else int(of_layer(tokens).sum())

    freed, weight = torch.as_tensor(kept.all_freed), selection.video_weight
    tokens = of_layer(kept.tokens).expand(num_heads, -1)
    merged: list[list[int]] = [[] for _ in tokens]
    if kept.merged is not None:
        modality = kept.merged.modality
        of_heads = of_layer(kept.merged.valid).expand(num_heads, -1)
        merged = [modality[valid].tolist() for valid in of_heads]
    return {
        "freed_blocks": int(of_layer(freed) if freed.dim() else freed),
        "video_weight": [] if weight is None else of_layer(weight).tolist(),
        "filtered": number(selection.filtered),
        "rejected": number(selection.rejected),
        "tokens": [head.nonzero().flatten().tolist() for head in tokens],
        "merged": merged,
    }
