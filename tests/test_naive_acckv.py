# SPDX-License-Identifier: Apache-2.0
"""The test oracle itself: hand-computed cases and the invariants of the specification."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.naive_acckv import (
    AUDIO,
    TEXT,
    VIDEO,
    LayerSelection,
    Options,
    closest_call,
    column_sums,
    first_trailing_text,
    naive_budget,
    naive_plan,
    naive_select,
    redistribute,
    worst_case,
)

HAND_MODALITY = [TEXT, VIDEO, VIDEO, AUDIO, AUDIO, TEXT, TEXT]


def hand_case() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """One head, seven tokens; s = .4 .2 | .5 .2, so W_v = 6/13 and audio has priority."""
    A = torch.zeros(1, 7, 7)
    A[0, 5] = torch.tensor([0.1, 0.3, 0.1, 0.2, 0.1, 0.2, 0.0])
    A[0, 6] = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.2])
    K = torch.zeros(1, 7, 2)
    K[0, 1:5] = torch.tensor([[1.0, 1.0], [3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    V = torch.arange(14.0).reshape(1, 7, 2)
    return A, K, V, HAND_MODALITY


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A [4, l, l], K and V [2, l, 8]; blocks or interleaved audio/video with text between."""
    rng = torch.Generator().manual_seed(seed)
    n_video, n_audio, prefix, n_text = torch.randint(2, 20, (4,), generator=rng).tolist()
    av = [VIDEO] * n_video + [TEXT] + [AUDIO] * n_audio
    if seed % 2:
        av = [av[j] for j in torch.randperm(len(av), generator=rng).tolist()]
    modality = [TEXT] * prefix + av + [TEXT] * n_text
    size = len(modality)
    logits = 2 * torch.randn(4, size, size, generator=rng)
    hidden = torch.ones(size, size).triu(1).bool()
    A = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    K = torch.randn(2, size, 8, generator=rng) + torch.randn(2, 1, 8, generator=rng)
    return A, K, torch.randn(2, size, 8, generator=rng), modality


def entries(selection: LayerSelection) -> list[int]:
    return [len(k) + len(m) for k, m in zip(selection.kept, selection.merged, strict=True)]


@pytest.mark.parametrize("k", [1, 2])
def test_hand_case_tau_removes_the_merged_video(k: int) -> None:
    """k = 1 keeps the same as k = 2: each modality has at least one token (E1)."""
    A, K, V, modality = hand_case()
    got = naive_select(A, K, V, modality, Options(k, tau=0.6, redistribution="off", block_size=1))
    assert got.W_v == pytest.approx([6 / 13])
    assert (got.f, got.length, got.kept) == (1, 6, [[0, 1, 3, 5, 6]])
    assert list(got.merged[0]) == [AUDIO]
    assert torch.equal(got.merged[0][AUDIO][0], K[0, 4])
    assert torch.equal(got.merged[0][AUDIO][1], V[0, 4])
    assert got.heads[0].similarity == pytest.approx({1: 0.5**0.5, "merged": 0.5})
    assert closest_call(got, Options(k, tau=0.6)) == pytest.approx(1 / 13)


def test_hand_case_fillers_take_rejected_tokens_last() -> None:
    """tau = .8 rejects token 1, yet tokens 4 and 2 of lower score fill up before it."""
    A, K, V, modality = hand_case()
    opts = Options(2, tau=0.8, redistribution="off", keep_prefix=False, block_size=2)
    got = naive_select(A, K, V, modality, opts)
    assert (got.unaligned, got.f, got.length) == ([4], 1, 5)
    assert (got.kept, got.fillers, got.evicted) == ([[3, 4, 5, 6]], [[4]], [[0, 1, 2]])
    assert torch.equal(got.merged[0][AUDIO][0], K[0, 4])  # merged before filling


def test_hand_case_redistribution() -> None:
    """Token 1: rows 5 and 6 weigh 6 and 7, column 1 is seen by 6 rows, by 2 of them in T."""
    A = hand_case()[0]
    for mode, expected in (("off", 0.4), ("paper", 2.5 / 6), ("visible", 2.5 / 2)):
        assert float(column_sums(A, 5, mode)[0, 1]) == pytest.approx(expected)


