# SPDX-License-Identifier: Apache-2.0
"""Counts that travel from workers to the scheduler, and become log lines and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_acckv.spans import MODALITY_NAMES

MODALITIES = tuple(MODALITY_NAMES.values())


def _zeros() -> dict[str, float]:
    return dict.fromkeys(MODALITIES, 0.0)


@dataclass
class RequestReport:
    """Sums over the layers of one request. Token counts are means over a layer's KV heads.

    Attributes:
        layers: layers that decided, those that keep everything included.
        entries: KV entries per head that stay, merged ones included.
        kept: tokens that stay, by modality.
        merged: tokens that live on only inside another entry.
        evicted: tokens that are gone.
        seconds: time spent observing queries, selecting and moving entries.
    """

    layers: int = 0
    entries: int = 0
    kept: dict[str, float] = field(default_factory=_zeros)
    merged: dict[str, float] = field(default_factory=_zeros)
    evicted: dict[str, float] = field(default_factory=_zeros)
    seconds: float = 0.0

    def count(self, fates: Sequence[Sequence[float]]) -> None:
        """Add tokens kept, merged and evicted by modality code, as of
        :meth:`vllm_acckv.selection.Kept.fates`."""
        for mine, counts in zip((self.kept, self.merged, self.evicted), fates, strict=True):
            for name, number in zip(MODALITIES, counts, strict=True):
                mine[name] += number

    def __iadd__(self, other: RequestReport) -> RequestReport:
        """Add the layers of another pipeline stage."""
        self.layers += other.layers
        self.entries += other.entries
        self.seconds += other.seconds
        self.count([list(one.values()) for one in (other.kept, other.merged, other.evicted)])
        return self

    def gone(self) -> dict[str, float]:
        """Tokens without an entry of their own, by modality; means over the layers."""
        merged, evicted = self.per_layer(self.merged), self.per_layer(self.evicted)
        return {name: merged[name] + evicted[name] for name in MODALITIES}

    def per_layer(self, counts: dict[str, float]) -> dict[str, float]:
        """Means over the layers."""
        return {name: value / max(self.layers, 1) for name, value in counts.items()}
