# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that work on several layers at once: what AccKV asks of keys and values, and
entries that move to their slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from tests.test_kernels import DEVICE, HEAD_SIZES, PHASES, interpreter
from tests.test_policy_invariants import (
    CASES,
    HEADS,
    LAYER,
    LAYOUTS,
    WIDTH,
    Case,
    Sample,
    decides,
    made,
)
from vllm_acckv.kernels.compact import compact, warm_up
from vllm_acckv.kernels.move import move, move_reference
from vllm_acckv.kernels.paged import PagedLayers
from vllm_acckv.kernels.states import PagedStates
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Policy, Prompt
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

__all__ = ["interpreter"]  # a fixture of this module, too


@dataclass(frozen=True)
class Cache:
    """Random caches of several layers, in which a request's blocks lie in random order."""

    layers: int
    kv_heads: int
    head_size: int
    block: int
    dtype: torch.dtype
    length: int
    seed: int

    def made(self) -> PagedLayers:
        generator = torch.Generator().manual_seed(self.seed)
        needed = -(-self.length // self.block)
        size = (needed + 3, self.kv_heads, self.block, 2 * self.head_size)
        caches = []
        for _ in range(self.layers):
            blocks = torch.randn(size, generator=generator).to(DEVICE, self.dtype)
            if self.seed % 2:  # vLLM's other layout: slots in front of heads
                blocks = blocks.transpose(1, 2).contiguous().transpose(1, 2)
            caches.append(blocks)
        table = torch.randperm(needed + 3, generator=generator)[:needed]
        return PagedLayers(caches, table.to(DEVICE, torch.int32))


CACHES = st.builds(
    Cache,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 8),
    head_size=st.sampled_from(HEAD_SIZES),
    block=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]),
    length=st.integers(1, 260),
    seed=st.integers(0, 99),
)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(
    cache=CACHES,
    shared=st.booleans(),
    groups=st.integers(1, 2),
    half=st.integers(0, 8),
    rarity=st.integers(1, 9),
)
def test_states(cache: Cache, shared: bool, groups: int, half: int, rarity: int) -> None:
    """What policies ask of keys equals the reference's, and means those of float64."""
    torch.manual_seed(cache.seed)
    paged = PagedStates(cache.made(), cache.length)
    dense = paged.dense()
    shape = cache.layers, 1 if shared else cache.kv_heads, cache.length
    # Which group a token is in; most are in none where groups are rare.
    group = torch.randint(0, groups + rarity, shape, device=DEVICE)
    groups_of = torch.stack([group == one for one in range(groups)], -2)
    tokens = group == groups
    # As the engine makes them: not in order in memory.
    angles = torch.rand(half, cache.length, device=DEVICE).T * 99 if half else None
    for ours, reference in zip(
        paged.means(groups_of, angles), dense.means(groups_of, angles), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    share = groups_of.double() / groups_of.sum(-1, keepdim=True).clamp(min=1)
    exact = share @ dense.value.double()
    torch.testing.assert_close(paged.means(groups_of)[1].double(), exact, rtol=1e-5, atol=1e-5)
    ours, reference = paged.directions(tokens, angles), dense.directions(tokens, angles)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4)
    direction = torch.randn_like(ours)
    torch.testing.assert_close(
        paged.similarities(direction, tokens, angles),
        dense.similarities(direction, tokens, angles),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        paged.distances(direction, tokens, angles),
        dense.distances(direction, tokens, angles),
        rtol=1e-5,
        atol=1e-4,
    )


