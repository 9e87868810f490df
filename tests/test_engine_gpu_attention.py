# SPDX-License-Identifier: Apache-2.0
"""The attention backends for GPUs, on CPU: TRITON_ATTN in Triton's interpreter, so requests are few
and short, FLASH_ATTN with PyTorch in place of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.conftest import BLOCK_SIZE, LONG_QUESTION, Media, Reference
from tests.engines import RUNNER_V2, Ask, Engine, Trace
from tests.reference import naive_acckv
from tests.test_engine_parity import assert_matches

POLICY = {"additional_config": {"kv_policy": "acckv"}, "enable_prefix_caching": True}
CHUNK = 100
"""Tokens per step: trailing text is split, and other rows decode beside it."""


@pytest.fixture(scope="module")
def on_gpu_backend(start_engine: Callable[..., Engine]) -> Callable[[str], Engine]:
    def start(backend: str) -> Engine:
        return start_engine(RUNNER_V2, **POLICY, max_num_batched_tokens=CHUNK, gpu_backend=backend)

    return start


@pytest.fixture(scope="module")
def cpu(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine({}, **POLICY, max_num_batched_tokens=CHUNK)


def assert_same(trace: Trace, other: Trace) -> None:
    for answer, expected in zip(trace.answers, other.answers, strict=True):
        assert answer.tokens == expected.tokens
        seen = np.isfinite(answer.logprobs) & np.isfinite(expected.logprobs)
        assert np.abs(answer.logprobs[seen] - expected.logprobs[seen]).max() < 1e-3
    assert trace.kept == other.kept_up_to_rounding()
    assert trace.free_before == trace.free_after
    for name in ("compactions", "freed_blocks", "entries", "tokens/video/kept"):
        assert trace.counters.get(name) == pytest.approx(other.counters.get(name))


IMPLEMENTATIONS = {
    "FLASH_ATTN": "KVPolicyFlashAttentionImpl",
    "TRITON_ATTN": "KVPolicyTritonAttentionImpl",
}


@pytest.mark.parametrize(
    ("backend", "layout"),
    [("FLASH_ATTN", "separate"), ("FLASH_ATTN", "interleaved"), ("TRITON_ATTN", "separate")],
)
def test_parity(
    on_gpu_backend: Callable[[str], Engine],
    media: Media,
    reference: Reference,
    backend: str,
    layout: str,
) -> None:
    """Against transformers; tau empties more blocks than planned, of each layer as many as fit."""
    engine = on_gpu_backend(backend)
    assert engine.call("attention") == [IMPLEMENTATIONS[backend]] * 4
    clip = getattr(media, layout)
    xargs = {"kv_budget": 0.5, "kv_tau": 0.9}
    asks = [clip(question=LONG_QUESTION, xargs=xargs, max_tokens=4)]
    trace = engine.run(*asks)
    assert_matches(trace, asks, reference)
    modality = reference.modality(trace.answers[0].prompt)
    _, planned, _ = naive_acckv.naive_plan(modality, 0.5, BLOCK_SIZE)
    assert max(layer["freed_blocks"] for layer in trace.kept["r0"].values()) > planned
    assert trace.free_before == trace.free_after


def test_a_batch(on_gpu_backend: Callable[[str], Engine], cpu: Engine, media: Media) -> None:
    """Policies side by side, rows in prefill beside compacted ones, all preempted in the middle;
    then again with prefix-cache hits. The same as with the attention backend for CPUs."""

    def ask(xargs: dict[str, Any], question: str = "What happens in the clip?") -> Ask:
        return media.separate(question=question, xargs=xargs, max_tokens=4)

    asks = [
        ask({"kv_tau": 0.9, "kv_budget": 0.1}),
        ask({"kv_policy": "full"}),
        ask({"kv_policy": "snapkv"}, LONG_QUESTION),
        ask({"kv_policy_config": '{"head_mode": "head"}'}),
    ]
    gpu = on_gpu_backend("FLASH_ATTN")
    # Which forgets what earlier tests left in the prefix cache.
    options: dict[str, Any] = {"arrive": [0, 0, 2, 3], "preempt_at": 4}
    assert_same(gpu.run(*asks, **options), cpu.run(*asks, **options))
    again, expected = gpu.run(*asks[:2]), cpu.run(*asks[:2])
    assert_same(again, expected)
    cached = [answer.cached for answer in again.answers]
    assert cached == [answer.cached for answer in expected.answers]
    assert min(cached) > 0


def test_policies_whose_layers_differ(
    on_gpu_backend: Callable[[str], Engine], cpu: Engine, media: Media
) -> None:
    """Some layers left alone, layers of different sizes, entries that change, layers decided by
    another one's scores: the same as with the attention backend for CPUs."""
    settings: list[dict[str, Any]] = [
        {"kv_policy": "drop_video", "kv_policy_config": '{"first_layer": 2}'},
        {"kv_policy": "pyramidkv"},
        {"kv_policy": "lookm"},
        {"kv_policy": "fastv", "kv_budget": 0.7},
        {"kv_policy": "random"},
        {"kv_policy_config": '{"preset": "corrected"}'},
    ]
    asks = [
        media.separate(question="What happens in the clip?", xargs=xargs, max_tokens=3)
        for xargs in settings
    ]
    assert_same(on_gpu_backend("FLASH_ATTN").run(*asks), cpu.run(*asks))
