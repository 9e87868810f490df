# SPDX-License-Identifier: Apache-2.0
"""Counters: what compaction did to one request, as sums that add up over layers and workers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_acckv.selection import Kept
from vllm_acckv.spans import AUDIO, MODALITY_NAMES, VIDEO

MODALITIES = (MODALITY_NAMES[VIDEO], MODALITY_NAMES[AUDIO])


def _zeros() -> dict[str, float]:
    return dict.fromkeys(MODALITIES, 0.0)


@dataclass
class RequestReport:
    """Sums over the layers of one request. Token counts are means over a layer's KV heads.

    Attributes:
        layers: layers compacted.
        kept: audio-video tokens that stay as they were, by modality.
        merged: tokens that live on only inside a merged entry.
        evicted: tokens that are gone.
        seconds: time spent observing queries, selecting and moving entries.
    """

    layers: int = 0
    kept: dict[str, float] = field(default_factory=_zeros)
    merged: dict[str, float] = field(default_factory=_zeros)
    evicted: dict[str, float] = field(default_factory=_zeros)
    seconds: float = 0.0

    def add_layer(self, modality: torch.Tensor, kept: Kept) -> None:
        """Count one compacted layer; ``modality`` is int8 ``[l]``."""
        self.layers += 1
        heads = kept.tokens.shape[0]
        gone = ~kept.tokens
        folded = torch.zeros_like(gone)
        if kept.merged is not None:
            folded = (kept.merged.sources & kept.merged.valid[..., None]).any(1) & gone
        for code, name in ((VIDEO, "video"), (AUDIO, "audio")):
            mask = modality == code
            self.kept[name] += int((kept.tokens & mask).sum()) / heads
            self.merged[name] += int((folded & mask).sum()) / heads
            self.evicted[name] += int((gone & ~folded & mask).sum()) / heads

    def __iadd__(self, other: RequestReport) -> RequestReport:
        """Add the layers of another pipeline stage."""
        self.layers += other.layers
        self.seconds += other.seconds
        for mine, theirs in (
            (self.kept, other.kept),
            (self.merged, other.merged),
            (self.evicted, other.evicted),
        ):
            for name in mine:
                mine[name] += theirs[name]
        return self

    def per_layer(self, counts: dict[str, float]) -> dict[str, float]:
        """Means over the layers."""
        return {name: value / max(self.layers, 1) for name, value in counts.items()}
