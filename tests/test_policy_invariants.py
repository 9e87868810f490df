# SPDX-License-Identifier: Apache-2.0
"""What every policy promises, over one table of policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Compacted, Layer, Policy, Prompt
from vllm_acckv.policies.compression import Compressed
from vllm_acckv.scores import observed_attention
from vllm_acckv.selection import Selection
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import DenseStates

Case = tuple[str, str, dict[str, Any]]

# One row per policy and interesting setting: id, name, options.
CASES: list[Case] = [
    ("acckv", "acckv", {}),
    ("acckv-paper", "acckv", {"preset": "paper", "tau": 0.9}),
    ("acckv-corrected", "acckv", {"preset": "corrected"}),
    ("acckv-head", "acckv", {"head_mode": "head"}),
    ("acckv-quantile", "acckv", {"tau_mode": "quantile", "tau": 0.5}),
    (
        "acckv-head-quantile",
        "acckv",
        {"preset": "corrected", "head_mode": "head", "tau_mode": "quantile", "tau": 0.3},
    ),
    ("acckv-no-redistribution", "acckv", {"redistribution": "off"}),
    ("acckv-no-focusing", "acckv", {"focusing": False}),
    ("acckv-no-calibration", "acckv", {"calibration": False}),
    ("acckv-no-calibration-head", "acckv", {"calibration": False, "head_mode": "head"}),
    ("acckv-no-prefix", "acckv", {"keep_prefix": False}),
    ("acckv-no-minimum", "acckv", {"min_per_modality": False}),
    ("acckv-strict-tokens", "acckv", {"strict_budget": "tokens"}),
    ("acckv-strict-entries", "acckv", {"strict_budget": "entries"}),
    ("acckv-keep-low", "acckv", {"tau": 1, "min_keep_low": 2, "filter_merged": False}),
    ("acckv-plus", "acckv_plus", {}),
    ("acckv-plus-layer", "acckv_plus", {"head_mode": "layer", "coverage": 0.3}),
    ("acckv-plus-total", "acckv_plus", {"budget_scope": "total", "coverage": 0.75}),
    ("cross-merge", "cross_merge", {}),
    ("cross-merge-evict", "cross_merge", {"unimportant": "evict", "budget_scope": "total"}),
    ("cross-merge-nearest", "cross_merge", {"unimportant": "nearest", "redistribution": "off"}),
    ("drop-audio", "drop_audio", {"budget": 1.0}),
    ("drop-audio-budget", "drop_audio", {}),
    ("drop-video-budget", "drop_video", {"budget_scope": "total"}),
    ("drop-video-high-layers", "drop_video", {"budget": 1.0, "first_layer": 5}),
    ("fastv", "fastv", {}),
    ("fastv-literal", "fastv", {"equalize": False, "first_pruned_layer": 1}),
    ("full", "full", {}),
    ("h2o", "h2o", {}),
    ("h2o-total", "h2o", {"budget_scope": "total", "recent_ratio": 0.25}),
    ("h2o-text", "h2o", {"protect_text": True}),
    ("h2o-normalized", "h2o", {"normalize": True}),
    ("lookm", "lookm", {}),
    ("lookm-average", "lookm", {"merge": "average", "budget_scope": "total"}),
    ("lookm-weighted", "lookm", {"merge": "weighted"}),
    ("lookm-none", "lookm", {"merge": "none"}),
    ("position-prior", "position_prior", {}),
    ("pyramidkv", "pyramidkv", {"window": 2, "kernel": 7, "pooling": "max"}),
    ("pyramidkv-text", "pyramidkv", {"window": 2, "protect_text": True}),
    ("random", "random", {}),
    ("random-text", "random", {"protect_text": False, "seed": 7}),
    ("recent", "recent", {}),
    ("snapkv", "snapkv", {"window": 4}),
    ("snapkv-max", "snapkv", {"window": 3, "kernel": 3, "pooling": "max"}),
    ("snapkv-total", "snapkv", {"window": 4, "budget_scope": "total"}),
    ("snapkv-text", "snapkv", {"window": 4, "protect_text": True}),
    ("streaming", "streaming", {"budget_scope": "total"}),
]
LAYER = Layer(3, 10)
HEADS, WIDTH = 4, 8

T, V, A = [TEXT], [VIDEO], [AUDIO]
# (video tokens, audio tokens, trailing text) -> modalities
LAYOUTS: dict[str, Callable[[int, int, int], list[int]]] = {
    "contiguous": lambda v, a, t: T * 3 + V * v + A * a + T * t,
    "interleaved": lambda v, a, t: T * 2 + (V * 2 + A) * a + T + (A + V) * v + T * t,
    "video_only": lambda v, a, t: T + V * v + T * 2 + V * a + T * t,
    "audio_only": lambda v, a, t: T + A * v + T * 2 + A * a + T * t,
    "no_av": lambda v, a, t: T * (v + a + t),
    "no_trailing_text": lambda v, a, t: T * t + V * v + A * a,
}
# sizes, dtype, KV heads for 4 query heads, all keys equal
VARIANTS = [
    ((11, 8, 5), torch.float32, 2, False),
    ((5, 12, 1), torch.bfloat16, 4, False),
    ((1, 1, 3), torch.float32, 4, False),
    ((3, 9, 6), torch.bfloat16, 2, True),
    ((12, 12, 4), torch.float32, 2, True),
]

over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)


_made: dict[str, Policy] = {}


def make(name: str, **options: Any) -> Policy:
    """:func:`make_policy`, which looks for installed policies, once per setting."""
    key = repr((name, options))
    if key not in _made:
        _made[key] = make_policy(name, **options)
    return _made[key]


def made(case: Case, **overrides: Any) -> Policy:
    """The policy of a row; a budget of 0.4 unless the row has its own."""
    _, name, options = case
    return make(name, **{"budget": 0.4, **options, **overrides})


def keeping_all(case: Case) -> dict[str, Any]:
    """What switches AccKV's filter off."""
    if case[1] not in ("acckv", "position_prior"):
        return {}
    return {"tau": 0 if case[2].get("tau_mode") == "quantile" else -1}


