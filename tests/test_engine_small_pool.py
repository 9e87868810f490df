# SPDX-License-Identifier: Apache-2.0
"""A pool that runs out of blocks: requests are preempted, start over, and answer the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Media
from tests.engines import Answer, Ask, Engine
from tests.test_engine_features import POLICY, assert_alike


def long_answers(media: Media) -> list[Ask]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("separate", {}),
        ("interleaved", {"kv_budget": 0.1}),
        ("separate", {"kv_budget": 0.4}),
        ("interleaved", {}),
        ("separate", {"kv_budget": 0.1}),
        ("separate", {"kv_policy": "full"}),
        ("interleaved", {"kv_budget": 0.4, "kv_tau": -1.0}),
        ("separate", {}),
    ]
    return [
        getattr(media, layout)(seed=number, xargs=xargs, max_tokens=50 - 3 * number)
        for number, (layout, xargs) in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def unhindered(start_engine: Callable[..., Engine], media: Media) -> list[Answer]:
    """Answers of :func:`long_answers`, one at a time."""
    engine = start_engine({}, additional_config=POLICY)
    return [engine.answer(ask) for ask in long_answers(media)]


@pytest.mark.parametrize(
    ("engine", "free", "in_prefill"),
    [("acckv", 18, False), ("acckv_chunked", 18, False), ("acckv_chunked", 16, True)],
)
def test_preemption_in_a_small_pool(
    request: pytest.FixtureRequest,
    runner: dict[str, str],
    media: Media,
    unhindered: list[Answer],
    engine: str,
    free: int,
    in_prefill: bool,
) -> None:
    """Blocks run out while requests prefill and decode; whoever is thrown out starts over."""
    small: Engine = request.getfixturevalue(engine)
    trace = small.run(*long_answers(media), free=free)
    compressed = {f"r{number}" for number in range(8)} - {"r5"}
    preempted = [tokens for name in compressed for tokens in trace.preemptions[name]]
    assert any(tokens == 0 if in_prefill else tokens > 0 for tokens in preempted)
    for answer, alone in zip(trace.answers, unhindered, strict=True):
        assert_alike(answer, alone)
    assert trace.counters["compactions"] == len(compressed)
    assert trace.free_before == trace.free_after
    assert set(small.call("leftovers").values()) == {0}


def test_preemption_in_a_small_pool_of_cached_blocks(
    acckv_caching: Engine, media: Media, unhindered: list[Answer]
) -> None:
    """Resumed requests find their first blocks, unless others took them."""
    assert acckv_caching.call("reset_prefix_cache")
    trace = acckv_caching.run(*long_answers(media), free=18)
    assert any(trace.preemptions.values())
    for answer, alone in zip(trace.answers, unhindered, strict=True):
        assert_alike(answer, alone)
    assert trace.free_before == trace.free_after
