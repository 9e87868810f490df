# SPDX-License-Identifier: Apache-2.0
"""The baselines against their naive forms, examples by hand, and their invariants.

Numbers of invariants are those of the algorithm specification.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import naive_baselines as naive
from tests.test_policy_invariants import LAYOUTS, WIDTH, Sample, per_head
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Layer, Policy
from vllm_acckv.policies.compression import Compressed
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

LAYERS = 10
# Decisions closer than this may fall otherwise in float32.
CLEAR = 1e-5

prompts = st.builds(
    lambda runs, tail: [kind for kind, count in runs for _ in range(count)] + [TEXT] * tail,
    st.lists(
        st.tuples(st.sampled_from([TEXT, VIDEO, AUDIO]), st.integers(1, 9)), min_size=1, max_size=6
    ),
    st.integers(1, 6),
).filter(any)
samples = st.builds(Sample, prompts, seed=st.integers(0, 99), kv_heads=st.sampled_from([1, 2, 4]))
budgets = st.fixed_dictionaries(
    {
        "budget": st.floats(0.05, 1.0) | st.integers(2, 40),
        "budget_scope": st.sampled_from(["av", "total"]),
    }
)
ratios = st.sampled_from([0, 0.25, 0.5, 0.75, 1])
flags = st.booleans()
examples = settings(max_examples=60, deadline=None)


def attention(sample: Sample) -> Tensor:
    return naive.full_attention(sample.queries, sample.keys, WIDTH**-0.5)


def arguments(sample: Sample, budget: dict[str, Any]) -> tuple[int, list[int], int]:
    """KV heads, modality and capacity, as the naive forms take them."""
    modality = sample.modality.tolist()
    capacity = naive.capacity_of(modality, budget["budget"], budget["budget_scope"])
    return len(sample.keys), modality, capacity


def assert_kept(sample: Sample, out: Compressed, kept: list[list[int]]) -> None:
    """The same tokens in every head (or in all of them), untouched."""
    heads = len(sample.keys)
    kept = kept * (heads // len(kept))
    assert per_head(out, heads) == kept
    for head, positions in enumerate(kept):
        assert torch.equal(out.keys[head], sample.keys[head, positions])
        assert torch.equal(out.values[head], sample.values[head, positions])


def kept_sets(policy: Policy, sample: Sample, **options: Any) -> list[set[int]]:
    out = sample.compress(policy, **options)
    assert out.positions.min() >= 0
    return [set(kept) for kept in per_head(out, len(sample.keys))]


@examples
@given(samples, budgets, ratios, flags, flags)
def test_h2o_is_naive_h2o(
    sample: Sample, budget: dict[str, Any], ratio: float, normalize: bool, protect: bool
) -> None:
    options = {"recent_ratio": ratio, "normalize": normalize, "protect_text": protect}
    expected = naive.h2o(attention(sample), *arguments(sample, budget), **options)
    if expected.gap > CLEAR:
        policy = make_policy("h2o", **budget, **options)
        assert_kept(sample, sample.compress(policy), expected.kept)


@examples
@given(
    samples,
    budgets,
    st.integers(1, 12),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from(["average", "max"]),
    flags,
)
def test_snapkv_is_naive_snapkv(
    sample: Sample, budget: dict[str, Any], window: int, kernel: int, pooling: str, protect: bool
) -> None:
    options = {"window": window, "kernel": kernel, "pooling": pooling, "protect_text": protect}
    expected = naive.snapkv(attention(sample), *arguments(sample, budget), **options)
    if expected.gap > CLEAR:
        policy = make_policy("snapkv", **budget, **options)
        assert_kept(sample, sample.compress(policy), expected.kept)


@examples
@given(samples, budgets, st.integers(1, 8), st.integers(1, 30), st.integers(0, LAYERS - 1))
def test_pyramidkv_is_naive_snapkv_with_its_caps(
    sample: Sample, budget: dict[str, Any], window: int, beta: int, layer: int
) -> None:
    policy = make_policy("pyramidkv", **budget, window=window, beta=beta)
    heads, modality, capacity = arguments(sample, budget)
    caps = naive.pyramidkv_caps(len(modality), capacity, window, beta, LAYERS)
    size = policy.entries(sample.layout, Layer(layer, LAYERS))
    assert abs(size - caps[layer]) <= Fraction(1, 2) + Fraction(1, 10**9)
    expected = naive.snapkv(attention(sample), heads, modality, size, window)
    if expected.gap > CLEAR:
        assert_kept(sample, sample.compress(policy, layer=layer), expected.kept)


@examples
@given(samples, budgets, ratios, st.sampled_from(["pivot", "average", "weighted", "none"]))
def test_lookm_is_naive_lookm(
    sample: Sample, budget: dict[str, Any], ratio: float, merge: naive.Merge
) -> None:
    _, modality, capacity = arguments(sample, budget)
    expected = naive.lookm(
        attention(sample), sample.keys, sample.values, modality, capacity, ratio, merge
    )
    if expected.gap < CLEAR:
        return
    out = sample.compress(make_policy("lookm", **budget, recent_ratio=ratio, merge=merge))
    assert per_head(out, len(sample.keys)) == expected.kept
    for mine, entries in ((out.keys, expected.keys), (out.values, expected.values)):
        torch.testing.assert_close(mine.double(), torch.stack(entries), atol=1e-5, rtol=0)


@examples
@given(samples, budgets, st.integers(1, 3), flags)
def test_fastv_is_naive_fastv(
    sample: Sample, budget: dict[str, Any], first: int, equalize: bool
) -> None:
    _, modality, capacity = arguments(sample, budget)
    text, av = modality.count(TEXT), sample.layout.av
    count = Fraction(capacity - text)
    if equalize:
        count = naive.fastv_share(count / av, LAYERS, first) * av
    expected = naive.fastv(attention(sample), modality, naive.half_up(count))
    policy = make_policy("fastv", **budget, first_pruned_layer=first, equalize=equalize)
    try:
        policy.check(LAYERS)
    except ValueError:
        return
    if expected.gap > CLEAR:
        out = sample.compress(policy, layer=5, num_layers=LAYERS)
        assert_kept(sample, out, expected.kept)


@examples
@given(samples, budgets, st.sampled_from([VIDEO, AUDIO]), st.integers(0, 5))
def test_drop_is_naive_drop(
    sample: Sample, budget: dict[str, Any], dropped: int, first_layer: int
) -> None:
    _, modality, capacity = arguments(sample, budget)
    expected = naive.drop(attention(sample), modality, capacity, dropped, 3, first_layer)
    if expected.gap > CLEAR:
        name = "drop_video" if dropped == VIDEO else "drop_audio"
        policy = make_policy(name, **budget, first_layer=first_layer)
        assert_kept(sample, sample.compress(policy, layer=3), expected.kept)


@examples
@given(samples, budgets, st.integers(0, 6), flags)
def test_controls_are_naive_controls(
    sample: Sample, budget: dict[str, Any], sinks: int, protect: bool
) -> None:
    heads, modality, capacity = arguments(sample, budget)
    streaming = naive.streaming(len(modality), capacity, sinks)
    assert_kept(
        sample, sample.compress(make_policy("streaming", **budget, sinks=sinks)), [streaming]
    )
    recent = naive.recent(modality, capacity)
    assert_kept(sample, sample.compress(make_policy("recent", **budget)), [recent])
    random = sample.compress(make_policy("random", **budget, protect_text=protect))
    assert random.keys.shape[1] == naive.random_count(modality, capacity, protect)
    kept = per_head(random, heads)[0]
    assert not protect or set(naive.tokens_of(modality, TEXT)) <= set(kept)
    full = sample.compress(make_policy("full", **budget))
    assert_kept(sample, full, [list(range(len(modality)))])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {}),
        ("h2o", {"protect_text": True}),
        ("snapkv", {"kernel": 1, "window": 4}),
        ("lookm", {"merge": "none"}),
        ("fastv", {}),
        ("drop_audio", {}),
    ],
)
def test_spare_slots_take_the_next_best(name: str, options: dict[str, Any]) -> None:
    sample = Sample(LAYOUTS["interleaved"](14, 12, 5))
    policy = make_policy(name, budget=0.3, **options)
    scores = sample.scores(policy)
    rows = scores.tolist()
    if name in ("fastv", "drop_audio"):
        rows = [naive.mean_over_heads(rows)] * 2
    exact, filled = (
        kept_sets(policy, sample, scores=scores, block_size=block_size) for block_size in (None, 16)
    )
    for row, few, more in zip(rows, exact, filled, strict=True):
        dropped = set(range(sample.layout.length)) - few
        if name == "drop_audio":  # audio comes last, and video is enough here
            dropped &= set((sample.modality == VIDEO).nonzero().flatten().tolist())
        assert len(more - few) > 0
        assert more - few == naive.top(row, sorted(dropped), len(more - few))[0]


# By hand


def folded(merge: str, pruned: list[float]) -> Compressed:
    """Video, video, text: token 1 and the text stay, token 0 goes into token 1."""
    keys = torch.tensor([[pruned, [4.0, 0.0], [0.0, 1.0]]])
    values = torch.tensor([[[0.0, 2.0], [8.0, 4.0], [1.0, 1.0]]])
    policy = make_policy("lookm", budget=2, budget_scope="total", merge=merge)
    modality = torch.tensor([VIDEO, VIDEO, TEXT], dtype=torch.int8)
    scores = torch.tensor([[0.0, 1.0, 0.0]])
    return policy.compress(None, keys, values, modality, scores=scores)


def test_lookm_by_hand() -> None:
    out = folded("pivot", [2.0, 0.0])  # (p + (x + p) / 2) / 2
    assert out.positions.tolist() == [[1, 2]]
    assert out.keys.tolist() == [[[3.5, 0.0], [0.0, 1.0]]]
    assert out.values.tolist() == [[[6.0, 3.5], [1.0, 1.0]]]
    assert folded("average", [2.0, 0.0]).keys[0, 0].tolist() == [3.0, 0.0]
    weighted = folded("weighted", [8.0, 6.0])  # cosine 0.8
    torch.testing.assert_close(weighted.keys[0, 0], torch.tensor([5.2, 2.4]))
    torch.testing.assert_close(weighted.values[0, 0], torch.tensor([4.0, 2.8]))
    assert folded("none", [2.0, 0.0]).keys[0, 0].tolist() == [4.0, 0.0]
    assert out.stats.merged["video"] == 1 and out.stats.evicted["video"] == 0


def test_lookm_weighted_leaves_out_what_is_less_similar_than_the_mean() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, -1.0]]])
    modality = torch.tensor([VIDEO, VIDEO, VIDEO, TEXT], dtype=torch.int8)
    policy = make_policy("lookm", budget=2, budget_scope="total", merge="weighted")
    scores = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    out = policy.compress(None, keys, keys.clone(), modality, scores=scores)
    assert out.keys.tolist() == [[[1.0, 0.0], [0.0, -1.0]]]
    assert out.stats.merged["video"] == out.stats.evicted["video"] == 1


def test_h2o_by_hand() -> None:
    sample = Sample([TEXT] + [VIDEO] * 7 + [TEXT] * 2)
    scores = torch.tensor([[9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0], [0.0, 9, 1, 8, 2, 7, 3, 6, 4, 5]])
    half = make_policy("h2o", budget=6, budget_scope="total")
    kept = per_head(sample.compress(half, scores=scores), 2)
    assert kept == [[0, 2, 4, 7, 8, 9], [1, 3, 5, 7, 8, 9]]
    text = make_policy("h2o", budget=3, protect_text=True, recent_ratio=0.4)
    kept = per_head(sample.compress(text, scores=scores), 2)
    assert kept == [[0, 2, 4, 7, 8, 9], [0, 1, 3, 7, 8, 9]]


def test_snapkv_pooling_by_hand() -> None:
    """Kernel 3 spreads the peak at token 4; at the edge a zero is averaged in."""
    sample = Sample([VIDEO] * 8 + [TEXT] * 2)
    scores = torch.tensor([[5.0, 0, 0, 0, 9, 0, 0, 1, 99, 99]]).expand(2, -1)
    options = {"budget": 5, "budget_scope": "total", "window": 2}
    for kernel, pooling, expected in (
        (1, "average", [0, 4, 7]),
        (3, "average", [3, 4, 5]),
        (3, "max", [3, 4, 5]),
        (5, "max", [2, 3, 4]),
    ):
        policy = make_policy("snapkv", **options, kernel=kernel, pooling=pooling)
        out = sample.compress(policy, scores=scores)
        assert out.positions.tolist() == [[*expected, 8, 9]]


# Invariants


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 1])
def test_invariant_19_h2o_size(ratio: float, seed: int) -> None:
    """H + R entries, the last R among them; a budget for all keeps all."""
    sample = Sample(LAYOUTS["interleaved"](7, 6, 5), seed)
    length = sample.layout.length
    for size in (2, 8, 13, length, 99):
        policy = make_policy("h2o", budget=size, budget_scope="total", recent_ratio=ratio)
        latest = set(range(length - int(min(size, length) * ratio), length))
        for kept in kept_sets(policy, sample):
            assert len(kept) == min(size, length) and latest <= kept


@pytest.mark.parametrize("seed", range(4))
def test_invariant_20_snapkv_size_window_and_kernel_1(seed: int) -> None:
    sample = Sample(LAYOUTS["contiguous"](12, 9, 5), seed, kv_heads=4)
    length = sample.layout.length
    for size in (6, 11, 20, length - 1, length, length + 1):
        options = {"budget": size, "budget_scope": "total", "window": 6}
        for kept in kept_sets(make_policy("snapkv", **options), sample):
            assert len(kept) == min(size, length)
            assert set(range(length - 6, length)) <= kept
        average, maximum = (
            kept_sets(make_policy("snapkv", **options, kernel=1, pooling=pooling), sample)
            for pooling in ("average", "max")
        )
        window = make_policy("snapkv", **options)
        scores = sample.scores(window)
        best = [
            naive.top(row, list(range(length - 6)), min(size, length) - 6)[0]
            for row in scores.tolist()
        ]
        assert average == maximum == [top | set(range(length - 6, length)) for top in best]


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
@pytest.mark.parametrize("scope", ["av", "total"])
def test_invariant_21_lookm_text_size_and_nothing_pruned(scope: str, ratio: float) -> None:
    sample = Sample(LAYOUTS["interleaved"](9, 8, 5))
    length, text = sample.layout.length, (sample.modality == TEXT).nonzero().flatten().tolist()
    for budget in (0.05, 0.3, 0.7, 1.0):
        policy = make_policy("lookm", budget=budget, budget_scope=scope, recent_ratio=ratio)
        capacity = naive.capacity_of(sample.modality.tolist(), budget, scope)
        recent = int(capacity * ratio)
        old_text = [position for position in text if position < length - recent]
        for kept in kept_sets(policy, sample):
            assert set(text) | set(range(length - recent, length)) <= kept
            assert len(kept) == max(capacity - recent, len(old_text)) + recent
        if budget == 1.0:
            assert torch.equal(sample.compress(policy).keys, sample.keys)


@pytest.mark.parametrize("merge", ["pivot", "average", "weighted", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_invariant_22_lookm_precision(seed: int, dtype: torch.dtype, merge: str) -> None:
    """The same numbers in half precision select and merge the same, within one rounding."""
    sample = Sample(LAYOUTS["contiguous"](40, 30, 10), seed, dtype)
    policy = make_policy("lookm", budget=0.3, merge=merge)
    narrow = sample.compress(policy)
    for name in ("queries", "keys", "values"):
        setattr(sample, name, getattr(sample, name).float())
    wide = sample.compress(policy)
    assert torch.equal(narrow.positions, wide.positions)
    assert narrow.keys.dtype == narrow.values.dtype == dtype
    assert torch.equal(narrow.keys, wide.keys.to(dtype))
    assert torch.equal(narrow.values, wide.values.to(dtype))


def test_invariant_23_fastv_layers() -> None:
    """Everything below layer K; one set with the original positions from there on."""
    sample = Sample(LAYOUTS["interleaved"](9, 8, 5))
    text, av = sample.layout.text, sample.layout.av
    for budget in (0.25, 0.5, 0.9, 1.0):
        policy = make_policy("fastv", budget=budget, equalize=False, first_pruned_layer=3)
        assert [policy.score_layer(Layer(index, LAYERS)) for index in (0, 3, 9)] == [0, 2, 2]
        scores = sample.scores(policy)
        kept = [kept_sets(policy, sample, scores=scores, layer=i)[0] for i in range(LAYERS)]
        assert kept[:3] == [set(range(sample.layout.length))] * 3
        assert kept[3:] == [kept[3]] * (LAYERS - 3)
        assert len(kept[3]) == text + naive.half_up(Fraction(budget) * av)


@pytest.mark.parametrize("layers", [4, 10, 28])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_invariant_23_fastv_budget_is_the_mean_over_layers(first: int, layers: int) -> None:
    """(avg L - K) / (L - K) in the layers that are pruned; 13.8 % for 20 %, L = 28, K = 2."""
    assert float(naive.fastv_share(Fraction(1, 5), 28, 2)) == pytest.approx(0.138, abs=5e-4)
    sample = Sample(LAYOUTS["contiguous"](120, 80, 10))
    for budget in (0.1, 0.2, 0.45, 0.8, 1.0):
        if budget <= first / layers:
            continue
        policy = make_policy("fastv", budget=budget, first_pruned_layer=first)
        entries = [policy.entries(sample.layout, Layer(i, layers)) for i in range(layers)]
        shares = [(size - sample.layout.text) / 200 for size in entries]
        assert abs(sum(shares) / layers - budget) <= 1 / 200
        share = (budget * layers - first) / (layers - first)
        assert shares == [1.0] * first + [shares[-1]] * (layers - first)
        assert abs(shares[-1] - share) <= 1 / 200
        pruned = sample.compress(policy, layer=layers - 1, num_layers=layers)
        assert pruned.keys.shape[1] == entries[-1]


@pytest.mark.parametrize("layers", [1, 2, 10, 28])
@pytest.mark.parametrize("beta", [1, 5, 20])
def test_invariant_24_pyramidkv_caps(beta: int, layers: int) -> None:
    """The mean is the budget, no layer has more than the one below it."""
    sample = Sample(LAYOUTS["contiguous"](60, 40, 10))
    length = sample.layout.length
    for size in (2, 8, 20, 40, 60, 61, 100, length, 999):
        options = {"budget": size, "budget_scope": "total", "window": 8, "beta": beta}
        policy = make_policy("pyramidkv", **options)
        caps = [policy.entries(sample.layout, Layer(i, layers)) for i in range(layers)]
        exact = naive.pyramidkv_caps(length, min(size, length), 8, beta, layers)
        assert caps == sorted(caps, reverse=True)
        assert all(abs(cap - real) <= Fraction(1, 2) for cap, real in zip(caps, exact, strict=True))
        assert layers == 1 or abs(sum(caps) / layers - min(size, length)) <= 0.5
        if size <= 8 or 2 * (size - 8) > length:
            assert set(caps) == {min(size, length)}


def test_pyramidkv_caps_by_hand() -> None:
    """108 tokens, C = 28, window 8: 20 in the mean, 1 at the top, 39 at the bottom."""
    assert naive.pyramidkv_caps(108, 28, 8, 20, 20) == [47 - 2 * i for i in range(20)]
    # C = 58: 97.5 would be below the top layer, 100 are there; no more than that.
    caps = naive.pyramidkv_caps(108, 58, 8, 50, 3)
    assert caps == [8 + 99, 58, 8 + 1]
    assert naive.pyramidkv_caps(108, 64, 8, 20, 2) == [64, 64]
    assert naive.pyramidkv_caps(108, 108, 8, 20, 2) == [108, 108]


def test_random_differs_between_layers_and_seeds_only() -> None:
    sample = Sample(LAYOUTS["contiguous"](60, 40, 10))
    policy = make_policy("random", budget=0.5)
    sets = [frozenset(kept_sets(policy, sample, layer=layer)[0]) for layer in range(4)]
    assert len(set(sets)) == 4
    other = Sample(LAYOUTS["contiguous"](60, 40, 10), seed=5)
    assert kept_sets(policy, other, layer=2)[0] == sets[2]
    assert kept_sets(make_policy("random", budget=0.5, seed=1), sample, layer=2)[0] != sets[2]