def keeps_text(policy: Policy) -> bool:
    return policy.name != "streaming" and getattr(policy, "protect_text", True)


def merges_into_tokens(policy: Policy) -> bool:
    nearest = getattr(policy, "unimportant", "evict") == "nearest"
    return nearest or getattr(policy, "merge", "none") != "none"


class Sample:
    """Random queries, keys and values of one layer of one prompt."""

    def __init__(
        self,
        modality: list[int],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        kv_heads: int = 2,
        equal_keys: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        length = len(modality)
        self.queries = normal(HEADS, length, WIDTH)
        self.keys = normal(kv_heads, length, WIDTH) + normal(kv_heads, 1, WIDTH)
        if equal_keys:
            self.keys = self.keys[:, :1].expand_as(self.keys).contiguous()
        self.values = normal(kv_heads, length, WIDTH)
        self.modality = torch.tensor(modality, dtype=torch.int8)
        self.layout = Layout(self.modality.numpy())
        self.angles = torch.rand(length, WIDTH // 2, generator=generator) * 6
        self.prompt = Prompt(self.layout, self.modality, self.angles)

    def scores(self, policy: Policy) -> torch.Tensor:
        first = policy.first_query(self.layout)
        rows = self.queries[:, first:].movedim(0, 1)
        scale, weights = WIDTH**-0.5, policy.weights(self.layout, self.keys.device)
        return observed_attention(rows, self.keys, first, scale, weights)

    def select(self, policy: Policy, scores: torch.Tensor | None = None) -> Selection:
        scores = self.scores(policy) if scores is None else scores
        return policy.select(scores, DenseStates(self.keys, self.values), self.prompt, LAYER)

    def compact(
        self, policy: Policy, scores: torch.Tensor, block_size: int = 1, wait: bool = True
    ) -> Compacted:
        states = (scores, self.keys, self.values)
        return policy.compact(*states, self.prompt, LAYER, block_size, wait)

    def compress(self, policy: Policy, **options: Any) -> Compressed:
        defaults = {"layer": LAYER.index, "num_layers": LAYER.count, "angles": self.angles}
        return policy.compress(
            self.queries, self.keys, self.values, self.modality, **{**defaults, **options}
        )


def samples(*layouts: str) -> list[Sample]:
    return [
        Sample(LAYOUTS[layout](*sizes), seed, dtype, kv_heads, equal_keys)
        for layout in layouts
        for seed, (sizes, dtype, kv_heads, equal_keys) in enumerate(VARIANTS)
    ]


def decides(policy: Policy, sample: Sample) -> bool:
    """Whether the policy accepts the prompt at all."""
    layout = sample.layout
    return not (policy.needs_trailing_text(layout) and layout.av and not layout.trailing_text)


def per_head(out: Compressed | Compacted, kv_heads: int) -> list[list[int]]:
    """Positions of the tokens that every head keeps."""
    rows = out.positions.expand(kv_heads, -1).tolist()
    return [[position for position in row if position >= 0] for row in rows]


def same(left: Compressed, right: Compressed) -> bool:
    return (
        torch.equal(left.keys, right.keys)
        and torch.equal(left.values, right.values)
        and torch.equal(left.positions, right.positions)
        and left.stats == right.stats
    )


# Every policy


@over_layouts
@over_cases
def test_entries_are_well_formed(case: Case, layout: str) -> None:
    policy = made(case)
    for sample in samples(layout):
        if decides(policy, sample):
            check_entries(policy, sample)
            continue
        with pytest.raises(ValueError, match="modality has no text after its last audio-video"):
            sample.compress(policy)


def check_entries(policy: Policy, sample: Sample) -> None:
    out = sample.compress(policy)
    kv_heads, length, _ = sample.keys.shape
    entries = out.keys.shape[1]
    assert out.keys.shape == out.values.shape == (kv_heads, entries, WIDTH)
    assert out.positions.shape in {(1, entries), (kv_heads, entries)}
    assert out.keys.dtype == out.values.dtype == sample.keys.dtype
    assert out.keys.isfinite().all() and out.values.isfinite().all()
    if sample.layout.av:
        assert entries <= policy.entries(sample.layout, LAYER) <= length
    text = set((sample.modality == TEXT).nonzero().flatten().tolist())
    if not getattr(policy, "keep_prefix", True):
        text = {position for position in text if position >= sample.layout.text_start}
    for head, kept in enumerate(per_head(out, kv_heads)):
        assert kept == sorted(set(kept))
        assert text <= set(kept) or not keeps_text(policy)
        if merges_into_tokens(policy) and entries < length:
            continue
        tokens = out.positions.expand(kv_heads, -1)[head] >= 0
        assert torch.equal(out.keys[head, tokens], sample.keys[head, kept])
        assert torch.equal(out.values[head, tokens], sample.values[head, kept])
    fates = (out.stats.kept, out.stats.merged, out.stats.evicted)
    assert sum(sum(fate.values()) for fate in fates) == pytest.approx(length)


@over_cases
@settings(max_examples=8, deadline=None)
@given(
    layout=st.sampled_from(["contiguous", "interleaved", "video_only", "audio_only"]),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6)),
    budget=st.floats(0.01, 1.0) | st.integers(2, 30),
    scope=st.sampled_from(["av", "total"]),
    seed=st.integers(0, 99),
)
def test_no_budget_is_exceeded(
    case: Case, layout: str, sizes: tuple[int, int, int], budget: float, scope: str, seed: int
) -> None:
    policy = made(case, budget=budget, budget_scope=scope)
    try:
        policy.check(LAYER.count)
    except ValueError:
        return
    check_entries(policy, Sample(LAYOUTS[layout](*sizes), seed))


