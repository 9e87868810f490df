# SPDX-License-Identifier: Apache-2.0
"""Copies of prompt blocks: made only where there is room, and not at all where switched off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import BLOCK_SIZE, Media, Reference
from tests.engines import Engine
from tests.reference import naive_acckv
from tests.test_engine_prefix_caching import FULL, assert_reference, assert_stock, reusable


@pytest.fixture(scope="module")
def tight(checkpoint: Path) -> Iterator[Engine]:
    """Room for the prompt of ``media.separate`` and its answer, but not for copies beside it."""
    with Engine(
        checkpoint,
        additional_config={"kv_policy": "acckv"},
        enable_prefix_caching=True,
        num_gpu_blocks_override=8,
        max_model_len=220,
    ) as engine:
        yield engine


def test_no_request_waits_for_room_to_copy(
    tight: Engine, stock: Engine, media: Media, reference: Reference
) -> None:
    """Where copies do not fit, the hit ends where the request's own blocks begin."""
    full = media.separate(xargs=FULL, max_tokens=10)
    assert_stock(tight.run(full), stock, full)
    ask = media.separate(xargs={"kv_budget": 0.5}, max_tokens=10)
    trace = tight.run(ask)
    assert_reference(trace, reference, ask)
    (answer,) = trace.answers
    _, freed, _ = naive_acckv.naive_plan(reference.modality(answer.prompt), 0.5, BLOCK_SIZE)
    assert 0 < answer.cached == freed * BLOCK_SIZE < reusable(reference, answer.prompt)
    both = [ask, media.separate(question="And now?", max_tokens=10)]
    trace = tight.run(*both)
    assert_reference(trace, reference, *both)
    assert trace.free_before == trace.free_after


def test_copies_can_be_switched_off(checkpoint: Path, media: Media, reference: Reference) -> None:
    """Then only the blocks that no compaction rewrites are found again."""
    config = {"kv_policy": "acckv", "kv_policy_prefix_copies": False}
    with Engine(checkpoint, additional_config=config, enable_prefix_caching=True) as engine:
        engine.run(media.separate())
        ask = media.separate(question="And now?")
        trace = engine.run(ask)
        assert_reference(trace, reference, ask)
        modality = reference.modality(trace.answers[0].prompt)
        _, freed, _ = naive_acckv.naive_plan(modality, 0.2, BLOCK_SIZE)
        assert 0 < trace.answers[0].cached <= freed * BLOCK_SIZE
