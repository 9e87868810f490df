# SPDX-License-Identifier: Apache-2.0
"""What all requests together amount to: ``vllm:kv_policy_*`` on ``/metrics``."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_acckv.metrics import MODALITIES, RequestReport

_FATES = ("kept", "merged", "evicted")
_GAUGES = ("saved_blocks", "saved_tokens")
# Milliseconds for a short clip on a GPU, tens of seconds for a long one on a CPU.
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
# The values known beforehand; reasons turn up with the first request that has them.
_LABELS: dict[str, dict[str, tuple[str, ...]]] = {
    "tokens": {"modality": MODALITIES, "fate": _FATES},
    "saved_tokens": {"modality": MODALITIES},
    "skipped_requests": {"reason": ()},
}


@dataclass
class KVPolicyStats(KVConnectorStats):
    """What the scheduler has to say after a step, keyed ``name`` or ``name/label/label``.

    A number is the increase of a counter or the value of a gauge, a list the observations of a
    histogram. Nothing else, because msgpack carries it from the engine to the front end.
    """

    data: dict[str, Any] = field(default_factory=dict)

    def _add(self, key: str, value: float) -> None:
        self.data[key] = self.data.get(key, 0) + value

    def skip(self, reason: str) -> None:
        self._add(f"skipped_requests/{reason}", 1)

    def free(self, blocks: int) -> None:
        self._add("freed_blocks", blocks)

    def compact(self, report: RequestReport) -> None:
        self._add("compactions", 1)
        self.data.setdefault("compaction_seconds", []).append(report.seconds)
        for fate in _FATES:
            for modality, count in report.per_layer(getattr(report, fate)).items():
                self._add(f"tokens/{modality}/{fate}", count)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVPolicyStats:
        """Add what the same engine said later. ``other`` stays as it is and shares nothing."""
        for key, value in other.data.items():
            if isinstance(value, list):
                self.data[key] = self.data.get(key, []) + value
            elif key.partition("/")[0] in _GAUGES:
                self.data[key] = value
            else:
                self._add(key, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For a line of vLLM's log, "KV Transfer metrics". Where that covers several engines, the
        gauges in it are those of the engine that spoke last; ``/metrics`` keeps them apart."""
        shown: dict[str, float] = {}
        for key, value in sorted(self.data.items()):
            if isinstance(value, list):
                shown |= {f"{key} mean": sum(value) / len(value), f"{key} max": max(value)}
            elif value or "/" not in key:
                shown[key] = value
        return {key: round(value, 3) for key, value in shown.items()}

    def is_empty(self) -> bool:
        return not self.data


class Saved:
    """The gauges: what requests that hold blocks right now do not hold because of compaction."""

    def __init__(self) -> None:
        self._freed: dict[str, int] = {}
        self._values: dict[str, float] = {}

    def now(self, freed: dict[str, int], reports: dict[str, RequestReport]) -> dict[str, float]:
        """All gauges; nothing while they stay 0.

        Sent again in every step, as vLLM sends its own, so that a front end that missed one is
        right after the next.

        Args:
            freed: leading blocks given back by every compacted request that holds blocks.
            reports: of those requests, at least.
        """
        if freed == self._freed:
            return self._values if freed else {}
        self._freed = dict(freed)
        gone = [reports[request_id].gone() for request_id in freed if request_id in reports]
        tokens = {
            f"saved_tokens/{name}": float(sum(one[name] for one in gone)) for name in MODALITIES
        }
        self._values = {"saved_blocks": sum(freed.values()), **tokens}
        return self._values


class KVPolicyPromMetrics(KVConnectorPromMetrics):
    """Registers the metrics, once per front end, and feeds them, each engine under its label."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = self._counter_cls, self._histogram_cls
        self._metrics: dict[str, Any] = {}
        self._register(
            counter, "compactions", "Requests whose prompt was compacted by the KV policy."
        )
        self._register(
            counter, "freed_blocks", "KV blocks given back by compacted requests before their end."
        )
        self._register(
            counter,
            "tokens",
            "Prompt tokens of compacted requests, mean over layers and KV heads.",
        )
        self._register(counter, "skipped_requests", "Requests that stayed uncompressed.")
        self._register(
            histogram,
            "compaction_seconds",
            "Seconds spent observing, selecting and moving KV entries of one request.",
            buckets=list(_SECONDS),
        )
        self._register_gauge(
            "saved_blocks", "KV blocks that running requests do not hold because of compaction."
        )
        self._register_gauge(
            "saved_tokens",
            "Prompt tokens of running requests without a KV entry of their own, mean over layers "
            "and KV heads.",
        )

    def _register(self, metric: Any, name: str, documentation: str, **options: Any) -> None:
        labels = _LABELS.get(name, {})
        self._metrics[name] = metric(
            name=f"vllm:kv_policy_{name}",
            documentation=documentation,
            labelnames=[*self._labelnames, *labels],
            **options,
        )
        # From now on, because Prometheus sees no increase in a series that begins at 1.
        for engine in self.per_engine_labelvalues.values():
            for values in product(*labels.values()):
                self._metrics[name].labels(*engine, *values)

    def _register_gauge(self, name: str, documentation: str) -> None:
        # As vLLM's own: of several API servers, the one that was told last is right.
        self._register(self._gauge_cls, name, documentation, multiprocess_mode="mostrecent")

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            name, *labels = key.split("/")
            metric = self._metrics[name].labels(*engine, *labels)
            if isinstance(value, list):
                for observation in value:
                    metric.observe(observation)
            elif name in _GAUGES:
                metric.set(value)
            else:
                metric.inc(value)