@over_cases
def test_filling_whole_blocks_only_adds_tokens(case: Case) -> None:
    policy = made(case)
    for number, sample in enumerate(samples(*LAYOUTS)):
        if not decides(policy, sample):
            continue
        block_size = 2 + number % 7
        out, filled = sample.compress(policy), sample.compress(policy, block_size=block_size)
        kv_heads, length, _ = sample.keys.shape
        entries = filled.keys.shape[1]
        assert entries >= out.keys.shape[1]
        assert (length - entries) % block_size == 0
        for few, more in zip(per_head(out, kv_heads), per_head(filled, kv_heads), strict=True):
            assert set(few) <= set(more)
        if entries == length:
            assert torch.equal(filled.keys, sample.keys)
            assert torch.equal(filled.values, sample.values)


def padded(sample: Sample, garbage: float) -> dict[str, torch.Tensor]:
    """Arguments with three tokens of left padding."""

    def pad(tensor: torch.Tensor, dim: int, filling: float) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[dim] = 3
        return torch.cat([tensor.new_full(shape, filling), tensor], dim)

    return {
        "queries": pad(sample.queries, 1, garbage),
        "keys": pad(sample.keys, 1, garbage),
        "values": pad(sample.values, 1, garbage),
        "modality": pad(sample.modality, 0, -1),
        "angles": pad(sample.angles, 0, garbage),
    }


@over_cases
def test_left_padding_changes_nothing(case: Case) -> None:
    policy = made(case)
    for sample in samples(*LAYOUTS):
        if not decides(policy, sample):
            continue
        out = sample.compress(policy)
        options = {"layer": LAYER.index, "num_layers": LAYER.count}
        shifted = policy.compress(**padded(sample, 1e4), **options)
        assert torch.equal(shifted.positions, torch.where(out.positions < 0, -1, out.positions + 3))
        torch.testing.assert_close(shifted.keys, out.keys)
        torch.testing.assert_close(shifted.values, out.values)
        assert shifted.stats.kept == out.stats.kept


def test_left_padding_may_hold_nan() -> None:
    """Rows that may attend to nothing come out of softmax as NaN."""
    sample = Sample(LAYOUTS["contiguous"](9, 7, 4))
    policy = make("acckv")
    out = policy.compress(**padded(sample, torch.nan))
    torch.testing.assert_close(out.keys, sample.compress(policy).keys)


