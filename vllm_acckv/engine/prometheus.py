# SPDX-License-Identifier: Apache-2.0
"""Counters of all requests together: ``vllm:kv_policy_*`` on ``/metrics``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_acckv.metrics import RequestReport

_FATES = ("kept", "merged", "evicted")


@dataclass
class KVPolicyStats(KVConnectorStats):
    """Additive counters, keyed ``name`` or ``name/label/label``."""

    data: dict[str, Any] = field(default_factory=dict)

    def _add(self, key: str, value: float) -> None:
        self.data[key] = self.data.get(key, 0) + value

    def skip(self, reason: str) -> None:
        self._add(f"skipped/{reason}", 1)

    def free(self, blocks: int) -> None:
        self._add("freed_blocks", blocks)

    def compact(self, report: RequestReport) -> None:
        self._add("compactions", 1)
        self._add("seconds", report.seconds)
        for fate in _FATES:
            for modality, count in report.per_layer(getattr(report, fate)).items():
                self._add(f"tokens/{modality}/{fate}", count)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVPolicyStats:
        for key, value in other.data.items():
            self._add(key, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"kv_policy {key}": round(value, 4) for key, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class KVPolicyPromMetrics(KVConnectorPromMetrics):
    """Registers and feeds the counters, one set per engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            "compactions": self._counter(
                "compactions", "Requests whose prompt was compacted by the KV policy."
            ),
            "freed_blocks": self._counter(
                "freed_blocks", "KV blocks given back by compacted requests before their end."
            ),
            "seconds": self._counter(
                "seconds", "Seconds spent scoring, selecting and moving KV entries."
            ),
            "tokens": self._counter(
                "tokens",
                "Prompt tokens of compacted requests, mean over layers and KV heads.",
                ["modality", "fate"],
            ),
            "skipped": self._counter(
                "skipped_requests", "Requests that stayed uncompressed.", ["reason"]
            ),
        }

    def _counter(self, name: str, documentation: str, labels: list[str] | None = None) -> Any:
        return self._counter_cls(
            name=f"vllm:kv_policy_{name}",
            documentation=documentation,
            labelnames=[*self._labelnames, *(labels or [])],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            name, *labels = key.split("/")
            self._counters[name].labels(*engine, *labels).inc(value)
