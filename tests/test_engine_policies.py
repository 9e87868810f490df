# SPDX-License-Identifier: Apache-2.0
"""Every policy inside vLLM against the same policy on transformers' own model.

The policies themselves are checked against independent oracles elsewhere; here the question is
whether paged blocks, chunks, ranks and stages see the attention and keep the entries that the
Hugging Face runner does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import BLOCK_SIZE, LONG_QUESTION, Media, Reference, difference
from tests.engines import TWO_CORES, TWO_STAGES, Ask, Engine, Trace
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

# The tiny model has four layers, so that two of them full leave no room for 30 %.
FASTV = {"first_pruned_layer": 1, "budget": 0.4}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "acckv": ("acckv", {}),
    "acckv, corrected": ("acckv", {"preset": "corrected", "tau": 0.2}),
    "acckv, strict": ("acckv", {"strict_budget": "entries", "filter_merged": False, "tau": 0.3}),
    "acckv, some kept": ("acckv", {"min_keep_low": 5, "min_per_modality": False, "tau": 0.9}),
    "position_prior": ("position_prior", {"tau": 0.1}),
    "acckv_plus": ("acckv_plus", {}),
    "acckv_plus, by layer": ("acckv_plus", {"head_mode": "layer", "coverage": 0.4}),
    "cross_merge": ("cross_merge", {}),
    "cross_merge, evict": ("cross_merge", {"unimportant": "evict"}),
    "cross_merge, nearest": ("cross_merge", {"unimportant": "nearest"}),
    "h2o": ("h2o", {}),
    "h2o, text kept": ("h2o", {"protect_text": True, "normalize": True, "recent_ratio": 0.25}),
    "snapkv": ("snapkv", {}),
    "snapkv, wide window": ("snapkv", {"window": 100, "kernel": 7, "pooling": "max"}),
    "snapkv, text kept": ("snapkv", {"protect_text": True, "window": 8, "budget_scope": "total"}),
    "pyramidkv": ("pyramidkv", {"window": 8, "beta": 8}),
    "pyramidkv, text kept": ("pyramidkv", {"protect_text": True, "window": 8, "beta": 4}),
    "lookm": ("lookm", {}),
    "lookm, average": ("lookm", {"merge": "average", "recent_ratio": 0.1}),
    "lookm, weighted": ("lookm", {"merge": "weighted"}),
    "fastv": ("fastv", FASTV),
    "fastv, as the authors count": ("fastv", {"equalize": False}),
    "streaming": ("streaming", {}),
    "recent": ("recent", {}),
    "random": ("random", {"seed": 3}),
    "random, text or not": ("random", {"protect_text": False}),
    "drop_audio": ("drop_audio", {"budget": 1.0}),
    "drop_audio in high layers": ("drop_audio", {"budget": 0.2, "first_layer": 2}),
    "drop_video": ("drop_video", {"budget": 1.0}),
}
# Layers below K keep all, so no block is free for all layers.
NO_MEMORY = {"fastv", "fastv, as the authors count", "drop_audio in high layers"}


def requests_for(media: Media, layout: str, cases: list[str], **kwargs: Any) -> list[Ask]:
    asks = []
    for case in cases:
        name, options = POLICIES[case]
        xargs = {"kv_policy": name, "kv_policy_config": {"budget": 0.3, **options}}
        asks.append(getattr(media, layout)(xargs=xargs, **kwargs))
    return asks


def assert_like_transformers(trace: Trace, asks: list[Ask], reference: Reference) -> None:
    for number, (ask, answer) in enumerate(zip(asks, trace.answers, strict=True)):
        settings = {"policy": ask.xargs["kv_policy"], **ask.xargs["kv_policy_config"]}
        prompt, logprobs, layers = reference.run_policy(ask, settings, answer.tokens)
        assert answer.prompt == prompt
        assert difference(answer, logprobs) < 1e-3, settings
        kept = trace.kept.get(f"r{number}", {})
        assert kept, settings
        for name, layer in kept.items():
            assert layer["tokens"] == layers[int(name.split(".")[-3])], (settings, name)


@pytest.mark.parametrize("layout", ["separate", "interleaved", "two_interleaved"])
def test_every_policy(acckv: Engine, media: Media, reference: Reference, layout: str) -> None:
    asks = requests_for(media, layout, list(POLICIES))
    trace = acckv.run(*asks)
    assert_like_transformers(trace, asks, reference)
    assert trace.free_before == trace.free_after


@pytest.mark.parametrize("layout", ["two_separate", "interleaved"])
def test_every_policy_in_chunks(
    acckv_chunked: Engine, media: Media, reference: Reference, layout: str
) -> None:
    """H2O and LOOK-M add up rows of every chunk, FastV takes the last row of one layer."""
    asks = requests_for(media, layout, list(POLICIES), question=LONG_QUESTION)
    assert_like_transformers(acckv_chunked.run(*asks), asks, reference)


def test_what_comes_back_and_what_is_counted(
    acckv: Engine, media: Media, reference: Reference
) -> None:
    """Blocks, counters and log lines of each policy, text included."""
    for case, (name, _) in POLICIES.items():
        (ask,) = requests_for(media, "long_separate", [case])
        trace = acckv.run(ask)
        layers = list(trace.kept["r0"].values())
        modality = np.array(reference.modality(trace.answers[0].prompt))
        blocks = -(-(len(modality) + 1) // BLOCK_SIZE)  # with the first token of the answer
        freed = blocks - trace.held[1]["r0"]
        all_layers = [one["freed_blocks"] for one in layers] + [0] * (4 - len(layers))
        if name in ("acckv", "position_prior"):  # blocks are freed before the filter is known
            assert 0 < freed <= min(all_layers), case
        else:
            assert freed == min(all_layers), case
        assert (freed == 0) == (case in NO_MEMORY), case
        assert f"freed {freed} of " in trace.log[-1]
        for code, label in ((TEXT, "text"), (VIDEO, "video"), (AUDIO, "audio")):
            counted = [
                trace.counters[f"tokens/{label}/{fate}"] for fate in ("kept", "merged", "evicted")
            ]
            assert sum(counted) == pytest.approx((modality == code).sum()), case
            full = (modality == code).sum() * (4 - len(layers))
            kept = sum(
                np.mean([(modality[head] == code).sum() for head in one["tokens"]])
                for one in layers
            )
            assert counted[0] == pytest.approx((kept + full) / 4), case
        assert ("text kept" in trace.log[-1]) == (counted_text_evicted(trace) > 0), case


def counted_text_evicted(trace: Trace) -> float:
    return trace.counters["tokens/text/evicted"]


@pytest.mark.parametrize("case", ["snapkv", "snapkv, wide window", "h2o", "lookm", "streaming"])
def test_prefix_cache_hits_end_at_the_first_observed_row(
    runner: dict[str, str], start_engine: Callable[..., Engine], media: Media, case: str
) -> None:
    """The second request is answered like the first, though some of its rows were not computed."""
    engine = start_engine(
        runner, additional_config={"kv_policy": "acckv"}, enable_prefix_caching=True
    )
    assert engine.call("reset_prefix_cache")
    (ask,) = requests_for(media, "separate", [case])
    first, second = engine.run(ask), engine.run(ask)
    assert second.kept == first.kept
    assert second.answers[0].tokens == first.answers[0].tokens
    assert np.abs(second.answers[0].logprobs - first.answers[0].logprobs).max() < 1e-4


def test_ranks_agree(checkpoint: Path, media: Media, reference: Reference) -> None:
    asks = requests_for(media, "separate", list(POLICIES))
    with Engine(
        checkpoint,
        TWO_CORES,
        additional_config={"kv_policy": "acckv"},
        tensor_parallel_size=2,
    ) as engine:
        trace = engine.run(*asks)
    for number, (ask, answer) in enumerate(zip(asks, trace.answers, strict=True)):
        settings = {"policy": ask.xargs["kv_policy"], **ask.xargs["kv_policy_config"]}
        _, logprobs, layers = reference.run_policy(ask, settings, answer.tokens)
        assert difference(answer, logprobs) < 1e-3, settings
        for name, layer in trace.kept[f"r{number}"].items():  # of rank 0
            assert layer["tokens"] == layers[int(name.split(".")[-3])][: len(layer["tokens"])]


def test_stages_know_their_layers(checkpoint: Path, media: Media, reference: Reference) -> None:
    cases = [case for case, (name, _) in POLICIES.items() if name != "fastv"]
    asks = requests_for(media, "separate", cases)
    with Engine(
        checkpoint,
        TWO_CORES,
        additional_config={"kv_policy": "pyramidkv"},
        **TWO_STAGES,
    ) as engine:
        trace = engine.run(*asks)
        with pytest.raises(RuntimeError, match="fastv does not work with pipeline parallelism"):
            engine.run(*requests_for(media, "separate", ["fastv"]))
    for ask, answer in zip(asks, trace.answers, strict=True):
        settings = {"policy": ask.xargs["kv_policy"], **ask.xargs["kv_policy_config"]}
        _, logprobs, _ = reference.run_policy(ask, settings, answer.tokens)
        assert difference(answer, logprobs) < 1e-3, settings