def test_layer_with_no_whole_block_to_free_is_untouched() -> None:
    A, K, V, modality = hand_case()
    got = naive_select(A, K, V, modality, Options(2, tau=0.6, block_size=2))
    assert (got.f, got.length, got.kept, got.merged) == (0, 7, [list(range(7))], [{}])


@pytest.mark.parametrize("seed", range(6))
def test_invariant_1_weights(seed: int) -> None:
    A, K, V, modality = random_case(seed)
    swapped = [{TEXT: TEXT, VIDEO: AUDIO, AUDIO: VIDEO}[m] for m in modality]
    for mode in ("layer", "head"):
        opts = Options(6, tau=0.3, head_mode=mode, block_size=2)
        got = naive_select(A, K, V, modality, opts)
        assert all(0 <= w <= 1 for w in got.W_v)
        scaled = naive_select(A * 64, K, V, modality, opts)
        assert scaled.kept == got.kept
        assert scaled.W_v == pytest.approx(got.W_v)
        mirrored = naive_select(A, K, V, swapped, opts)
        assert mirrored.kept == got.kept
        assert mirrored.W_v == pytest.approx([1 - w for w in got.W_v])
    zero = naive_select(torch.zeros_like(A), K, V, modality, Options(6, block_size=2))
    assert zero.W_v == [0.5, 0.5]


def test_invariant_2_uniform_attention() -> None:
    size, t0 = 40, 33
    A = torch.ones(1, size, size).tril() / torch.arange(1.0, size + 1)[:, None]
    assert torch.allclose(redistribute(A, t0, "paper").sum(dim=1), torch.ones(1, size).double())
    assert torch.allclose(column_sums(A, t0, "visible")[:, :t0], torch.ones(1, t0).double())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", ["layer", "head"])
def test_invariant_4_counts_and_plan_bound(seed: int, mode: str) -> None:
    A, K, V, modality = random_case(seed)
    n_av = sum(m != TEXT for m in modality)
    for budget in (0.1, 0.5, 0.9, 3.0):
        for keep_prefix in (True, False):
            k, f_bound, active = naive_plan(modality, budget, 2, keep_prefix=keep_prefix)
            opts = Options(k, 0.2, head_mode=mode, keep_prefix=keep_prefix, block_size=2)
            got = naive_select(A, K, V, modality, opts)
            assert set(entries(got)) == {got.length} == {len(modality) - 2 * got.f}
            assert got.f >= f_bound and (active or f_bound == 0)
            trailing = set(range(first_trailing_text(modality), len(modality)))
            for head, kept in zip(got.heads, got.kept, strict=True):
                counts = [len(rows) for rows in head.top.values()]
                assert min(counts) >= 1 and max(k, 2) <= sum(counts) <= max(min(k, n_av) + 1, 2)
                assert trailing <= set(kept)


@pytest.mark.parametrize("seed", range(4))
def test_invariant_6_everything_within_budget_is_the_full_cache(seed: int) -> None:
    A, K, V, modality = random_case(seed)
    opts = Options(len(modality), tau=-1.01, block_size=1)
    got = naive_select(A, K, V, modality, opts)
    assert got.kept == [list(range(len(modality)))] * 2 and got.merged == [{}, {}]


@pytest.mark.parametrize("seed", range(6))
def test_invariant_7_tau_only_thins_the_low_priority_set(seed: int) -> None:
    A, K, V, modality = random_case(seed)
    previous: set[int] | None = None
    for tau in (-1.01, 0.0, 0.2, 0.4, 0.6, 1.01):
        head = naive_select(A, K, V, modality, Options(8, tau=tau, block_size=1)).heads[0]
        hi, lo = (VIDEO, AUDIO) if head.video_weight >= 0.5 else (AUDIO, VIDEO)
        av = {j for j in head.kept if modality[j] != TEXT}
        assert head.top[hi] <= av <= head.top[hi] | head.top[lo]
        assert previous is None or av <= previous
        assert tau > -1 or av == head.top[hi] | head.top[lo]
        assert tau < 1 or (av == head.top[hi] and lo not in head.merged)
        previous = av


