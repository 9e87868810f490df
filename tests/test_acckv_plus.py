# SPDX-License-Identifier: Apache-2.0
"""AccKV+ against loops, and what it promises: something of every part of a clip."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_acckv.policies import make_policy
from vllm_acckv.policies.acckv_plus import AccKVPlus
from vllm_acckv.policies.base import Layer, Prompt
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import DenseStates

HEADS = 3


def selected(policy: AccKVPlus, modality: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """bool ``[S, l]``."""
    prompt = Prompt.of(Layout(modality), torch.device("cpu"))
    states = DenseStates(*torch.zeros(2, HEADS, len(modality), 4))
    chosen = policy.select(torch.from_numpy(scores), states, prompt, Layer())
    assert chosen.size == policy.entries(prompt.layout, Layer())
    keep: np.ndarray = chosen.keep.numpy()
    return keep


def naive(modality: np.ndarray, scores: np.ndarray, count: int, coverage: float) -> list[int]:
    """Tokens that stay for one head, ascending. ``scores`` ``[l]``; ``count`` of audio-video."""
    places = {code: [i for i, one in enumerate(modality) if one == code] for code in (VIDEO, AUDIO)}
    present = [code for code in (VIDEO, AUDIO) if places[code]]
    total, chosen = round(coverage * count), []
    for number, code in enumerate(present):
        share = total // len(present)
        if total % len(present) > len(present) - 1 - number:
            share += 1
        mine = places[code]
        parts = min(share, len(mine))
        numbered = [(place * parts // len(mine), i) for place, i in enumerate(mine)]
        for _, several in groupby(numbered, key=lambda pair: pair[0]):
            if parts:
                chosen.append(max((i for _, i in several), key=lambda i: (scores[i], -i)))
    rest = [i for code in present for i in places[code] if i not in chosen]
    rest.sort(key=lambda i: (-scores[i], i))
    text = [i for i, one in enumerate(modality) if one == TEXT]
    return sorted([*text, *chosen, *rest[: count - len(chosen)]])


@st.composite
def prompts(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    spans = draw(
        st.lists(
            st.tuples(st.sampled_from([TEXT, VIDEO, AUDIO]), st.integers(1, 12)),
            min_size=1,
            max_size=6,
        )
    )
    clip = (draw(st.sampled_from([VIDEO, AUDIO])), 3)
    modality = [code for code, n in [*spans, clip, (TEXT, 4)] for _ in range(n)]
    seed = draw(st.integers(0, 2**32 - 1))
    # Few values, so that many are equal.
    scores = np.random.default_rng(seed).integers(0, 9, (HEADS, len(modality)))
    return np.array(modality, np.int8), scores.astype(np.float32)


@given(prompts(), st.sampled_from([0.05, 0.2, 0.5, 1.0, 7]), st.sampled_from([0.0, 0.3, 0.75, 1.0]))
@settings(max_examples=300, deadline=None)
def test_is_the_naive_choice(
    prompt: tuple[np.ndarray, np.ndarray], budget: float, coverage: float
) -> None:
    modality, scores = prompt
    policy = AccKVPlus(budget=budget, coverage=coverage)
    keep = selected(policy, modality, scores)
    count = policy.kept(Layout(modality))
    for head in range(HEADS):
        expected = naive(modality, scores[head], count, coverage)
        assert np.flatnonzero(keep[head]).tolist() == expected
    together = selected(AccKVPlus(budget=budget, coverage=coverage, head_mode="layer"), *prompt)
    mean = torch.from_numpy(scores).mean(0).numpy()
    expected = naive(modality, mean, count, coverage)
    assert np.flatnonzero(together[0]).tolist() == expected


@pytest.mark.parametrize("coverage", [0.5, 1.0])
def test_keeps_something_of_every_part(coverage: float) -> None:
    """Even if the text looks at the first second alone."""
    modality = np.array([TEXT] * 3 + [VIDEO] * 80 + [AUDIO] * 200 + [TEXT] * 5, np.int8)
    scores = np.linspace(1, 0, len(modality), dtype=np.float32) ** 20 * np.ones((HEADS, 1), "f4")
    policy = AccKVPlus(budget=0.2, coverage=coverage)
    keep = selected(policy, modality, scores)
    for code, parts in policy.parts(Layout(modality)).items():
        assert parts == round(coverage * 56) // 2
        places = np.flatnonzero(modality == code)
        for part in np.array_split(places, parts // 2):  # longer ones hold a whole part each
            assert keep[:, part].any(1).all()
    off = selected(AccKVPlus(budget=0.2, coverage=0), modality, scores)
    assert not off[:, modality == AUDIO].any()


def test_layers_at_once_are_layers_one_by_one() -> None:
    modality = np.array([TEXT] * 2 + [VIDEO] * 30 + [AUDIO] * 21 + [TEXT] * 4, np.int8)
    prompt = Prompt.of(Layout(modality), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, HEADS, len(modality), generator=generator)
    states = DenseStates(*torch.zeros(2, 4, HEADS, len(modality), 4))
    for mode in ("head", "layer"):
        policy = make_policy("acckv_plus", head_mode=mode)
        together = policy.select(scores, states, prompt, Layer())
        for index in range(4):
            one = DenseStates(states.key[index], states.value[index])
            alone = policy.select(scores[index], one, prompt, Layer())
            assert torch.equal(together.keep[index], alone.keep)
            assert torch.equal(together.fill_rank[index], alone.fill_rank)
