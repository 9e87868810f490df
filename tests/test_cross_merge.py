# SPDX-License-Identifier: Apache-2.0
"""The control of Table 2 against a naive form in NumPy, and what it promises."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_baselines import prompts
from tests.test_policy_invariants import LAYER, LAYOUTS, WIDTH, Sample
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Compacted, Layer
from vllm_acckv.policies.compression import Compressed
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

# Decisions closer than this may fall otherwise in float32.
CLEAR = 1e-5
WAYS = ["evict", "pooled", "nearest"]


@dataclass
class Naive:
    """What stays of one layer.

    Attributes:
        kept: positions.
        keys, values: ``[G, L, d]`` of those positions, in their order.
        pooled: keys and values ``[2, G, d]`` of the entry that was added, or ``None``.
        folded: audio tokens that went into a video token.
        gap: least distance of a decision.
    """

    kept: list[int]
    keys: np.ndarray
    values: np.ndarray
    pooled: np.ndarray | None
    folded: list[int]
    gap: float


def shares(modality: list[int], budget: float, scope: str, way: str) -> dict[int, int]:
    """Tokens of each modality that stay."""
    numbers = {m: modality.count(m) for m in (VIDEO, AUDIO)}
    whole, text = sum(numbers.values()), modality.count(TEXT)
    if scope == "av" and budget <= 1:
        return {m: math.floor(budget * number + 0.5) for m, number in numbers.items()}
    if scope == "av":
        room = min(int(budget), whole)
    else:
        total = math.floor(budget * len(modality) + 0.5) if budget <= 1 else int(budget)
        room = max(min(total, len(modality)) - text, 0)
    if room < whole and scope == "total" and way == "pooled":
        room = max(room - 1, 0)
    video = math.floor(room * numbers[VIDEO] / whole + 0.5)
    return {VIDEO: video, AUDIO: room - video}


def attention_of_text(sample: Sample, redistribution: str) -> np.ndarray:
    """Summed attention of the trailing text to every token, mean over query heads: ``[l]``."""
    queries, keys = sample.queries.double().numpy(), sample.keys.double().numpy()
    size, heads, first = keys.shape[1], len(queries), sample.layout.text_start
    scores = np.zeros(size)
    for head in range(heads):
        own = keys[head * len(keys) // heads]
        for i in range(first, size):
            weights = np.exp(own[: i + 1] @ queries[head, i] / math.sqrt(WIDTH))
            for j in range(i + 1):
                factor = 1.0
                if redistribution != "off":
                    seen_by = size - (max(j, first) if redistribution == "visible" else j)
                    factor = (i + 1) / seen_by
                scores[j] += factor * weights[j] / weights.sum() / heads
    return scores


def cosine(keys: np.ndarray, x: int, p: int) -> float:
    """Mean over heads."""
    each = [head[x] @ head[p] / np.linalg.norm(head[x]) / np.linalg.norm(head[p]) for head in keys]
    return float(np.mean(each))


def naive(sample: Sample, budget: float, scope: str, way: str, redistribution: str) -> Naive:
    modality = sample.modality.tolist()
    scores, gap = attention_of_text(sample, redistribution), math.inf
    kept = [j for j, m in enumerate(modality) if m == TEXT]
    for m, count in shares(modality, budget, scope, way).items():
        order = sorted((j for j, n in enumerate(modality) if n == m), key=lambda j: -scores[j])
        kept += order[:count]
        if 0 < count < len(order):
            gap = min(gap, 1 - scores[order[count]] / scores[order[count - 1]])
    kept = sorted(kept)
    keys, values = sample.keys.double().numpy(), sample.values.double().numpy()
    rest = [j for j in range(len(modality)) if j not in kept]
    pooled, folded, new = None, [], [keys.copy(), values.copy()]
    if way == "pooled" and rest:
        pooled = np.stack([states[:, rest].mean(1) for states in (keys, values)])
    pivots = [j for j in kept if modality[j] == VIDEO]
    if way == "nearest" and pivots:
        folded = [j for j in rest if modality[j] == AUDIO]
        parts: dict[int, list[int]] = {p: [] for p in pivots}
        for x in folded:
            similar = sorted(((cosine(keys, x, p), -p) for p in pivots), reverse=True)
            parts[-similar[0][1]].append(x)
            if len(similar) > 1:
                gap = min(gap, similar[0][0] - similar[1][0])
        for p, own in parts.items():
            for states, target in zip((keys, values), new, strict=True):
                halves = [states[:, p], *((states[:, x] + states[:, p]) / 2 for x in own)]
                target[:, p] = np.mean(halves, axis=0)
    return Naive(kept, new[0][:, kept], new[1][:, kept], pooled, folded, gap)


samples = st.builds(Sample, prompts, seed=st.integers(0, 99), kv_heads=st.sampled_from([1, 2, 4]))
budgets = st.floats(0.05, 1.0) | st.integers(2, 40)
scopes, ways = st.sampled_from(["av", "total"]), st.sampled_from(WAYS)
redistributions = st.sampled_from(["paper", "visible", "off"])


@settings(max_examples=150, deadline=None)
@given(samples, budgets, scopes, ways, redistributions)
def test_is_the_naive_form(
    sample: Sample, budget: float, scope: str, way: str, redistribution: str
) -> None:
    expected = naive(sample, budget, scope, way, redistribution)
    if expected.gap < CLEAR:
        return
    policy = make_policy(
        "cross_merge",
        budget=budget,
        budget_scope=scope,
        unimportant=way,
        redistribution=redistribution,
    )
    out = sample.compress(policy)
    merged = out.positions[0] < 0
    assert out.positions[0, ~merged].tolist() == expected.kept
    close = {"atol": 1e-5, "rtol": 0.0}
    for mine, entries in ((out.keys, expected.keys), (out.values, expected.values)):
        np.testing.assert_allclose(mine[:, ~merged].numpy(), entries, **close)
    if expected.pooled is None:
        assert not merged.any()
    else:
        mine = torch.stack([out.keys[:, merged][:, 0], out.values[:, merged][:, 0]])
        np.testing.assert_allclose(mine.numpy(), expected.pooled, **close)
    assert out.keys.shape[1] == policy.entries(sample.layout, LAYER)
    check_accounts(sample, out, expected, way)


def check_accounts(sample: Sample, out: Compressed, expected: Naive, way: str) -> None:
    """Every token is kept, merged or evicted, and which of them follows from ``unimportant``."""
    modality = sample.modality.tolist()
    for name, code in (("text", TEXT), ("video", VIDEO), ("audio", AUDIO)):
        total = modality.count(code)
        kept = sum(modality[j] == code for j in expected.kept)
        gone = total - kept
        merged = {"evict": 0, "pooled": gone}.get(way, 0)
        if way == "nearest" and code == AUDIO:
            merged = len(expected.folded)
        assert out.stats.kept[name] == pytest.approx(kept)
        assert out.stats.merged[name] == pytest.approx(merged)
        assert out.stats.evicted[name] == pytest.approx(gone - merged)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_text_and_what_nothing_was_merged_into_is_untouched(layout: str, way: str) -> None:
    sample = Sample(LAYOUTS[layout](40, 30, 5), dtype=torch.bfloat16)
    out = sample.compress(make_policy("cross_merge", budget=0.2, unimportant=way))
    changed = []
    for slot, position in enumerate(out.positions[0].tolist()):
        if position < 0:
            continue
        same = torch.equal(out.keys[:, slot], sample.keys[:, position])
        same &= torch.equal(out.values[:, slot], sample.values[:, position])
        if not same:
            changed.append(position)
    if way == "nearest":
        assert changed and all(sample.modality[position] == VIDEO for position in changed)
    else:
        assert not changed
    assert out.keys.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_each_modality_keeps_its_own_share(way: str) -> None:
    """Whatever the attention: half of 9 video tokens rounds up to 5, half of 6 audio is 3."""
    sample = Sample(LAYOUTS["contiguous"](9, 6, 4))
    scores = torch.zeros(2, sample.layout.length)
    scores[:, sample.modality == AUDIO] = 1
    policy = make_policy("cross_merge", budget=0.5, unimportant=way)
    out = sample.compress(policy, scores=scores)
    assert (out.stats.kept["video"], out.stats.kept["audio"]) == (5, 3)
    assert out.keys.shape[1] == 7 + 5 + 3 + (way == "pooled")


def by_hand(way: str, **options: Any) -> Compressed:
    """Three video tokens, two audio, one text; the first video and the last audio stay."""
    keys = torch.tensor([[[4.0, 0], [0, 2], [0, 6], [3, 0], [0, 8], [1, 1]]])
    values = torch.tensor([[[2.0, 2], [1, 1], [3, 3], [6, 4], [9, 9], [5, 5]]])
    modality = torch.tensor([VIDEO] * 3 + [AUDIO] * 2 + [TEXT], dtype=torch.int8)
    scores = torch.tensor([[9.0, 1, 2, 3, 8, 0]])
    policy = make_policy("cross_merge", budget=0.4, unimportant=way)
    return policy.compress(None, keys, values, modality, scores=scores, **options)


def test_by_hand() -> None:
    kept = {"keys": [[4.0, 0], [0, 8], [1, 1]], "values": [[2.0, 2], [9, 9], [5, 5]]}
    evict = by_hand("evict")
    assert evict.positions.tolist() == [[0, 4, 5]]
    assert (evict.keys[0].tolist(), evict.values[0].tolist()) == (kept["keys"], kept["values"])
    # Tokens 1, 2 and 3 in one entry, which stands where the last of them was.
    pooled = by_hand("pooled")
    assert pooled.positions.tolist() == [[0, -1, 4, 5]]
    torch.testing.assert_close(pooled.keys[0, 1], torch.tensor([1.0, 8 / 3]))
    torch.testing.assert_close(pooled.values[0, 1], torch.tensor([10 / 3, 8 / 3]))
    # Audio token 3 goes into video token 0, the only one that stays: (p + (x + p) / 2) / 2.
    nearest = by_hand("nearest")
    assert nearest.positions.tolist() == [[0, 4, 5]]
    assert nearest.keys[0].tolist() == [[3.75, 0], [0, 8], [1, 1]]
    assert nearest.values[0].tolist() == [[3.0, 2.5], [9, 9], [5, 5]]
    assert nearest.stats.merged == {"text": 0, "video": 0, "audio": 1}
    assert nearest.stats.evicted == {"text": 0, "video": 2, "audio": 0}


def test_a_token_that_fills_a_block_is_not_merged_into_another() -> None:
    """One slot is spare in blocks of 2, and the best unimportant token, audio, takes it."""
    out = by_hand("nearest", block_size=2)
    assert out.positions.tolist() == [[0, 3, 4, 5]]
    assert out.keys[0, 0].tolist() == [4, 0]
    assert sum(out.stats.merged.values()) == 0


@pytest.mark.parametrize("layout", ["video_only", "audio_only"])
def test_of_one_modality_nothing_crosses(layout: str) -> None:
    sample = Sample(LAYOUTS[layout](20, 10, 4))
    evict, pooled, nearest = (
        sample.compress(make_policy("cross_merge", budget=0.3, unimportant=way)) for way in WAYS
    )
    assert torch.equal(evict.keys, nearest.keys)
    assert torch.equal(evict.values, nearest.values)
    assert evict.stats == nearest.stats
    assert pooled.stats.merged_entries == 1
    assert pooled.keys.shape[1] == evict.keys.shape[1] + 1


def test_without_kept_video_audio_is_dropped() -> None:
    sample = Sample(LAYOUTS["contiguous"](2, 40, 4))
    out = sample.compress(make_policy("cross_merge", budget=0.1, unimportant="nearest"))
    assert out.stats.kept["video"] == 0 and out.stats.kept["audio"] == 4
    assert out.stats.evicted == {"text": 0, "video": 2, "audio": 36}


def test_pieces_of_the_similarities_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(LAYOUTS["interleaved"](40, 30, 5))
    policy = make_policy("cross_merge", budget=0.2, unimportant="nearest")
    whole = sample.compress(policy)
    monkeypatch.setattr("vllm_acckv.policies.cross_merge._MAX_SIMILARITIES", 200)
    parts = sample.compress(policy)
    assert torch.equal(whole.positions, parts.positions)
    torch.testing.assert_close(whole.keys, parts.keys)
    torch.testing.assert_close(whole.values, parts.values)


class Meeting:
    """Two ranks in two threads; each waits until both have brought their value."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.values: dict[int, torch.Tensor] = {}

    def of(self, rank: int) -> Any:
        meeting = self

        class Ranks:
            def all(self, value: torch.Tensor) -> list[torch.Tensor]:
                meeting.values[rank] = value
                meeting.barrier.wait()
                found = [meeting.values[0], meeting.values[1]]
                meeting.barrier.wait()
                return found

            def mean(self, value: torch.Tensor) -> torch.Tensor:
                return torch.stack(self.all(value)).mean(0)

            def max(self, value: torch.Tensor) -> torch.Tensor:
                return torch.stack(self.all(value)).amax(0)

        return Ranks()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_agree(way: str, block_size: int) -> None:
    """Half of the KV heads each, and the same entries as one rank with all of them."""
    sample = Sample(LAYOUTS["contiguous"](40, 30, 5), kv_heads=4)
    policy = make_policy("cross_merge", budget=0.2, unimportant=way)
    scores, meeting = sample.scores(policy), Meeting()
    whole = sample.compact(policy, scores, block_size)
    found: dict[int, Compacted] = {}

    def run(rank: int) -> None:
        own = slice(2 * rank, 2 * rank + 2)
        layer = Layer(LAYER.index, LAYER.count, meeting.of(rank))
        found[rank] = policy.compact(
            scores[own], sample.keys[own], sample.values[own], sample.prompt, layer, block_size
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("key", "value", "positions"):
        both = torch.cat([getattr(found[0], name), getattr(found[1], name)])
        torch.testing.assert_close(both, getattr(whole, name))
