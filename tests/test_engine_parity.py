# SPDX-License-Identifier: Apache-2.0
"""vLLM under AccKV against transformers with an independent implementation of the paper."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import LONG_QUESTION, Media, Reference
from tests.engines import Ask, Engine, Trace

LAYOUTS = ["separate", "interleaved", "two_separate", "two_interleaved"]
BUDGETS = [1.0, 0.5, 0.2, 0.1]
TAUS = [-1.0, 0.6, 0.9]


def asks(media: Media, layout: str, question: str, pairs: list[tuple[float, float]]) -> list[Ask]:
    return [
        getattr(media, layout)(question=question, xargs={"kv_budget": budget, "kv_tau": tau})
        for budget, tau in pairs
    ]


def assert_matches(trace: Trace, requests: list[Ask], reference: Reference, **options) -> None:
    """Every answer has the reference's tokens and log-probabilities, and kept the same."""
    for number, (ask, answer) in enumerate(zip(requests, trace.answers, strict=True)):
        budget = ask.xargs.get("kv_budget", 0.2)
        tau = ask.xargs.get("kv_tau", 0.6)
        prompt, expected = reference.answer(ask, budget, answer.tokens, tau=tau, **options)
        assert answer.prompt == prompt
        difference = np.abs(answer.logprobs - expected.logprobs.numpy()).max()
        assert difference < 1e-3, f"request {number}: budget {budget}, tau {tau}"
        assert answer.tokens == expected.logprobs.argmax(-1).tolist()
        kept = trace.kept.get(f"r{number}", {})
        assert bool(kept) == expected.active
        for layer, selection in zip(kept.values(), expected.selections, strict=True):
            assert layer["freed_blocks"] == selection.f
            assert layer["tokens"] == selection.kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_budget_and_tau(
    acckv: Engine, media: Media, reference: Reference, layout: str
) -> None:
    pairs = [(budget, tau) for budget in BUDGETS for tau in TAUS]
    requests = asks(media, layout, "What happens in the clip?", pairs)
    assert_matches(acckv.run(*requests), requests, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunked_prefill_splits_the_trailing_text(
    acckv_chunked: Engine, media: Media, reference: Reference, layout: str
) -> None:
    pairs = [(budget, tau) for budget in BUDGETS for tau in TAUS]
    requests = asks(media, layout, LONG_QUESTION, pairs)
    trace = acckv_chunked.run(*requests)
    assert_matches(trace, requests, reference)
    assert any(trace.kept.values())


def test_model_runner_v2(acckv_v2: Engine, media: Media, reference: Reference) -> None:
    assert "vllm.v1.worker.gpu.model_runner" in acckv_v2.call("runner")
    requests = [
        ask
        for layout in LAYOUTS
        for ask in asks(media, layout, "What happens in the clip?", [(0.2, 0.6), (0.5, -1.0)])
    ]
    assert_matches(acckv_v2.run(*requests), requests, reference)