@pytest.mark.parametrize("seed", range(4))
def test_invariant_8_merging_conserves_sums(seed: int) -> None:
    A, K, V, modality = random_case(seed)
    got = naive_select(A, K, V, modality, Options(5, tau=-1.01, block_size=1))
    for g, head in enumerate(got.heads):
        for m, top in head.top.items():
            rows = [j for j, kind in enumerate(modality) if kind == m]
            for states, side in ((K, 0), (V, 1)):
                total = states[g, sorted(top)].sum(dim=0)
                if m in head.merged:
                    total = total + len(head.merge_sources[m]) * head.merged[m][side]
                assert torch.allclose(total, states[g, rows].sum(dim=0), atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_invariant_11_top_of_a_modality_is_its_share_of_the_joint_top(seed: int) -> None:
    A, K, V, modality = random_case(seed)
    opts = Options(7, tau=-1.01, block_size=1)
    merged = naive_select(A, K, V, modality, opts).heads[0]
    plain = naive_select(A, K, V, modality, replace(opts, calibration=False)).heads[0]
    for m in (VIDEO, AUDIO):
        assert merged.top[m] == plain.top[m] or (not plain.top[m] and len(merged.top[m]) == 1)
    assert sum(len(rows) for rows in plain.top.values()) == 7


def test_quantile_and_head_mode() -> None:
    """The tau-quantile rejects that share of the low-priority set in every KV head."""
    A, K, V, modality = random_case(1)
    opts = Options(10, tau=0.5, head_mode="head", tau_mode="quantile", block_size=1)
    for head in naive_select(A, K, V, modality, opts).heads:
        below = [x for x in head.similarity.values() if x < head.threshold]
        assert len(below) == len(head.similarity) // 2
    keys = K[:1].expand(2, -1, -1)
    tied = naive_select(A[:1].expand(4, -1, -1), keys, keys, modality, opts)
    assert tied.kept[0] == tied.kept[1] and tied.W_v[0] == tied.W_v[1]


def test_similarity_is_the_mean_over_kv_heads_in_layer_mode() -> None:
    A, K, V, modality = hand_case()
    K2 = torch.cat([K, -K])
    K2[1, 1:3] = torch.tensor([1.0, 0.0])  # cosine -1 and 0 with the anchors of head 1
    opts = Options(2, tau=0.0, redistribution="off", block_size=1)
    got = naive_select(A.expand(2, -1, -1), K2, torch.cat([V, V]), modality, opts)
    similarity = {1: (0.5**0.5 - 0.5) / 2, "merged": 0.0}
    assert got.heads[1].similarity == pytest.approx(similarity)
    assert got.heads[1].rejected == set() and list(got.heads[1].merged) == [VIDEO, AUDIO]


def test_lowest_positions_win_ties() -> None:
    A, K, V, modality = hand_case()
    opts = Options(2, calibration=False, block_size=1)
    got = naive_select(torch.zeros_like(A), K, V, modality, opts)
    assert got.kept == [[0, 1, 2, 5, 6]]


def test_single_modality_merges_without_focusing_or_filter() -> None:
    A, K, V, _ = hand_case()
    modality = [TEXT, AUDIO, AUDIO, AUDIO, AUDIO, TEXT, TEXT]
    opts = Options(2, tau=1.01, redistribution="off", block_size=1)
    got = naive_select(A, K, V, modality, opts)
    assert (got.W_v, got.kept, list(got.merged[0])) == ([0.0], [[0, 1, 3, 5, 6]], [AUDIO])
    assert torch.equal(got.merged[0][AUDIO][0], (K[0, 2] + K[0, 4]) / 2)


def test_latest_prefix_text_fills_when_audio_and_video_run_out() -> None:
    A, K, V, _ = hand_case()
    A = torch.nn.functional.pad(A, (3, 0, 3, 0))
    K, V = (torch.nn.functional.pad(states, (0, 0, 3, 0)) for states in (K, V))
    opts = Options(3, redistribution="off", calibration=False, keep_prefix=False, block_size=3)
    got = naive_select(A, K, V, [TEXT] * 3 + HAND_MODALITY, opts)
    assert (got.unaligned, got.length, got.fillers) == ([5], 7, [[5, 3]])
    assert (got.kept, got.merged) == ([[3, 4, 5, 6, 7, 8, 9]], [{}])


def test_kv_heads_fill_up_to_the_longest() -> None:
    """Head 1 rejects both video tokens, head 0 none; tokens fill up by score."""
    A, K, V, modality = hand_case()
    K, V = torch.cat([K, K]), torch.cat([V, V])
    K[0, 1:5] = torch.tensor([1.0, 0.0])
    opts = Options(4, redistribution="off", head_mode="head", keep_prefix=False, block_size=1)
    got = naive_select(A.expand(2, -1, -1), K, V, modality, opts)
    assert got.unaligned == [6, 4] and got.fillers == [[], [1, 2]]
    assert got.kept == [[1, 2, 3, 4, 5, 6]] * 2


def test_plan_by_hand() -> None:
    modality = [TEXT] * 3 + [VIDEO] * 10 + [AUDIO] * 15 + [TEXT] * 4
    assert naive_plan(modality, 0.1, 4) == (3, (32 - (7 + 4 + 2)) // 4, True)  # 2.5 rounds up
    assert naive_plan(modality, 5, 4, calibration=False) == (5, 5, True)
    assert naive_plan(modality, 5, 4, calibration=False, keep_prefix=False) == (5, 5, True)
    assert naive_plan(modality, 0.5, 4, scope="total") == (7, (32 - (7 + 8 + 2)) // 4, True)
    assert naive_plan(modality, 9, 4, scope="total") == (0, (32 - (7 + 2 + 2)) // 4, True)
    assert naive_plan(modality, 1.0, 4) == (25, 0, False)
    assert naive_plan(modality, 99, 4) == (25, 0, False)
    assert naive_plan(modality, 99, 1, calibration=False, keep_prefix=False) == (25, 0, False)
    assert naive_plan(modality, 0.1, 32) == (3, 0, False)
    assert naive_plan([TEXT] * 20, 0.1, 4) == (0, 0, False)
    assert naive_plan(modality[:-4], 0.1, 4) == (3, 0, False)


def test_strict_budget_takes_the_token_from_the_other_modality() -> None:
    """The joint top 2 are both audio; video gains its best token."""
    A, K, V, modality = hand_case()
    A = A.clone()
    A[0, 5:, 4] = 1.0  # s = .4 .2 | .5 2.
    opts = Options(2, tau=-1.0, redistribution="off", block_size=1)
    assert naive_select(A, K, V, modality, opts).heads[0].top == {VIDEO: {1}, AUDIO: {3, 4}}
    strict = replace(opts, strict_budget="tokens")
    assert naive_select(A, K, V, modality, strict).heads[0].top == {VIDEO: {1}, AUDIO: {4}}
    one = replace(strict, k=1)  # audio has no second token to give
    assert naive_select(A, K, V, modality, one).heads[0].top == {VIDEO: {1}, AUDIO: {4}}
    none = replace(opts, min_per_modality=False)
    got = naive_select(A, K, V, modality, none)
    assert got.heads[0].top == {VIDEO: set(), AUDIO: {3, 4}}
    assert got.kept == [[0, 3, 4, 5, 6]] and list(got.merged[0]) == [VIDEO]


def test_filter_spares_the_merged_entry_and_the_best_tokens() -> None:
    """With tau = .8 token 1 (.71) and the merged video (.5) would be dropped."""
    A, K, V, modality = hand_case()
    opts = Options(2, tau=0.8, redistribution="off", block_size=1)
    assert naive_select(A, K, V, modality, opts).kept == [[0, 3, 5, 6]]
    got = naive_select(A, K, V, modality, replace(opts, filter_merged=False))
    assert got.kept == [[0, 3, 5, 6]] and list(got.merged[0]) == [VIDEO, AUDIO]
    assert got.heads[0].similarity == pytest.approx({1: 0.5**0.5})
    got = naive_select(A, K, V, modality, replace(opts, min_keep_low=1))
    assert got.kept == [[0, 1, 3, 5, 6]] and list(got.merged[0]) == [AUDIO]


def test_position_prior_keeps_the_latest_and_needs_no_text() -> None:
    A, K, V, modality = hand_case()
    opts = Options(2, calibration=False, focusing=False, position_prior=True, block_size=1)
    assert naive_select(A, K, V, modality, opts).kept == [[0, 3, 4, 5, 6]]
    assert naive_select(A, K, V, modality, opts).W_v == pytest.approx([22 / 57])  # 1/6 1/5|1/4 1/3
    short = naive_select(A[:, :5, :5], K[:, :5], V[:, :5], modality[:5], opts)
    assert short.kept == [[0, 3, 4]]


def test_without_blocks_a_single_dropped_token_is_merged() -> None:
    """The mean of one token is that token; nothing shrinks, yet the layer is compressed."""
    A, K, V, _ = hand_case()
    modality = [TEXT, TEXT, TEXT, VIDEO, VIDEO, TEXT, TEXT]
    opts = Options(1, redistribution="off", block_size=1)
    got = naive_select(A, K, V, modality, opts)
    assert (got.f, got.length, got.kept) == (0, 7, [[0, 1, 2, 3, 5, 6]])
    assert torch.equal(got.merged[0][VIDEO][0], K[0, 4])


def test_budget_by_hand() -> None:
    modality = [TEXT] * 3 + [VIDEO] * 10 + [AUDIO] * 15 + [TEXT] * 4
    assert naive_budget(modality, 6) == (6, 7 + 7 + 2)
    assert naive_budget(modality, 6, strict_budget="tokens") == (6, 7 + 6 + 2)
    assert naive_budget(modality, 6, strict_budget="entries") == (4, 7 + 4 + 2)
    assert naive_budget(modality, 6, min_per_modality=False) == (6, 7 + 6 + 2)
    assert naive_budget(modality, 3, strict_budget="entries") == (1, 7 + 2 + 2)
    assert naive_budget(modality, 24, strict_budget="entries") == (22, 7 + 22 + 2)
    assert naive_budget(modality, 25, strict_budget="entries") == (25, 32)
    assert naive_budget(modality, 31, scope="total") == (22, 7 + 22 + 2)
    assert naive_plan(modality[:-4], 0.1, 4, position_prior=True) == (3, (28 - 9) // 4, True)


@pytest.mark.parametrize("calibration", [True, False])
@pytest.mark.parametrize("keep_prefix", [True, False])
@pytest.mark.parametrize("min_per_modality", [True, False])
@pytest.mark.parametrize("strict_budget", ["off", "tokens", "entries"])
def test_no_split_of_the_top_exceeds_the_bound(
    calibration: bool, keep_prefix: bool, min_per_modality: bool, strict_budget: str
) -> None:
    switches: dict[str, Any] = {
        "calibration": calibration,
        "keep_prefix": keep_prefix,
        "min_per_modality": min_per_modality,
        "strict_budget": strict_budget,
    }
    for n_video, n_audio in ((0, 4), (1, 6), (3, 3), (9, 4)):
        modality = [TEXT] * 2 + [VIDEO] * n_video + [AUDIO] * n_audio + [TEXT] * 2
        for budget in range(2, n_video + n_audio + 1):
            k, most = naive_budget(modality, budget, **switches)
            reached = worst_case(modality, k, **switches)
            assert reached <= most
            if strict_budget == "entries" and keep_prefix and 4 <= budget < n_video + n_audio:
                assert most <= 4 + budget or not calibration
