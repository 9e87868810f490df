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
from vllm_acckv.rotary import rotate
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import DenseStates

HEADS = 3


def selected(
    policy: AccKVPlus,
    modality: np.ndarray,
    scores: np.ndarray,
    keys: np.ndarray | None = None,
    angles: np.ndarray | None = None,
) -> np.ndarray:
    """bool ``[S, l]``.

    Args:
        keys: fp32 ``[HEADS, l, 4]`` before rotary embedding by ``angles`` fp32 ``[l, 2]``.
    """
    if keys is None:
        keys = np.zeros((HEADS, len(modality), 4), np.float32)
    if angles is None:
        angles = np.zeros((len(modality), 2), np.float32)
    turns = torch.from_numpy(angles)
    prompt = Prompt.of(Layout(modality), torch.device("cpu"), turns)
    states = DenseStates(rotate(torch.from_numpy(keys), turns), torch.zeros(keys.shape))
    chosen = policy.select(torch.from_numpy(scores), states, prompt, Layer())
    assert chosen.size == policy.entries(prompt.layout, Layer())
    keep: np.ndarray = chosen.keep.numpy()
    return keep


def naive(
    modality: np.ndarray, attention: np.ndarray, worth: np.ndarray, count: int, policy: AccKVPlus
) -> list[int]:
    """Tokens that stay for one head, ascending.

    Args:
        attention, worth: ``[l]``; what divides the parts, and what is best.
        count: of the audio-video tokens that stay.
    """
    places = {code: [i for i, one in enumerate(modality) if one == code] for code in (VIDEO, AUDIO)}
    total, share = round(policy.coverage * count), np.float32(0.5)
    if policy.focusing and places[VIDEO] and places[AUDIO]:
        video, audio = (np.float32(np.sqrt(attention[one].mean())) for one in places.values())
        if video + audio > 0:
            share = video / (video + audio)
    wanted = round(float(share * np.float32(total)))
    of_video = min(max(wanted, total - len(places[AUDIO])), len(places[VIDEO]))
    chosen = []
    for code, parts in ((VIDEO, of_video), (AUDIO, total - of_video)):
        mine = places[code]
        numbered = [(place * parts // len(mine), i) for place, i in enumerate(mine)]
        for _, several in groupby(numbered, key=lambda pair: pair[0]):
            if parts:
                chosen.append(max((i for _, i in several), key=lambda i: (worth[i], -i)))
    rest = [i for mine in places.values() for i in mine if i not in chosen]
    rest.sort(key=lambda i: (-worth[i], i))
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


@given(
    prompts(),
    st.sampled_from([0.05, 0.2, 0.5, 1.0, 7]),
    st.sampled_from([0.0, 0.3, 0.75, 1.0]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_is_the_naive_choice(
    prompt: tuple[np.ndarray, np.ndarray], budget: float, coverage: float, focusing: bool
) -> None:
    modality, scores = prompt
    options = {"budget": budget, "coverage": coverage, "focusing": focusing, "distinct": False}
    policy = make_policy("acckv_plus", **options)
    assert isinstance(policy, AccKVPlus)
    keep = selected(policy, modality, scores)
    count = policy.kept(Layout(modality))
    for head in range(HEADS):
        expected = naive(modality, scores[head], scores[head], count, policy)
        assert np.flatnonzero(keep[head]).tolist() == expected
    together = selected(policy.model_copy(update={"head_mode": "layer"}), *prompt)
    mean = torch.from_numpy(scores).mean(0).numpy()
    expected = naive(modality, mean, mean, count, policy)
    assert np.flatnonzero(together[0]).tolist() == expected


@given(
    prompts(),
    st.sampled_from([0.2, 0.5]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_keys_unlike_those_of_text_are_worth_more(
    prompt: tuple[np.ndarray, np.ndarray], budget: float, coverage: float, seed: int
) -> None:
    modality, _ = prompt
    length, rng = len(modality), np.random.default_rng(seed)
    scores = rng.random((HEADS, length), dtype=np.float32)  # no two are equal
    keys = rng.normal(size=(HEADS, length, 4)).astype(np.float32)
    angles = rng.uniform(0, 99, (length, 2)).astype(np.float32)
    policy = AccKVPlus(budget=budget, coverage=coverage)
    keep = selected(policy, modality, scores, keys, angles)
    # What text is like is all that counts: with a bias of keys nothing changes.
    biased = selected(policy, modality, scores, keys + np.float32([9, -5, 0, 7]), angles)
    assert (keep == biased).mean() > 0.98  # but for what fp32 rounds away
    worth = scores.astype(np.float64)
    for head in range(HEADS):
        centre = keys[head, modality == TEXT].mean(0, dtype=np.float64)
        square = ((keys[head] - centre) ** 2).sum(-1)
        for code in (VIDEO, AUDIO):
            mine = modality == code
            if mine.any():
                worth[head, mine] *= (square[mine] / square[mine].mean()) ** 2
        count = policy.kept(Layout(modality))
        expected = naive(modality, scores[head], worth[head], count, policy)
        assert np.flatnonzero(keep[head]).tolist() == expected


@pytest.mark.parametrize("coverage", [0.5, 1.0])
@pytest.mark.parametrize("focusing", [True, False])
def test_keeps_something_of_every_part(coverage: float, focusing: bool) -> None:
    """Even if the text looks at the first second alone."""
    modality = np.array([TEXT] * 3 + [VIDEO] * 80 + [AUDIO] * 200 + [TEXT] * 5, np.int8)
    scores = np.linspace(1, 0, len(modality), dtype=np.float32) ** 20 * np.ones((HEADS, 1), "f4")
    keep = selected(AccKVPlus(budget=0.2, coverage=coverage, focusing=focusing), modality, scores)
    parts = {VIDEO: 28, AUDIO: 28}
    if focusing:
        video, audio = (scores[0, modality == code].mean() ** 0.5 for code in (VIDEO, AUDIO))
        parts[VIDEO] = round(float(56 * coverage * video / (video + audio)))
        assert parts[VIDEO] > 28 * coverage
        parts[AUDIO] = round(56 * coverage) - parts[VIDEO]
    for code, count in parts.items():
        places = np.flatnonzero(modality == code)
        for part in np.array_split(places, max(1, count // 4)):  # they hold a whole part each
            assert keep[:, part].any(1).all()
    off = selected(AccKVPlus(budget=0.2, coverage=0), modality, scores)
    assert not off[:, modality == AUDIO].any()


def test_a_broken_key_does_not_decide() -> None:
    modality = np.array([TEXT] + [VIDEO] * 20 + [TEXT] * 4, np.int8)
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(HEADS, len(modality), 4)).astype(np.float32)
    scores = np.ones((HEADS, len(modality)), np.float32)
    policy = AccKVPlus(budget=0.5, coverage=0)
    sound = selected(policy, modality, scores, keys)
    for broken in (np.nan, np.inf, -np.inf, 1e25):
        one = keys.copy()
        one[0, 5, 1] = broken
        keep = selected(policy, modality, scores, one)
        assert not keep[0, 5] and keep.sum(-1).tolist() == [15] * HEADS
        assert (keep != sound).sum() <= 2  # another token in its place, if it was kept
    keys[0, 0, 1] = 1e25  # text: what the keys of that head say is lost
    keep = selected(policy, modality, scores, keys)
    assert np.flatnonzero(keep[0]).tolist() == [*range(11), 21, 22, 23, 24]
    assert (keep[1:] == sound[1:]).all()


def test_layers_at_once_are_layers_one_by_one() -> None:
    modality = np.array([TEXT] * 2 + [VIDEO] * 30 + [AUDIO] * 21 + [TEXT] * 4, np.int8)
    angles = torch.rand(len(modality), 2)
    prompt = Prompt.of(Layout(modality), torch.device("cpu"), angles)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, HEADS, len(modality), generator=generator)
    states = DenseStates(*torch.rand(2, 4, HEADS, len(modality), 4, generator=generator))
    for mode in ("head", "layer"):
        policy = make_policy("acckv_plus", head_mode=mode)
        together = policy.select(scores, states, prompt, Layer())
        for index in range(4):
            one = DenseStates(states.key[index], states.value[index])
            alone = policy.select(scores[index], one, prompt, Layer())
            assert torch.equal(together.keep[index], alone.keep)
            assert torch.equal(together.fill_rank[index], alone.fill_rank)
