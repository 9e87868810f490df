# SPDX-License-Identifier: Apache-2.0
"""Compaction beside vLLM's prefix cache: shared blocks stay intact, rewritten ones private."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.conftest import BLOCK_SIZE, LONG_QUESTION, Media, Reference, difference
from tests.engines import RUNNER_V2, Ask, Engine, Trace
from tests.reference import naive_acckv

FULL = {"kv_policy": "full"}


CHUNKED = {"max_num_batched_tokens": 64}
VARIANTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "V1": ({}, {}),
    "V1 chunked": ({}, CHUNKED),
    "V2": (RUNNER_V2, {}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def caching(request: pytest.FixtureRequest, start_engine: Callable[..., Engine]) -> Engine:
    environment, options = VARIANTS[request.param]
    return start_engine(
        environment,
        additional_config={"kv_policy": "acckv"},
        enable_prefix_caching=True,
        **options,
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


@pytest.mark.parametrize("first", [FULL, {"kv_budget": 0.1}], ids=["full", "smaller"])
def test_hazard_5_blocks_computed_in_the_same_step_are_not_copied(
    caching: Engine, media: Media, reference: Reference, first: dict[str, Any]
) -> None:
    """vLLM hashes blocks before they are computed, so a request finds those of another one in its
    own step; copies are made when the step begins, and would be copies of nothing."""
    for clip in (media.separate, media.interleaved):
        small = clip(xargs={"kv_budget": 0.5})
        trace = caching.run(clip(question=LONG_QUESTION, xargs=first), small)
        (_, answer) = trace.answers
        _, expected = reference.answer(small, 0.5, answer.tokens, tau=0.6)
        assert difference(answer, expected.logprobs) < 1e-3
        assert trace.free_before == trace.free_after


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


def reusable(reference: Reference, prompt: list[int]) -> int:
    """Prompt tokens in whole blocks in front of the rows that AccKV observes."""
    start = naive_acckv.first_trailing_text(reference.modality(prompt))
    return start // BLOCK_SIZE * BLOCK_SIZE


def test_a_hit_reaches_into_blocks_that_are_rewritten(
    caching: Engine, media: Media, reference: Reference
) -> None:
    """The whole prompt is cached by an uncompressed request; others hit all that they may, rewrite
    copies, and leave the cached blocks to the next."""
    full = media.separate(xargs=FULL)
    caching.run(full)
    requests = [media.separate(xargs={"kv_budget": budget}) for budget in (0.5, 0.2, 0.1)]
    for ask in requests:
        trace = caching.run(ask)
        assert_reference(trace, reference, ask)
        assert trace.kept["r0"]
        assert trace.answers[0].cached == reusable(reference, trace.answers[0].prompt)
        assert trace.free_before == trace.free_after


QUESTIONS = ("What do you hear?", LONG_QUESTION, "Which colour comes first, and which sound?")


def test_other_questions_about_a_clip_hit_the_whole_clip(
    caching: Engine, stock: Engine, media: Media, reference: Reference
) -> None:
    """The first one was compressed; its clip is still found to the last whole block."""
    for clip in (media.separate, media.interleaved):
        trace = caching.run(clip(max_tokens=10))
        assert trace.answers[0].cached == 0
        for question in QUESTIONS:
            ask = clip(question=question, max_tokens=10)
            trace = caching.run(ask)
            assert_reference(trace, reference, ask)
            assert trace.answers[0].cached == reusable(reference, trace.answers[0].prompt)
            assert trace.free_before == trace.free_after
        full = clip(question="Another one?", xargs=FULL, max_tokens=10)
        trace = caching.run(full)
        assert_stock(trace, stock, full)
        assert trace.answers[0].cached == reusable(reference, trace.answers[0].prompt)


@pytest.mark.parametrize("arrive", [[0, 0, 0], [0, 1, 2], [0, 3, 9]])
def test_several_requests_in_flight_about_one_clip(
    caching: Engine, media: Media, reference: Reference, arrive: list[int]
) -> None:
    """They share what is computed, whichever step they come in, and copy what they rewrite."""
    asks = [media.interleaved(question=question, max_tokens=14) for question in QUESTIONS]
    trace = caching.run(*asks, arrive=arrive)
    assert_reference(trace, reference, *asks)
    assert trace.free_before == trace.free_after
    assert caching.call("leftovers")["copies"] == 0


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


def test_a_preempted_request_starts_again_without_its_hit(
    caching: Engine, media: Media, reference: Reference
) -> None:
    """The hit covered its clip, so vLLM sent the worker none; now it is needed."""
    caching.run(media.separate())
    ask = media.separate(question="And now?")
    trace = caching.run(ask, preempt_at=3)
    assert trace.preemptions["r0"]
    assert_reference(trace, reference, ask)
    assert trace.answers[0].cached > 0
    assert trace.free_before == trace.free_after


def test_an_abort_while_copies_are_made(
    caching: Engine, media: Media, reference: Reference
) -> None:
    asks = [media.interleaved(question=question, max_tokens=30) for question in QUESTIONS]
    for step in (1, 2, 4):
        trace = caching.run(*asks, arrive=[0, 1, 2], abort={0: step})
        assert_reference(trace, reference, *asks[1:])
        assert trace.free_before == trace.free_after
        assert caching.call("leftovers")["copies"] == 0
