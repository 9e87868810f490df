# SPDX-License-Identifier: Apache-2.0
"""VideoLLaMA2.1-7B-AV in vLLM against the same checkpoint in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_videollama2
from tests.conftest import Media
from tests.engines import RUNNER_V2, TWO_CORES, TWO_STAGES, Engine
from tests.own_models import OwnModel, assert_like_transformers, layouts, with_policy
from tests.test_engine_lora import write_lora
from tests.test_engine_policies import NO_MEMORY, POLICIES

OPTIONS: dict[str, Any] = {
    "additional_config": {"kv_policy": "acckv"},
    "limit_mm_per_prompt": {"video": 4, "audio": 4},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_videollama2.build(tmp_path_factory.mktemp("videollama2") / "model")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> OwnModel:
    return OwnModel(checkpoint)


def test_every_layout(engine: Engine, own: OwnModel, media: Media) -> None:
    asks = [with_policy(ask, "full") for ask in layouts(media).values()]
    trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own)
    assert len({tuple(answer.tokens) for answer in trace.answers}) == len(asks)


@pytest.mark.parametrize("layout", ["clip with sound", "two clips, one mute"])
def test_every_policy(engine: Engine, own: OwnModel, media: Media, layout: str) -> None:
    ask = layouts(media)[layout]
    asks = [
        with_policy(ask, name, **{"budget": 0.3, **options}) for name, options in POLICIES.values()
    ]
    trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own)
    freed = [min(one["freed_blocks"] for one in layers.values()) for layers in trace.kept.values()]
    assert all(freed)
    assert len(freed) >= len(POLICIES) - len(NO_MEMORY)
    assert trace.free_before == trace.free_after


@pytest.mark.parametrize("scope", ["av", "total"])
@pytest.mark.parametrize("budget", [0.2, 0.1, 160, 120])
def test_budgets_of_the_paper(
    engine: Engine, own: OwnModel, media: Media, budget: float, scope: str
) -> None:
    """Shares, and numbers of tokens: of the audio-video tokens, and of the whole cache."""
    ask = layouts(media)["two clips"]
    asks = [
        with_policy(ask, policy, budget=budget, budget_scope=scope)
        for policy in ("acckv", "h2o", "snapkv", "lookm")
    ]
    trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own)
    assert len(trace.kept) == len(asks)


@pytest.fixture(scope="module")
def busy(checkpoint: Path) -> Iterator[Engine]:
    """Prompts in chunks of 64 tokens, which split every clip and sound; prefix caching; LoRA."""
    options = {"max_num_batched_tokens": 64, "enable_prefix_caching": True}
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}  # 2: see test_engine_lora
    with Engine(checkpoint, **OPTIONS, **options, **lora) as engine:
        yield engine


def test_chunks_and_prefix_cache(busy: Engine, own: OwnModel, media: Media) -> None:
    """The second question about a clip finds it in the cache."""
    asks = [
        with_policy(ask, policy, budget=0.3)
        for ask in (layouts(media)["clip with sound"], layouts(media)["two clips"])
        for policy in ("full", "acckv", "acckv_plus")
    ]
    assert_like_transformers(busy.run(*asks), asks, own)
    again = busy.run(*asks)
    assert_like_transformers(again, asks, own)
    assert all(answer.cached > 150 for answer in again.answers)


def test_lora_on_the_decoder(
    busy: Engine, own: OwnModel, checkpoint: Path, media: Media, tmp_path: Path
) -> None:
    adapter, merged = write_lora(checkpoint, tmp_path, "model.")
    ask = with_policy(layouts(media)["clip with sound"], "acckv", budget=0.3)
    adapted = busy.run(replace(ask, lora=adapter))
    assert_like_transformers(adapted, [ask], OwnModel(merged))
    bare = busy.run(ask)
    assert_like_transformers(bare, [ask], own)
    assert adapted.answers[0].tokens != bare.answers[0].tokens


def test_model_runner_v2(checkpoint: Path, own: OwnModel, media: Media) -> None:
    """vLLM's default on CUDA, with Triton interpreted here."""
    asks = [
        with_policy(layouts(media)[layout], policy, budget=0.3)
        for layout in ("clip with sound", "two clips, one mute")
        for policy in ("full", "acckv", "h2o")
    ]
    with Engine(checkpoint, RUNNER_V2, **OPTIONS) as engine:
        trace = engine.run(*asks)
        assert any("worker.gpu." in module for module in engine.call("runner"))
    assert_like_transformers(trace, asks, own)


@pytest.mark.parametrize("ranks", ["tensor", "pipeline"])
def test_two_ranks(checkpoint: Path, own: OwnModel, media: Media, ranks: str) -> None:
    asks = [
        with_policy(ask, policy, budget=0.3)
        for ask in (layouts(media)["clip with sound"], layouts(media)["clip and recording"])
        for policy in ("full", "acckv", "snapkv")
    ]
    how = {"tensor_parallel_size": 2} if ranks == "tensor" else TWO_STAGES
    with Engine(checkpoint, TWO_CORES, **OPTIONS, **how) as engine:
        trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own, first_heads=True)