def test_states_that_are_not_finite() -> None:
    """One broken number stays where it is."""
    paged = PagedStates(Cache(1, 1, 16, 16, torch.float32, 40, 0).made(), 40)
    cache = paged.layers.layer(0)
    rows = cache.rows(40)
    rows[:, 3, 5], rows[:, 4, 6], rows[:, 9, 20] = torch.nan, torch.inf, -torch.inf
    cache.write(0, rows)
    groups = torch.arange(40, device=DEVICE)[None, None, None] < 20
    for ours, reference in zip(paged.means(groups), paged.dense().means(groups), strict=True):
        torch.testing.assert_close(ours, reference)
    for tokens in (groups[0], ~groups[0]):
        ours, reference = paged.directions(tokens), paged.dense().directions(tokens)
        torch.testing.assert_close(ours, reference, equal_nan=True)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(
    cache=CACHES,
    kept=st.integers(1, 260),
    empty=st.integers(0, 40),
    merged=st.integers(0, 2),
    shared=st.booleans(),
    behind_kept=st.booleans(),
)
@hypothesis.example(Cache(1, 1, 16, 16, torch.float32, 200, 3), 199, 0, 1, False, True)
@hypothesis.example(Cache(1, 1, 16, 16, torch.float32, 200, 6), 199, 0, 1, False, True)
def test_move(
    cache: Cache, kept: int, empty: int, merged: int, shared: bool, behind_kept: bool
) -> None:
    """Bit by bit: what belongs to the entries, and that nothing else in the caches changes.

    A merged entry may stand behind a token that is kept, too, because it fills a spare slot.
    """
    generator = torch.Generator().manual_seed(cache.seed)
    length, heads = cache.length, 1 if shared else cache.kv_heads
    hypothesis.assume(length > 1)
    kept = min(kept, length - 1)
    merged = min(merged, length - kept, kept)
    sources = []
    for _ in range(cache.layers * heads):
        order = torch.randperm(length, generator=generator)
        # Twice the token, plus 1 for a merged entry that stands behind its last token.
        last = order[:merged] if behind_kept else order[kept : kept + merged]
        places = torch.cat([2 * order[:kept], 2 * last + 1])
        which = torch.cat([order[:kept], length + torch.arange(merged)])
        sources.append(which[places.argsort()])
    front = torch.full((cache.layers * heads, min(empty, length - kept - merged)), -1)
    rows = torch.cat([front, torch.stack(sources)], 1).to(DEVICE, torch.int32)
    rows = rows.unflatten(0, (cache.layers, heads))
    layers, expected = cache.made(), cache.made()
    before = [layers.layer(index).rows(length) for index in range(cache.layers)]
    size = (cache.layers, cache.kv_heads, merged, 2 * cache.head_size)
    entries = torch.randn(size, generator=generator).to(DEVICE, cache.dtype)
    move_reference(expected, rows, length, entries if merged else None)
    move(layers, rows, length, entries if merged else None)
    for ours, reference in zip(layers.caches, expected.caches, strict=True):
        assert torch.equal(ours.view(torch.uint8), reference.view(torch.uint8))
    for index in range(cache.layers):
        everything = torch.cat([before[index], entries[index]], 1)
        for head in range(cache.kv_heads):
            moved = layers.layer(index).rows(length)[head, length - kept - merged :]
            source = sources[index * heads + (0 if shared else head)].to(DEVICE)
            assert torch.equal(moved.view(torch.uint8), everything[head, source].view(torch.uint8))


def compare(policy: Policy, samples: list[Sample], scores: torch.Tensor, block: int) -> None:
    """Kernels over all layers leave in the cache what PyTorch leaves layer by layer."""
    number, kv_heads, length = scores.shape
    prompt = samples[0].prompt
    freed = (length - policy.entries(prompt.layout, LAYER)) // block
    assert freed > 0
    layers = Cache(number, kv_heads, WIDTH, block, samples[0].keys.dtype, length, 1).made()
    for index, sample in enumerate(samples):
        sample.prompt = prompt
        rows = torch.cat([sample.keys, sample.values], -1).to(DEVICE)
        layers.layer(index).write(0, rows)
    there = Prompt(prompt.layout, prompt.modality.to(DEVICE), prompt.angles.to(DEVICE))
    _, kept = compact(policy, scores.to(DEVICE), layers, there, LAYER, block)
    assert kept.freed_blocks == freed
    fates = torch.zeros(3, 3)
    for index, sample in enumerate(samples):
        done = sample.compact(policy, scores[index], block, wait=False)
        fates += done.kept.fates(sample.modality)
        empty = int(torch.as_tensor(done.kept.empty_blocks))
        all_freed = torch.as_tensor(kept.all_freed).expand(number)[index]
        assert int(all_freed) == int(torch.as_tensor(done.kept.all_freed)) == freed + empty
        rows = torch.cat([done.key, done.value], -1)[:, empty * block :]
        ours = layers.layer(index).rows(length)[:, (freed + empty) * block :]
        torch.testing.assert_close(ours.cpu(), rows)
    torch.testing.assert_close(kept.fates(there.modality).cpu(), fates)


