# SPDX-License-Identifier: Apache-2.0
"""Compaction beside vLLM's prefix cache: shared blocks stay intact, rewritten ones private."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.conftest import BLOCK_SIZE, LONG_QUESTION, Media, Reference, difference
from tests.engines import Ask, Engine, Trace
from tests.reference import naive_acckv

FULL = {"kv_policy": "full"}


@pytest.fixture(scope="module")
def caching(runner: dict[str, str], start_engine: Callable[..., Engine]) -> Engine:
    return start_engine(
        runner, additional_config={"kv_policy": "acckv"}, enable_prefix_caching=True
    )


@pytest.fixture(autouse=True)
def _empty_cache(caching: Engine) -> None:
    assert caching.call("reset_prefix_cache")


def assert_stock(trace: Trace, stock: Engine, *asks: Ask) -> None:
    for answer, ask in zip(trace.answers, asks, strict=True):
        expected = stock.answer(Ask(ask.messages, ask.audio_in_video, max_tokens=ask.max_tokens))
        assert answer.tokens == expected.tokens
        assert np.abs(answer.logprobs - expected.logprobs).max() < 1e-4


def assert_reference(trace: Trace, reference: Reference, *asks: Ask) -> None:
    for answer, ask in zip(trace.answers, asks, strict=True):
        budget = ask.xargs.get("kv_budget", 0.2)
        _, expected = reference.answer(ask, budget, answer.tokens, tau=0.6)
        assert difference(answer, expected.logprobs) < 1e-3


def test_hazard_5_shared_blocks_are_not_overwritten(
    caching: Engine, stock: Engine, media: Media, reference: Reference
) -> None:
    """A compacted request between, and beside, uncompressed ones with the same prompt."""
    full = media.separate(xargs=FULL, max_tokens=20)
    small = media.separate(xargs={"kv_budget": 0.1}, max_tokens=20)
    assert_stock(caching.run(full), stock, full)
    assert_reference(caching.run(small), reference, small)
    assert_stock(caching.run(full), stock, full)
    trace = caching.run(full, small, full, arrive=[0, 3, 8])
    assert_reference(Trace([trace.answers[1]], [], [], {}, 0, 0, []), reference, small)
    trace.answers.pop(1)
    assert_stock(trace, stock, full, full)


def test_hazard_6_rewritten_blocks_are_never_hashed(
    caching: Engine, stock: Engine, media: Media, reference: Reference
) -> None:
    """Only blocks in front of the rewritten ones may be found, by whoever asks next."""
    small = media.separate(max_tokens=70)  # the answer fills blocks of its own
    trace = caching.run(small)
    modality = reference.modality(trace.answers[0].prompt)
    _, freed, active = naive_acckv.naive_plan(modality, 0.2, BLOCK_SIZE)
    assert active
    seen = [step["r0"] for step in trace.hashed if "r0" in step]
    assert len(seen[-1]) > -(-len(modality) // BLOCK_SIZE)
    assert any(any(flags[:freed]) for flags in seen)
    assert not any(any(flags[freed:]) for flags in seen)
    full = media.separate(xargs=FULL, max_tokens=20)
    assert_stock(caching.run(full), stock, full)


def test_a_hit_ends_at_the_own_compaction(
    caching: Engine, media: Media, reference: Reference
) -> None:
    """The whole prompt is cached by an uncompressed request; others still hit what they may."""
    caching.run(media.separate(xargs=FULL))
    requests = [media.separate(xargs={"kv_budget": budget}) for budget in (0.5, 0.2, 0.1)]
    for ask in requests:
        trace = caching.run(ask)
        assert_reference(trace, reference, ask)
        assert trace.kept["r0"]


def test_another_question_and_a_second_turn(
    caching: Engine, stock: Engine, media: Media, reference: Reference
) -> None:
    first = media.separate(max_tokens=10)
    trace = caching.run(first)
    assert_reference(trace, reference, first)
    other = media.separate(question=LONG_QUESTION, max_tokens=10)
    assert_reference(caching.run(other), reference, other)
    turn = Ask(
        [
            *first.messages,
            {"role": "assistant", "content": "It is a red circle."},
            {"role": "user", "content": "And then?"},
        ],
        max_tokens=10,
    )
    assert_reference(caching.run(turn), reference, turn)
    plain = Ask(turn.messages, xargs=FULL, max_tokens=10)
    assert_stock(caching.run(plain), stock, plain)


def test_preemption_hits_what_the_first_run_cached(
    caching: Engine, media: Media, reference: Reference
) -> None:
    ask = media.separate(max_tokens=16)
    for step in (1, 5):
        trace = caching.run(ask, preempt_at=step)
        assert_reference(trace, reference, ask)
        assert trace.free_before == trace.free_after
