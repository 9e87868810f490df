# SPDX-License-Identifier: Apache-2.0
"""The policy library against the naive implementation of the paper, and its invariants."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.reference.naive_acckv import (
    LayerSelection,
    Options,
    closest_call,
    naive_budget,
    naive_plan,
    naive_select,
    worst_case,
)
from vllm_acckv.movement import gather_kept
from vllm_acckv.plan import make_plan
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.policies.base import Layer, Prompt
from vllm_acckv.policies.compression import Compressed
from vllm_acckv.rotary import rotate, unrotate
from vllm_acckv.scores import observed_attention
from vllm_acckv.selection import Kept, SingleRank, align
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import DenseStates

HEADS, KV_HEADS, WIDTH, BLOCK = 4, 2, 8, 4

runs = st.lists(
    st.tuples(st.sampled_from([TEXT, VIDEO, AUDIO]), st.integers(1, 9)), min_size=1, max_size=8
)
prompts = st.builds(
    lambda parts, tail: np.array(
        [code for code, count in parts for _ in range(count)] + [TEXT] * tail, dtype=np.int8
    ),
    runs,
    st.integers(0, 9),
)
clips = prompts.filter(lambda modality: modality.any())
policies = st.builds(
    make_policy,
    st.sampled_from(["acckv", "acckv", "position_prior"]),
    budget=st.one_of(st.floats(0.01, 1.0), st.integers(2, 40)),
    tau=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    redistribution=st.sampled_from(["paper", "visible", "off"]),
    focusing=st.booleans(),
    calibration=st.booleans(),
    head_mode=st.sampled_from(["layer", "head"]),
    tau_mode=st.sampled_from(["absolute", "quantile"]),
    budget_scope=st.sampled_from(["av", "total"]),
    keep_prefix=st.booleans(),
    min_per_modality=st.booleans(),
    strict_budget=st.sampled_from(["off", "tokens", "entries"]),
    filter_merged=st.booleans(),
    min_keep_low=st.integers(0, 4),
)


class Tensors:
    """Random queries, keys and values of one layer."""

    def __init__(self, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query = torch.randn(length, HEADS, WIDTH, generator=generator)
        self.key = torch.randn(KV_HEADS, length, WIDTH, generator=generator)
        self.value = torch.randn(KV_HEADS, length, WIDTH, generator=generator)

    @cached_property
    def attention(self) -> torch.Tensor:
        """The full matrix, ``[H, l, l]``."""
        keys = self.key.repeat_interleave(HEADS // KV_HEADS, 0)
        logits = torch.einsum("ihd,hjd->hij", self.query, keys) * WIDTH**-0.5
        mask = torch.ones_like(logits, dtype=torch.bool).triu(1)
        return logits.masked_fill(mask, -torch.inf).softmax(-1)

    def naive(self, modality: np.ndarray, opts: Options) -> LayerSelection:
        return naive_select(self.attention, self.key, self.value, modality.tolist(), opts)

    def kept(self, modality: np.ndarray, policy: AccKV, block_size: int) -> Kept:
        layout = Layout(modality)
        first = policy.first_query(layout)
        scores = observed_attention(
            self.query[first:], self.key, first, WIDTH**-0.5, policy.weights(layout)
        )
        prompt = Prompt.of(layout, scores.device)
        selection = policy.select(scores, DenseStates(self.key, self.value), prompt, Layer())
        return align(selection, (), block_size, SingleRank())


def options(policy: AccKV, keep: int, block_size: int) -> Options:
    return Options(
        k=keep,
        tau=policy.tau,
        redistribution=policy.redistribution,
        focusing=policy.focusing,
        calibration=policy.calibration,
        head_mode=policy.head_mode,
        tau_mode=policy.tau_mode,
        keep_prefix=policy.keep_prefix,
        block_size=block_size,
        min_per_modality=policy.min_per_modality,
        strict_budget=policy.strict_budget,
        filter_merged=policy.filter_merged,
        min_keep_low=policy.min_keep_low,
        position_prior=policy.name == "position_prior",
    )


def limits(policy: AccKV) -> dict[str, Any]:
    """The settings that decide how many entries a layer may keep of its k."""
    return {
        "calibration": policy.calibration,
        "keep_prefix": policy.keep_prefix,
        "min_per_modality": policy.min_per_modality,
        "strict_budget": policy.strict_budget,
    }


def readable(modality: np.ndarray, policy: AccKV) -> bool:
    """Whether the policy has text rows to observe, or needs none."""
    return policy.name == "position_prior" or modality[-1] == TEXT


def assert_same_entries(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    layer: Tensors,
    expected: LayerSelection,
) -> None:
    """Kept tokens are bit-identical copies in the order of the prompt, merged entries close.

    Args:
        key, value: ``[G, L, D]``; positions: int64 ``[G, L]``, -1 for merged entries.
    """
    assert key.shape == value.shape == (KV_HEADS, expected.length, WIDTH)
    for head, position in enumerate(positions):
        token = position >= 0
        assert position[token].tolist() == expected.kept[head]
        assert torch.equal(key[head, token], layer.key[head, position[token]])
        assert torch.equal(value[head, token], layer.value[head, position[token]])
        mine = torch.cat([key[head, ~token], value[head, ~token]], dim=1)
        merged = [torch.cat(pair) for pair in expected.merged[head].values()]
        assert len(mine) == len(merged)
        if merged:
            distance = (mine[:, None] - torch.stack(merged)).norm(dim=-1)
            assert distance.amin(0).max() < 1e-5
            assert distance.amin(1).max() < 1e-5


@settings(max_examples=200, deadline=None)
@given(prompts, policies)
def test_plan_is_the_naive_plan(modality: np.ndarray, policy: AccKV) -> None:
    plan = make_plan(modality, policy, BLOCK, num_layers=3)
    keep, freed, active = naive_plan(
        modality.tolist(),
        policy.budget,
        BLOCK,
        scope=policy.budget_scope,
        position_prior=policy.name == "position_prior",
        **limits(policy),
    )
    assert plan.active == active
    assert plan.freed_blocks == (freed if active else 0)
    if active:
        assert policy.heavy_hitters(plan.layout) == keep


@settings(max_examples=300, deadline=None)
@given(clips, policies)
def test_entries_are_the_naive_bound(modality: np.ndarray, policy: AccKV) -> None:
    plan = make_plan(modality, policy, BLOCK, num_layers=3)
    keep, most = naive_budget(
        modality.tolist(), policy.budget, scope=policy.budget_scope, **limits(policy)
    )
    assert policy.heavy_hitters(plan.layout) == keep
    assert plan.entries == (most,) * 3
    assert worst_case(modality.tolist(), keep, **limits(policy)) <= most


@settings(max_examples=400, deadline=None)
@given(clips, policies, st.sampled_from([1, BLOCK]), st.integers(0, 5))
def test_selection_is_the_naive_selection(
    modality: np.ndarray, policy: AccKV, block_size: int, seed: int
) -> None:
    assume(readable(modality, policy))
    opts = options(policy, policy.heavy_hitters(Layout(modality)), block_size)
    layer = Tensors(len(modality), seed)
    expected = layer.naive(modality, opts)
    assume(closest_call(expected, opts) >= 1e-5)  # fp32 and fp64 may decide differently
    kept = layer.kept(modality, policy, block_size)
    assert kept.freed_blocks == expected.f
    tokens = kept.tokens.expand(KV_HEADS, -1)
    assert [head.nonzero().flatten().tolist() for head in tokens] == expected.kept
    assert_same_entries(*gather_kept(kept, layer.key, layer.value), layer, expected)


@settings(max_examples=200, deadline=None)
@given(clips, policies, st.integers(0, 5))
def test_no_layer_keeps_more_than_planned(modality: np.ndarray, policy: AccKV, seed: int) -> None:
    """The block manager frees by the plan without asking the worker."""
    plan = make_plan(modality, policy, BLOCK)
    assume(readable(modality, policy))
    layer = Tensors(len(modality), seed)
    assert layer.kept(modality, policy, 1).length <= plan.entries[0]
    if plan.active:
        assert layer.kept(modality, policy, BLOCK).freed_blocks >= plan.freed_blocks


@settings(max_examples=400, deadline=None)
@given(
    clips,
    policies,
    st.sampled_from([None, 1, BLOCK]),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 5),
)
def test_compress_is_the_naive_selection(
    modality: np.ndarray,
    policy: AccKV,
    block_size: int | None,
    padding: int,
    more_rows: bool,
    seed: int,
) -> None:
    """From queries of the trailing text alone, or of more tokens; padding changes nothing."""
    assume(readable(modality, policy))
    layer = Tensors(len(modality), seed)
    got = compressed(policy, layer, modality, block_size, padding, more_rows)
    positions = got.positions
    if (positions == positions[:1]).all():
        assert len(positions) == 1
    positions = torch.where(positions < 0, -1, positions - padding).expand(KV_HEADS, -1)
    keep, most = naive_budget(
        modality.tolist(), policy.budget, scope=policy.budget_scope, **limits(policy)
    )
    if block_size is not None and len(modality) - most < block_size:
        assert torch.equal(got.keys, layer.key) and torch.equal(got.values, layer.value)
        assert (positions == torch.arange(len(modality))).all()
        return
    opts = options(policy, keep, block_size or 1)
    expected = layer.naive(modality, opts)
    assume(closest_call(expected, opts) >= 1e-5)
    assert_same_entries(got.keys, got.values, positions, layer, expected)
    assert_same_stats(got, modality, expected)


def compressed(
    policy: AccKV,
    layer: Tensors,
    modality: np.ndarray,
    block_size: int | None,
    padding: int = 0,
    more_rows: bool = False,
) -> Compressed:
    """``policy.compress`` with garbage in the padding, and with the rows it asks for or all."""
    queries = layer.query.movedim(0, 1)
    rows = len(modality) if more_rows else len(modality) - policy.first_query(Layout(modality))
    keys, values = (
        torch.nn.functional.pad(states, (0, 0, padding, 0), value=3.0)
        for states in (layer.key, layer.value)
    )
    codes = torch.tensor([-1] * padding + modality.tolist(), dtype=torch.int8)
    return policy.compress(
        queries[:, len(modality) - rows :] if rows else None,
        keys,
        values,
        codes,
        block_size=block_size,
    )


def assert_same_stats(got: Compressed, modality: np.ndarray, expected: LayerSelection) -> None:
    fates = {"kept": [0.0] * 3, "merged": [0.0] * 3, "evicted": [0.0] * 3}
    for kept, merged, head in zip(expected.kept, expected.merged, expected.heads, strict=True):
        alive = {j for m in merged for j in head.merge_sources[m]}
        for j, code in enumerate(modality):
            fate = "kept" if j in kept else "merged" if j in alive else "evicted"
            fates[fate][code] += 1 / KV_HEADS
    for fate, counts in fates.items():
        named = dict(zip(("text", "video", "audio"), counts, strict=True))
        assert getattr(got.stats, fate) == pytest.approx(named)
    entries = sum(len(merged) for merged in expected.merged) / KV_HEADS
    assert got.stats.merged_entries == pytest.approx(entries)
    weight = sum(expected.W_v) / KV_HEADS
    assert got.stats.video_weight == pytest.approx(weight, abs=1e-5)
    assert got.stats.audio_weight == pytest.approx(1 - weight, abs=1e-5)
    filtered = sum(x != "merged" for head in expected.heads for x in head.similarity)
    if filtered:
        rejected = sum(len(head.rejected) for head in expected.heads)
        assert got.stats.rejected_share == pytest.approx(rejected / filtered)


def test_share_of_a_filter_that_did_not_run() -> None:
    """Stats.rejected_share is 0 if the filter spared all, and None without a filter."""
    both = np.array([VIDEO] * 20 + [AUDIO] * 20 + [TEXT] * 4, dtype=np.int8)
    alone = np.array([VIDEO] * 40 + [TEXT] * 4, dtype=np.int8)
    layer = Tensors(44)
    spare, plain = AccKV(tau=-1), AccKV(calibration=False)
    assert compressed(spare, layer, both, None).stats.rejected_share == 0
    assert compressed(plain, layer, both, None).stats.rejected_share is None
    assert compressed(spare, layer, alone, None).stats.rejected_share is None


def test_trailing_text_stays_in_place() -> None:
    modality = np.array([TEXT] * 3 + [VIDEO] * 20 + [AUDIO] * 20 + [TEXT] * 6, dtype=np.int8)
    layer = Tensors(len(modality))
    policy = AccKV(budget=0.2, tau=-1)
    assert policy.heavy_hitters(Layout(modality)) == 8
    kept = layer.kept(modality, policy, BLOCK)
    key, value, positions = gather_kept(kept, layer.key, layer.value)
    assert kept.merged is not None and kept.merged.valid.all()
    assert torch.equal(key[:, -6:], layer.key[:, -6:])
    assert torch.equal(value[:, -6:], layer.value[:, -6:])
    assert (positions[:, -6:] == torch.arange(43, 49)).all()


def test_scores_of_chunks_add_up() -> None:
    layer = Tensors(40)
    layout = Layout(np.array([VIDEO] * 30 + [TEXT] * 10, dtype=np.int8))
    weights = make_policy("acckv").weights(layout)
    whole = observed_attention(layer.query[30:], layer.key, 30, 0.3, weights)
    first = observed_attention(layer.query[30:34], layer.key[:, :34], 30, 0.3, weights)
    second = observed_attention(layer.query[34:], layer.key, 34, 0.3, weights)
    torch.testing.assert_close(torch.nn.functional.pad(first, (0, 6)) + second, whole)


def test_scores_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Tensors(40)
    whole = observed_attention(layer.query[20:], layer.key, 20, 0.3)
    monkeypatch.setattr("vllm_acckv.scores._MAX_PROBABILITIES", HEADS * 40 * 3)
    torch.testing.assert_close(observed_attention(layer.query[20:], layer.key, 20, 0.3), whole)


def test_unrotate_inverts_rotate() -> None:
    key = torch.randn(2, 5, 8)
    angles = torch.randn(5, 3)
    torch.testing.assert_close(unrotate(rotate(key, angles), angles), key)
    assert torch.equal(rotate(key, angles)[..., 6:], key[..., 6:])


def test_merge_before_rotary_embedding() -> None:
    """Identical content at different positions merges to itself at the mean position."""
    modality = np.array([VIDEO] * 12 + [TEXT] * 2, dtype=np.int8)
    angles = torch.arange(14.0)[:, None] * torch.tensor([1.0, 0.1])
    content = torch.randn(KV_HEADS, 1, 4).expand(KV_HEADS, 14, 4)
    policy = make_policy("acckv", budget=2, merge_space="pre_rope")
    prompt = Prompt.of(Layout(modality), angles.device, angles)
    states = DenseStates(rotate(content, angles), content)
    selection = policy.select(torch.zeros(KV_HEADS, 14), states, prompt, Layer())
    assert policy.needs_angles
    assert selection.merged is not None
    mean = angles[2:12].mean(0, keepdim=True)  # ties keep the lowest indices
    torch.testing.assert_close(selection.merged.key, rotate(content[:, :1], mean))


def test_similarity_before_rotary_embedding() -> None:
    """Identical content is perfectly similar before rotation and hardly so after it."""
    modality = np.array([VIDEO] * 30 + [AUDIO] * 30 + [TEXT] * 2, dtype=np.int8)
    angles = torch.arange(62.0)[:, None] * torch.tensor([1.0, 0.7])
    content = torch.randn(KV_HEADS, 1, 4).expand(KV_HEADS, 62, 4)
    prompt = Prompt.of(Layout(modality), angles.device, angles)
    scores = torch.rand(KV_HEADS, 62)
    kept = {}
    for mode in ("absolute", "absolute_pre_rope"):
        policy = make_policy("acckv", budget=20, tau=0.99, tau_mode=mode)
        states = DenseStates(rotate(content, angles), content)
        selection = policy.select(scores, states, prompt, Layer())
        kept[mode] = int(selection.keep[0, :60].sum())
    assert kept["absolute_pre_rope"] == 20
    assert kept["absolute"] < 20


def test_video_has_priority_where_nothing_tells_the_modalities_apart() -> None:
    """Without attention W is one half, and the filter drops audio: ties go to video."""
    modality = np.array([AUDIO] * 20 + [VIDEO] * 20 + [TEXT] * 2, dtype=np.int8)
    layer = Tensors(42)
    policy = make_policy("acckv", budget=30, tau=1.0, filter_merged=False)
    prompt = Prompt.of(Layout(modality), layer.key.device)
    states = DenseStates(layer.key, layer.value)
    selection = policy.select(torch.zeros(KV_HEADS, 42), states, prompt, Layer())
    assert selection.video_weight is not None and selection.video_weight.tolist() == [0.5]
    assert not selection.keep[0, :20].any() and int(selection.keep[0, 20:40].sum()) == 10