def frees(policy: Policy, sample: Sample, block: int) -> bool:
    entries = policy.entries(sample.layout, LAYER)
    return decides(policy, sample) and sample.layout.length - entries >= block


@pytest.mark.parametrize("layout", ["contiguous", "interleaved", "audio_only"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if made(case).layers_alike], ids=lambda case: case[0]
)
def test_layers_are_decided_together_as_one_by_one(case: Case, layout: str) -> None:
    modality = LAYOUTS[layout](23, 18, 5)
    samples = [Sample(modality, seed, kv_heads=2) for seed in range(3)]
    if frees(made(case), samples[0], 4):
        scores = torch.stack([sample.scores(made(case)) for sample in samples])
        compare(made(case), samples, scores, 4)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(
    block=st.sampled_from([16, 32, 128]),
    kv_heads=st.integers(1, 8),
    spans=st.lists(
        st.tuples(st.sampled_from([TEXT, VIDEO, AUDIO]), st.integers(1, 2), st.integers(-1, 1)),
        min_size=2,
        max_size=5,
    ),
    trailing=st.integers(1, 9),
    levels=st.integers(1, 4),
    options=st.fixed_dictionaries(
        {
            "budget": st.sampled_from([0.1, 0.3, 0.6]),
            "tau": st.sampled_from([-1.0, 0.0, 0.2, 0.9]),
            "head_mode": st.sampled_from(["layer", "head"]),
            "tau_mode": st.sampled_from(["absolute", "absolute_pre_rope"]),
            "merge_space": st.sampled_from(["post_rope", "pre_rope"]),
        }
    ),
    seed=st.integers(0, 99),
)
def test_selection_at_block_borders_and_ties(
    block: int,
    kv_heads: int,
    spans: list[tuple[int, int, int]],
    trailing: int,
    levels: int,
    options: dict[str, Any],
    seed: int,
) -> None:
    """Spans end at, before and behind the border of a block; scores have few different values."""
    modality = [kind for kind, blocks, more in spans for _ in range(blocks * block + more)]
    modality += [TEXT] * trailing
    policy = make_policy("acckv", **options)
    samples = [Sample(modality, seed + one, kv_heads=kv_heads) for one in range(2)]
    hypothesis.assume(set(modality) != {TEXT} and frees(policy, samples[0], block))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (2, kv_heads, len(modality)), generator=generator).float()
    compare(policy, samples, scores, block)


@pytest.mark.parametrize("policy", ["snapkv", "lookm"])
def test_warm_up(policy: str) -> None:
    """Runs whether or not layers are decided together, and touches no block but the first."""
    layers = Cache(3, 2, 16, 16, torch.bfloat16, 40, 0).made()
    before = [cache.clone() for cache in layers.caches]
    warm_up(make_policy(policy), layers.caches, 4, torch.bfloat16, 32)
    for cache, old in zip(layers.caches, before, strict=True):
        assert torch.equal(cache[1:], old[1:])


def test_caches_of_one_form() -> None:
    one = torch.zeros(3, HEADS, 16, 32)
    with pytest.raises(ValueError, match="2 forms"):
        PagedLayers([one, one[:2]], torch.zeros(3, dtype=torch.int32))
