# SPDX-License-Identifier: Apache-2.0
"""vLLM under AccKV against transformers with an independent implementation of the paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import LONG_QUESTION, RUNNERS, Media, Reference, difference
from tests.engines import TWO_CORES, TWO_STAGES, Ask, Engine, Trace

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
        assert difference(answer, expected.logprobs) < 1e-3, (
            f"request {number}: budget {budget}, tau {tau}"
        )
        assert answer.tokens == expected.logprobs.argmax(-1).tolist()
        kept = trace.kept.get(f"r{number}", {})
        assert bool(kept) == expected.active
        for layer, selection in zip(kept.values(), expected.selections, strict=True):
            assert layer["freed_blocks"] == selection.f
            assert layer["video_weight"] == pytest.approx(selection.W_v[:1], abs=1e-4)
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


VARIANTS = {
    "corrected redistribution": {"redistribution": "visible"},
    "no redistribution": {"redistribution": "off"},
    "no focusing": {"focusing": False},
    "no calibration": {"calibration": False},
    "selection per head": {"head_mode": "head"},
    "filter by quantile": {"tau_mode": "quantile", "tau": 0.5},
    "filter by quantile per head": {"tau_mode": "quantile", "tau": 0.5, "head_mode": "head"},
    "budget of the whole prompt": {"budget_scope": "total"},
    "text before the clip dropped": {"keep_prefix": False},
    "everything off": {"redistribution": "off", "focusing": False, "calibration": False},
}


@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_every_option(acckv: Engine, media: Media, reference: Reference, layout: str) -> None:
    requests = [
        getattr(media, layout)(xargs={"kv_budget": 0.3, "kv_policy_config": options})
        for options in VARIANTS.values()
    ]
    trace = acckv.run(*requests)
    for number, options in enumerate(VARIANTS.values()):
        options = {"tau": 0.6, **options}
        if "budget_scope" in options:
            options["scope"] = options.pop("budget_scope")
        answer = trace.answers[number]
        _, expected = reference.answer(requests[number], 0.3, answer.tokens, **options)
        assert expected.active
        assert difference(answer, expected.logprobs) < 1e-3, list(VARIANTS)[number]
        kept = trace.kept[f"r{number}"].values()
        for layer, selection in zip(kept, expected.selections, strict=True):
            assert layer["tokens"] == selection.kept


@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_similarity_before_rotary_embedding(
    acckv: Engine, media: Media, reference: Reference, layout: str
) -> None:
    """Kept sets equal those of the naive filter on keys that transformers un-rotated."""
    config = {"tau_mode": "absolute_pre_rope", "merge_space": "pre_rope", "tau": 0.2}
    ask = getattr(media, layout)(xargs={"kv_policy_config": config})
    expected = reference.selections_before_rope(ask, 0.2, tau=0.2)
    post = acckv.run(getattr(media, layout)(xargs={"kv_tau": 0.2}))
    layers = list(acckv.run(ask).kept["r0"].values())
    assert [layer["tokens"] for layer in layers] == [one.kept for one in expected]
    assert layers != list(post.kept["r0"].values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hazard_19_compress_before_the_last_prompt_token(
    acckv_chunked: Engine, media: Media, reference: Reference, layout: str
) -> None:
    """Here even the first answer token depends on what was kept."""
    config = {"compress_before_last_token": True}
    ask = getattr(media, layout)(question=LONG_QUESTION, xargs={"kv_policy_config": config})
    (answer,) = acckv_chunked.run(ask).answers
    _, expected = reference.answer(ask, 0.2, answer.tokens, hold_back=1, tau=0.6)
    assert expected.active
    assert difference(answer, expected.logprobs[1:]) < 1e-3
    full = acckv_chunked.answer(
        getattr(media, layout)(question=LONG_QUESTION, xargs={"kv_policy": "full"})
    )
    assert np.abs(answer.logprobs[0] - full.logprobs[0]).max() > 1e-2


def test_hazard_11_tensor_parallel_ranks_agree(
    checkpoint: Path,
    start_engine: Callable[..., Engine],
    media: Media,
    reference: Reference,
) -> None:
    """Each rank holds half of the heads; scores, similarities and counts are shared. The tokens are
    those of one rank."""
    ragged = {"head_mode": "head", "tau": 0.2}
    requests = [
        getattr(media, layout)(xargs={"kv_budget": 0.3, "kv_policy_config": options})
        for layout in ("separate", "two_interleaved")
        for options in ({"tau": -1.0}, {"tau": 0.2}, ragged)
    ]
    # Its clip is in the prefix cache then, and the blocks that it rewrites are copies.
    other = media.separate(question="And now?", xargs={"kv_budget": 0.3, "kv_tau": -1.0})
    with Engine(
        checkpoint,
        TWO_CORES,
        additional_config={"kv_policy": "acckv"},
        enable_prefix_caching=True,
        tensor_parallel_size=2,
    ) as engine:
        trace = engine.run(*requests)
        again = engine.answer(other)
    for number, (ask, answer) in enumerate(zip(requests, trace.answers, strict=True)):
        options = ask.xargs["kv_policy_config"]
        _, expected = reference.answer(ask, 0.3, answer.tokens, **options)
        assert expected.active
        assert difference(answer, expected.logprobs) < 1e-3, number
    assert again.cached > 0.7 * len(again.prompt)
    _, expected = reference.answer(other, 0.3, again.tokens, tau=-1.0)
    assert difference(again, expected.logprobs) < 1e-3
    one = start_engine({}, additional_config={"kv_policy": "acckv"}).run(*requests, other)
    assert [*(answer.tokens for answer in trace.answers), again.tokens] == [
        answer.tokens for answer in one.answers
    ]


def test_pipeline_stages(
    checkpoint: Path,
    start_engine: Callable[..., Engine],
    media: Media,
    reference: Reference,
) -> None:
    """Two stages with half of the layers each; their counts add up. The tokens are those of one."""
    requests = [media.separate(), media.two_interleaved(xargs={"kv_tau": -1.0})]
    other = media.separate(question="And now?")
    with Engine(
        checkpoint,
        TWO_CORES,
        additional_config={"kv_policy": "acckv"},
        enable_prefix_caching=True,
        **TWO_STAGES,
    ) as engine:
        trace = engine.run(*requests)
        again = engine.answer(other)
    assert again.cached > 0.7 * len(again.prompt)
    one = start_engine({}, additional_config={"kv_policy": "acckv"}).run(*requests, other)
    answers = [*trace.answers, again]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in one.answers]
    for ask, answer in zip([*requests, other], answers, strict=True):
        tau = ask.xargs.get("kv_tau", 0.6)
        _, expected = reference.answer(ask, 0.2, answer.tokens, tau=tau)
        assert difference(answer, expected.logprobs) < 1e-3
    tokens = sum(code != 0 for one in trace.answers for code in reference.modality(one.prompt))
    assert trace.counters["compactions"] == 2
    counted = [
        value
        for name, value in trace.counters.items()
        if name.startswith(("tokens/video/", "tokens/audio/"))
    ]
    assert sum(counted) == pytest.approx(tokens)


def test_the_runners_are_v1_and_v2(start_engine: Callable[..., Engine]) -> None:
    modules = {
        name: start_engine(environment, additional_config={"kv_policy": "acckv"}).call("runner")
        for name, environment in RUNNERS.items()
    }
    assert "vllm.v1.worker.gpu_model_runner" in modules["V1"]
    assert "vllm.v1.worker.gpu.model_runner" in modules["V2"]
