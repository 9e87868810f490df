# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding by n-gram look-up beside compaction: the same tokens in fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import LONG_QUESTION, Media
from tests.engines import Ask, Engine, Trace

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
# Few different tokens, so that an answer repeats itself: drafts are found, and some are wrong.
FEW = {"allowed_token_ids": [65, 66, 67, 68, 69], "logprobs": 5}


@pytest.fixture(scope="module", params=[{}, {"max_num_batched_tokens": 64}], ids=["", "chunked"])
def ngram(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Engine]:
    """Model runner V1; the look-up kernel of V2 does not run in Triton's interpreter."""
    with Engine(
        checkpoint,
        additional_config={"kv_policy": "acckv"},
        speculative_config=NGRAM,
        disable_log_stats=False,
        **request.param,
    ) as engine:
        yield engine


def asks(media: Media) -> list[Ask]:
    common = {"max_tokens": 40, "sampling": FEW}
    return [
        media.separate(seed=1, xargs={"kv_budget": 0.2}, **common),
        media.interleaved(seed=2, xargs={"kv_budget": 0.1}, **common),
        media.separate(seed=3, xargs={"kv_policy": "full"}, **common),
        media.text(**common),
        media.separate(seed=4, question=LONG_QUESTION, xargs={"kv_policy": "snapkv"}, **common),
        media.two_interleaved(xargs={"kv_budget": 0.3, "kv_tau": -1.0}, **common),
    ]


@pytest.fixture(scope="module")
def expected(start_engine: Callable[..., Engine], media: Media) -> Trace:
    """The same requests without drafts."""
    return start_engine({}, additional_config={"kv_policy": "acckv"}).run(*asks(media))


def test_hazard_14_rejected_drafts_after_compaction(
    ngram: Engine, expected: Trace, media: Media
) -> None:
    """Every answer equals that of the same policy without drafts, log-probabilities included."""
    before = ngram.call("drafts")
    trace = ngram.run(*asks(media), arrive=[0, 0, 1, 2, 3, 5])
    drafted, accepted = (now - then for now, then in zip(ngram.call("drafts"), before, strict=True))
    assert 0 < accepted < drafted
    for answer, other in zip(trace.answers, expected.answers, strict=True):
        assert answer.tokens == other.tokens
        seen = np.isfinite(other.logprobs) & np.isfinite(answer.logprobs)
        assert seen.any(axis=1).all()
        assert np.abs(answer.logprobs[seen] - other.logprobs[seen]).max() < 1e-4
    assert trace.kept == expected.kept_up_to_rounding()
    assert trace.free_before == trace.free_after


def test_preemption_and_abort_with_drafts(ngram: Engine, expected: Trace, media: Media) -> None:
    abort = {0: 4, 1: 9, 5: 14}
    trace = ngram.run(*asks(media), preempt_at=7, abort=abort)
    left = [one.tokens for number, one in enumerate(expected.answers) if number not in abort]
    assert [one.tokens for one in trace.answers] == left
    assert trace.free_before == trace.free_after
    assert set(ngram.call("leftovers").values()) == {0}
