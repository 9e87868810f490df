# SPDX-License-Identifier: Apache-2.0
"""What the scheduler counts, on its way to the log and to ``/metrics``."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tests.conftest import BLOCK_SIZE, Media
from tests.engines import Engine
from tests.test_server import (
    POLICY,
    RUNNING,
    SAVED_BLOCKS,
    SAVED_TOKENS,
    SECONDS_SPENT,
    ask,
    clip_request,
)
from vllm_acckv.engine.connector import KVPolicyConnector
from vllm_acckv.engine.prometheus import KVPolicyPromMetrics, KVPolicyStats, Saved
from vllm_acckv.metrics import RequestReport
from vllm_acckv.tools.demo import COMPACTIONS, FREED_BLOCKS
from vllm_acckv.tools.server import Metrics, Server

ENGINES: dict[int, list[object]] = {0: ["model", "0"], 1: ["model", "1"]}


def report(seconds: float = 0.5) -> RequestReport:
    """Two layers of a prompt with 4 text, 10 video and 6 audio tokens."""
    made = RequestReport(layers=2, entries=20, seconds=seconds)
    made.count([[8, 6, 4], [0, 4, 0], [0, 10, 8]])
    return made


def compacted(seconds: float, **gauges: float) -> KVPolicyStats:
    stats = KVPolicyStats()
    stats.compact(report(seconds))
    stats.data |= gauges
    return stats


def prom_metrics(registry: CollectorRegistry, engines: dict[int, list[object]] = ENGINES) -> Any:
    types = {one: partial(one, registry=registry) for one in (Gauge, Counter, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    return KVPolicyPromMetrics(config, types, ["model_name", "engine"], engines)


def reading(registry: CollectorRegistry) -> Metrics:
    return Metrics(generate_latest(registry).decode())


# Statistics


def test_counters_add_observations_queue_up_and_gauges_are_the_latest() -> None:
    first, second = compacted(0.25, saved_blocks=3), compacted(0.5, saved_blocks=2)
    first.skip("no audio or video")
    second.free(7)
    before = json.dumps(second.data)
    data = first.aggregate(second).data
    assert data["compactions"] == 2
    assert data["freed_blocks"] == 7
    assert data["skipped_requests/no audio or video"] == 1
    assert data["compaction_seconds"] == [0.25, 0.5]
    assert data["tokens/video/evicted"] == 2 * 5
    assert data["saved_blocks"] == 2
    first.aggregate(compacted(1.0, saved_blocks=0))
    assert first.data["compaction_seconds"] == [0.25, 0.5, 1.0]
    assert first.data["saved_blocks"] == 0
    assert json.dumps(second.data) == before


def test_loggers_do_not_share_what_they_are_handed() -> None:
    """vLLM hands one dictionary to every logger, and each adds later ones to its own."""
    data = compacted(0.25).data
    one, other = (KVPolicyConnector.build_kv_connector_stats(data) for _ in range(2))
    for logger in (one, other):
        logger.aggregate(compacted(0.5))
    assert one.data == other.data
    assert one.data["compactions"] == 2
    assert data["compaction_seconds"] == [0.25]
    assert KVPolicyConnector.build_kv_connector_stats().is_empty()


def test_statistics_cross_process_boundaries() -> None:
    stats = compacted(0.25)
    stats.skip("no audio or video")
    stats.data |= Saved().now({"a": 3}, {"a": report()})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats.to_dict())) == stats.data


def test_log_line() -> None:
    stats = compacted(0.2501).aggregate(compacted(0.5, saved_blocks=3))
    stats.free(7)
    line = ", ".join(f"{key}={value}" for key, value in stats.reduce().items())
    assert line == (
        "compaction_seconds mean=0.375, compaction_seconds max=0.5, compactions=2, "
        "freed_blocks=7, saved_blocks=3, tokens/audio/evicted=8.0, tokens/audio/kept=4.0, "
        "tokens/text/kept=8.0, tokens/video/evicted=10.0, tokens/video/kept=6.0, "
        "tokens/video/merged=4.0"
    )


def test_gauges_follow_the_requests_that_hold_blocks() -> None:
    saved, reports = Saved(), {"a": report(), "b": report()}
    freed: dict[str, int] = {}
    assert saved.now(freed, reports) == {}
    freed["a"] = 3
    one = {
        "saved_blocks": 3,
        "saved_tokens/text": 0,
        "saved_tokens/video": 2 + 5,
        "saved_tokens/audio": 4,
    }
    assert saved.now(freed, reports) == one
    assert saved.now(freed, reports) == one  # again, for whoever missed it
    freed["b"] = 3
    assert saved.now(freed, reports) == {key: 2 * value for key, value in one.items()}
    del freed["a"], reports["a"]
    assert saved.now(freed, reports) == one
    freed.clear()
    assert saved.now(freed, reports) == dict.fromkeys(one, 0)
    assert saved.now(freed, reports) == {}


# Prometheus


def test_series_exist_from_the_start() -> None:
    """Else the first increase is lost to ``rate``, and an idle server to the dashboard."""
    registry = CollectorRegistry()
    prom_metrics(registry)
    now = reading(registry)
    labels = {"compactions_total": 1, "tokens_total": 9, "saved_tokens": 3, "saved_blocks": 1}
    for name, count in labels.items():
        series = now.labels(f"vllm:kv_policy_{name}")
        assert len(series) == count * len(ENGINES)
        assert all(one["model_name"] == "model" for one in series)
        assert {one["engine"] for one in series} == {"0", "1"}


def test_engines_are_kept_apart() -> None:
    registry = CollectorRegistry()
    metrics = prom_metrics(registry)
    saved = Saved()
    metrics.observe(compacted(0.02).data | saved.now({"a": 3}, {"a": report()}), 0)
    metrics.observe(compacted(20.0).aggregate(compacted(0.02, saved_blocks=5)).data, 1)
    metrics.observe({"skipped_requests/no audio or video": 2, "freed_blocks": 4}, engine_idx=1)
    now = reading(registry)
    for engine, count in (("0", 1), ("1", 2)):
        of = partial(now.value, engine=engine, model_name="model")
        assert of("vllm:kv_policy_compactions_total") == count
        assert of(f"{SECONDS_SPENT}_count") == count
        assert of("vllm:kv_policy_tokens_total", modality="video", fate="evicted") == 5 * count
        assert of(f"{SECONDS_SPENT}_bucket", le="0.01") == 0
        assert of(f"{SECONDS_SPENT}_bucket", le="0.025") == 1
        assert of(f"{SECONDS_SPENT}_bucket", le="30.0") == count
    assert now.value(f"{SECONDS_SPENT}_sum", engine="1") == pytest.approx(20.02)
    assert now.value("vllm:kv_policy_skipped_requests_total", engine="0") == 0
    assert now.value("vllm:kv_policy_skipped_requests_total", reason="no audio or video") == 2
    assert now.value("vllm:kv_policy_freed_blocks_total", engine="1") == 4
    assert now.value(SAVED_BLOCKS, engine="0") == 3
    assert now.value(SAVED_BLOCKS, engine="1") == 5
    assert now.value(SAVED_TOKENS, engine="0", modality="video") == 7
    metrics.observe(saved.now({}, {}), 0)
    now = reading(registry)
    assert now.value(SAVED_BLOCKS) == 5
    assert now.value(SAVED_TOKENS) == 0


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    prom_metrics(registry).observe({"skipped_requests/policy full": 1})
    text = (Path(__file__).parents[1] / "serving" / "README.md").read_text()
    names = {name for name in reading(registry).names() if not name.endswith("_created")}
    for ending in ("_bucket", "_sum", "_count"):
        names = {name.removesuffix(ending) for name in names}
    for name in names:
        assert f"`{name}`" in text or f"`{name}{{" in text, name


def test_metrics_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's wrappers take fewer arguments, and names without colons."""
    from vllm.v1.metrics import ray_wrappers

    made: dict[str, Any] = {}
    calls: list[tuple[str, float, dict[str, str]]] = []

    class Metric:
        def __init__(self, name: str, tag_keys: tuple[str, ...], **options: Any) -> None:
            self._name, self._tag_keys = name, tag_keys
            made[name] = options

        def record(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == set(self._tag_keys)
            calls.append((self._name, value, tags))

        set = inc = observe = record

    ray = SimpleNamespace(Gauge=Metric, Counter=Metric, Histogram=Metric)
    monkeypatch.setattr(ray_wrappers, "ray_metrics", ray)
    monkeypatch.setattr(ray_wrappers, "ray_serve", None)
    prom = ray_wrappers.RayKVConnectorProm
    types = {Gauge: prom._gauge_cls, Counter: prom._counter_cls, Histogram: prom._histogram_cls}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = KVPolicyPromMetrics(config, types, ["model_name", "engine"], ENGINES)
    assert calls == []
    assert made["vllm_kv_policy_compaction_seconds"]["boundaries"][0] == 0.001
    metrics.observe(compacted(0.5).data | Saved().now({"a": 3}, {"a": report()}), 1)
    assert {tags["engine"] for *_, tags in calls} == {"1"}
    values = {(name, *sorted(tags.items())): value for name, value, tags in calls}
    common = (("ReplicaId", ""), ("engine", "1"))
    model = ("model_name", "model")
    assert values["vllm_kv_policy_compactions", *common, model] == 1
    assert values["vllm_kv_policy_compaction_seconds", *common, model] == 0.5
    assert values["vllm_kv_policy_saved_tokens", *common, ("modality", "video"), model] == 7


# In the engine


def runs(saved: list[dict[str, float]], name: str) -> list[float]:
    """A gauge, step by step, with repetitions left out."""
    return [value for value, _ in groupby(one.get(name, 0) for one in saved)]


def test_gauges_through_a_preemption(acckv: Engine, media: Media) -> None:
    assert_gauges_through_a_preemption(acckv, media)


def test_gauges_through_a_preemption_in_chunks(acckv_chunked: Engine, media: Media) -> None:
    assert_gauges_through_a_preemption(acckv_chunked, media)


def assert_gauges_through_a_preemption(engine: Engine, media: Media) -> None:
    """0 until the first decode step, 0 again while the request starts over and after its end."""
    plain = engine.run(media.long_separate())
    (line,) = plain.log
    engine.call("take_saved")
    held = [step["r0"] for step in plain.held[:-1]]
    first_decode = next(n for n, (before, now) in enumerate(pairwise(held), 1) if now < before)
    trace = engine.run(media.long_separate(), preempt_at=first_decode + 3)
    saved = engine.call("take_saved")
    assert len(trace.preemptions["r0"]) == 1
    blocks = trace.counters["freed_blocks"]
    assert f"freed {blocks} of" in line
    assert runs(saved, "saved_blocks") == [0, blocks, 0, blocks, 0]
    for name in ("video", "audio"):
        gone = sum(trace.counters[f"tokens/{name}/{fate}"] for fate in ("merged", "evicted"))
        assert gone > 0
        seen = runs(saved, f"saved_tokens/{name}")
        assert seen == pytest.approx([0, gone, 0, gone, 0])
    # Text stays with this policy; and nothing is sent while there is nothing to say.
    assert runs(saved, "saved_tokens/text") == [0]
    assert saved[0] == {}
    assert len(trace.counters["compaction_seconds"]) == 1
    assert trace.counters["compaction_seconds"][0] > 0


def test_gauges_of_several_requests(acckv: Engine, media: Media) -> None:
    """They add up, and an abort takes its share away with the next step."""
    acckv.call("take_saved")
    asks = [media.long_separate(max_tokens=tokens) for tokens in (30, 30, 12)]
    trace = acckv.run(*asks, abort={1: 20})
    saved = acckv.call("take_saved")
    one = trace.counters["freed_blocks"] / 3
    seen = runs(saved, "saved_blocks")
    assert seen == [0, 3 * one, 2 * one, one, 0]
    per_request = sum(trace.counters[f"tokens/video/{fate}"] for fate in ("merged", "evicted")) / 3
    expected = [count * per_request for count in (0, 3, 2, 1, 0)]
    assert runs(saved, "saved_tokens/video") == pytest.approx(expected)
    assert trace.counters["saved_blocks"] == 0


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_saved_blocks_are_what_a_request_does_not_hold(
    acckv: Engine, media: Media, budget: float
) -> None:
    acckv.call("take_saved")
    trace = acckv.run(media.long_separate(xargs={"kv_budget": budget}))
    saved = acckv.call("take_saved")[len(trace.held) - 2]["saved_blocks"]
    answer = trace.answers[0]
    tokens = len(answer.prompt) + len(answer.tokens) - 1
    assert saved + trace.held[-2]["r0"] == -(-tokens // BLOCK_SIZE)


# Several API servers


def test_two_api_servers(checkpoint: Path, media: Media, tmp_path: Path) -> None:
    """Each counts what it is told, in files, and whichever is asked answers for both."""
    flags = (*POLICY, "--api-server-count", "2", "--enable-log-requests")
    with Server(checkpoint, *flags, media=media.folder, log=tmp_path / "log") as server:
        request = clip_request(media, "separate")
        count = 0
        while len(answering(server)) < 2:
            assert count < 30, "one API server got all requests"
            ask(server, *request, max_tokens=4)
            count += 1
        now = server.wait_for_metrics(
            lambda now: now.value(COMPACTIONS) == count and now.value(RUNNING) == 0, "all requests"
        )
        assert now.value(f"{SECONDS_SPENT}_count") == count
        assert now.value(f"{SECONDS_SPENT}_bucket", le="60.0") == count
        for name in (COMPACTIONS, SAVED_BLOCKS, f"{SECONDS_SPENT}_count"):
            # One, and not one for each process.
            assert now.labels(name) == [{"model_name": server.model, "engine": "0"}]

        one = now.value(FREED_BLOCKS) / count
        first, *others = (ask(server, *request, stream=True, max_tokens=3000) for _ in range(3))
        wait_for_saved(server, 3 * one, running=3)
        for stream in others:
            stream.close()
        wait_for_saved(server, one, running=1)
        first.close()
        wait_for_saved(server, 0, running=0)
        assert server.metrics().value(SAVED_TOKENS) == 0


def answering(server: Server) -> set[str]:
    """The API servers that have answered a question."""
    return set(re.findall(r"\(ApiServer_(\d) .*Received request", server.log.read_text()))


def wait_for_saved(server: Server, blocks: float, running: int) -> None:
    """And make sure that both API servers say so."""
    server.wait_for_metrics(
        lambda now: now.value(SAVED_BLOCKS) == blocks and now.value(RUNNING) == running,
        f"{blocks} saved blocks of {running} requests",
    )
    assert {server.metrics().value(SAVED_BLOCKS) for _ in range(6)} == {blocks}
