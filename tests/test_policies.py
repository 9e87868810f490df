# SPDX-License-Identifier: Apache-2.0
"""The policy library against the naive implementation of the paper, and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.naive_acckv import (
    LayerSelection,
    Options,
    closest_call,
    naive_plan,
    naive_select,
)
from vllm_acckv.config import KVPolicyConfig
from vllm_acckv.movement import gather_kept
from vllm_acckv.plan import make_plan
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Prompt
from vllm_acckv.policies.rotary import rotate, unrotate
from vllm_acckv.scores import observed_attention
from vllm_acckv.selection import Kept, SingleRank, align
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

HEADS, KV_HEADS, WIDTH, BLOCK = 4, 2, 8, 4

runs = st.lists(
    st.tuples(st.sampled_from([TEXT, VIDEO, AUDIO]), st.integers(1, 9)), min_size=1, max_size=8
)
prompts = st.builds(
    lambda parts, tail: np.array(
        [code for code, count in parts for _ in range(count)] + [TEXT] * tail, dtype=np.int8
    ),
    runs,
    st.integers(1, 9),
)
configs = st.builds(
    KVPolicyConfig,
    budget=st.one_of(st.floats(0.01, 1.0), st.integers(2, 40)),
    tau=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    redistribution=st.sampled_from(["paper", "visible", "off"]),
    focusing=st.booleans(),
    calibration=st.booleans(),
    head_mode=st.sampled_from(["layer", "head"]),
    tau_mode=st.sampled_from(["absolute", "quantile"]),
    budget_scope=st.sampled_from(["av", "total"]),
    keep_prefix=st.booleans(),
)


class Layer:
    """Random queries, keys and values of one layer and its full attention matrix."""

    def __init__(self, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query = torch.randn(length, HEADS, WIDTH, generator=generator)
        self.key = torch.randn(KV_HEADS, length, WIDTH, generator=generator)
        self.value = torch.randn(KV_HEADS, length, WIDTH, generator=generator)
        keys = self.key.repeat_interleave(HEADS // KV_HEADS, 0)
        logits = torch.einsum("ihd,hjd->hij", self.query, keys) * WIDTH**-0.5
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.attention = logits.masked_fill(mask, -torch.inf).softmax(-1)

    def naive(self, modality: np.ndarray, config: KVPolicyConfig, keep: int) -> LayerSelection:
        return naive_select(
            self.attention, self.key, self.value, modality.tolist(), options(config, keep)
        )

    def kept(self, modality: np.ndarray, config: KVPolicyConfig, keep: int) -> Kept:
        policy = make_policy(config)
        start = int(np.flatnonzero(modality)[-1]) + 1
        scores = observed_attention(
            self.query[policy.first_query(start) :],
            self.key,
            start,
            WIDTH**-0.5,
            policy.weights(len(modality), start),
        )
        prompt = Prompt(torch.from_numpy(modality), start, keep)
        selection = policy.select(scores, self.key, self.value, prompt, SingleRank())
        return align(selection, BLOCK, SingleRank())


def options(config: KVPolicyConfig, keep: int) -> Options:
    return Options(
        k=keep,
        tau=config.tau,
        redistribution=config.redistribution,
        focusing=config.focusing,
        calibration=config.calibration,
        head_mode=config.head_mode,
        tau_mode=config.tau_mode,
        keep_prefix=config.keep_prefix,
        block_size=BLOCK,
    )


@settings(max_examples=200, deadline=None)
@given(prompts, configs)
def test_plan_is_the_naive_plan(modality: np.ndarray, config: KVPolicyConfig) -> None:
    plan = make_plan(modality, config, BLOCK)
    keep, freed, active = naive_plan(
        modality.tolist(),
        config.budget,
        BLOCK,
        config.calibration,
        config.keep_prefix,
        config.budget_scope,
    )
    assert plan.active == active
    assert plan.freed_blocks == (freed if active else 0)
    if active:
        assert plan.keep == keep


@settings(max_examples=200, deadline=None)
@given(prompts.filter(lambda modality: modality.any()), configs, st.integers(0, 5))
def test_selection_is_the_naive_selection(
    modality: np.ndarray, config: KVPolicyConfig, seed: int
) -> None:
    keep = make_plan(modality, config, BLOCK).keep
    layer = Layer(len(modality), seed)
    expected = layer.naive(modality, config, keep)
    if closest_call(expected, options(config, keep)) < 1e-5:
        return  # fp32 and fp64 may decide differently
    kept = layer.kept(modality, config, keep)
    assert kept.freed_blocks == expected.f
    assert [head.nonzero().flatten().tolist() for head in kept.tokens] == expected.kept
    key, value = gather_kept(kept, layer.key, layer.value)
    for head in range(KV_HEADS):
        merged = list(expected.merged[head].values())
        entries = torch.cat([layer.key[head], layer.value[head]], dim=1)[expected.kept[head]]
        entries = torch.cat([entries, *(torch.cat(pair)[None] for pair in merged)])
        mine = torch.cat([key[head], value[head]], dim=1)
        assert mine.shape == entries.shape
        distance = torch.cdist(mine, entries, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(0).max() < 1e-5
        assert distance.amin(1).max() < 1e-5


@settings(max_examples=200, deadline=None)
@given(prompts.filter(lambda modality: modality.any()), configs, st.integers(0, 5))
def test_no_layer_keeps_more_than_planned(
    modality: np.ndarray, config: KVPolicyConfig, seed: int
) -> None:
    """The block manager frees by the plan without asking the worker."""
    plan = make_plan(modality, config, BLOCK)
    if plan.active:
        kept = Layer(len(modality), seed).kept(modality, config, plan.keep)
        assert kept.freed_blocks >= plan.freed_blocks


def test_trailing_text_stays_in_place() -> None:
    modality = np.array([TEXT] * 3 + [VIDEO] * 20 + [AUDIO] * 20 + [TEXT] * 6, dtype=np.int8)
    layer = Layer(len(modality))
    kept = layer.kept(modality, KVPolicyConfig(budget=0.2, tau=-1), 8)
    key, value = gather_kept(kept, layer.key, layer.value)
    assert kept.merged is not None and kept.merged.valid.all()
    assert torch.equal(key[:, -6:], layer.key[:, -6:])
    assert torch.equal(value[:, -6:], layer.value[:, -6:])


def test_scores_of_chunks_add_up() -> None:
    layer = Layer(40)
    weights = make_policy(KVPolicyConfig()).weights(40, 30)
    whole = observed_attention(layer.query[30:], layer.key, 30, 0.3, weights)
    first = observed_attention(layer.query[30:34], layer.key[:, :34], 30, 0.3, weights)
    second = observed_attention(layer.query[34:], layer.key, 34, 0.3, weights)
    torch.testing.assert_close(torch.nn.functional.pad(first, (0, 6)) + second, whole)


def test_scores_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(40)
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
    policy = make_policy(KVPolicyConfig(budget=2, merge_space="pre_rope"))
    prompt = Prompt(torch.from_numpy(modality), 12, 2, angles)
    selection = policy.select(
        torch.zeros(KV_HEADS, 14), rotate(content, angles), content, prompt, SingleRank()
    )
    assert policy.needs_angles
    assert selection.merged is not None
    mean = angles[2:12].mean(0, keepdim=True)  # ties keep the lowest indices
    torch.testing.assert_close(selection.merged.key, rotate(content[:, :1], mean))


def test_similarity_before_rotary_embedding() -> None:
    """Identical content is perfectly similar before rotation and hardly so after it."""
    modality = np.array([VIDEO] * 30 + [AUDIO] * 30 + [TEXT] * 2, dtype=np.int8)
    angles = torch.arange(62.0)[:, None] * torch.tensor([1.0, 0.7])
    content = torch.randn(KV_HEADS, 1, 4).expand(KV_HEADS, 62, 4)
    prompt = Prompt(torch.from_numpy(modality), 60, 20, angles)
    scores = torch.rand(KV_HEADS, 62)
    kept = {}
    for mode in ("absolute", "absolute_pre_rope"):
        policy = make_policy(KVPolicyConfig(budget=20, tau=0.99, tau_mode=mode))
        selection = policy.select(scores, rotate(content, angles), content, prompt, SingleRank())
        kept[mode] = int(selection.keep[0, :60].sum())
    assert kept["absolute_pre_rope"] == 20
    assert kept["absolute"] < 20