@over_cases
def test_equal_calls_and_representations_agree(case: Case) -> None:
    """A second call, and the same numbers behind other strides, dtypes and observed before."""
    policy = made(case)
    for sample in samples("interleaved"):
        out = sample.compress(policy)
        assert same(out, sample.compress(policy))
        assert same(out, sample.compress(policy, scores=sample.scores(policy)))
        strided = Sample(sample.modality.tolist())
        strided.queries, strided.keys, strided.values = (
            states.transpose(0, 1).contiguous().transpose(0, 1)
            for states in (sample.queries, sample.keys, sample.values)
        )
        strided.modality, strided.angles = sample.modality.long(), sample.angles
        again = strided.compress(policy)
        assert torch.equal(out.positions, again.positions)
        torch.testing.assert_close(out.keys, again.keys)
        torch.testing.assert_close(out.values, again.values)


@over_cases
@pytest.mark.parametrize("block_size", [None, 1, 4])
def test_without_audio_and_video_the_cache_is_untouched(case: Case, block_size: int | None) -> None:
    for sample in samples("no_av"):
        out = sample.compress(made(case), block_size=block_size)
        assert torch.equal(out.keys, sample.keys) and torch.equal(out.values, sample.values)
        assert out.positions.tolist() == [list(range(sample.layout.length))]


# What the others leave out is no matter of budget.
BY_BUDGET = [
    case
    for case in CASES
    if case[0] not in ("acckv-no-prefix", "drop-audio", "drop-audio-budget", "drop-video-budget")
]


@pytest.mark.parametrize("case", BY_BUDGET, ids=lambda case: case[0])
def test_budget_for_everything_is_the_full_cache(case: Case) -> None:
    policy = made(case, budget=1.0, **keeping_all(case))
    for sample in samples("contiguous", "interleaved", "video_only", "audio_only"):
        out = sample.compress(policy)
        assert torch.equal(out.keys, sample.keys) and torch.equal(out.values, sample.values)
        assert out.positions.tolist() == [list(range(sample.layout.length))]


BY_POSITION = ("random", "recent", "streaming", "position_prior")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[1] not in BY_POSITION], ids=lambda case: case[0]
)
@pytest.mark.parametrize("layout", ["contiguous", "interleaved", "video_only", "audio_only"])
def test_lowest_positions_win_ties(case: Case, layout: str) -> None:
    """Nothing is attended to, all keys are equal: earlier tokens stay, modality by modality."""
    by_attention = {"h2o": {"recent_ratio": 0}, "lookm": {"recent_ratio": 0}}
    heavy = {**by_attention, "acckv_plus": {"coverage": 0}}.get(case[1], {})
    policy = made(case, **keeping_all(case), **heavy)
    sample = Sample(LAYOUTS[layout](9, 7, 4), equal_keys=True)
    out = sample.compress(policy, scores=torch.zeros(2, sample.layout.length))
    for kept in per_head(out, 2):
        for kind in (TEXT, VIDEO, AUDIO):
            tokens = np.flatnonzero(sample.layout.modalities == kind)
            tokens = tokens[tokens < sample.layout.text_start].tolist()
            if kind == TEXT and not getattr(policy, "keep_prefix", True):
                tokens = []
            mine = [position for position in kept if position in tokens]
            assert mine == tokens[: len(mine)]


@pytest.mark.parametrize("name", ["h2o", "snapkv", "acckv", "random", "recent", "fastv", "lookm"])
@pytest.mark.parametrize("scope", ["av", "total"])
@settings(max_examples=15, deadline=None)
@given(budget=st.floats(0.3, 1.0) | st.integers(25, 60))
def test_equal_budgets_make_equal_sizes(name: str, scope: str, budget: float) -> None:
    """Text-protecting policies that merge nothing; the budget has room for the text."""
    options: dict[str, Any] = {
        "h2o": {"protect_text": True},
        "snapkv": {"protect_text": True, "window": 4},
        "acckv": {"calibration": False},
        "fastv": {"equalize": False},
        "lookm": {"merge": "none"},
    }.get(name, {})
    policy = make_policy(name, budget=budget, budget_scope=scope, **options)
    sample = Sample(LAYOUTS["contiguous"](26, 20, 4))
    whole = 46 if scope == "av" else 53
    count = int(budget) if budget > 1 else int(budget * whole + 0.5)
    expected = 7 + min(count, 46) if scope == "av" else min(count, 53)
    assert sample.compress(policy).keys.shape[1] == expected


def test_rows_of_the_table_are_distinct() -> None:
    assert len({case[0] for case in CASES}) == len(CASES)
    assert len({repr(made(case)) for case in CASES}) == len(CASES)
