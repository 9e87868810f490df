# SPDX-License-Identifier: Apache-2.0
"""What the equations of AccKV promise.

Numbers only name them; tests/test_policy_invariants.py has what every
policy promises, tests/test_hf_runner.py what needs a model (15 and 16).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.naive_baselines import full_attention
from tests.test_policy_invariants import (
    HEADS,
    LAYOUTS,
    WIDTH,
    Case,
    Sample,
    made,
    make,
    over_cases,
    same,
)
from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.rotary import unrotate
from vllm_acckv.scores import observed_attention
from vllm_acckv.selection import Selection
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, token_modalities

acckv_layouts = pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
head_modes = pytest.mark.parametrize("mode", ["layer", "head"])
seeds = pytest.mark.parametrize("seed", range(4))


def acckv(**options: Any) -> AccKV:
    policy = make("acckv", **{"budget": 0.4, "tau": -1, "redistribution": "off", **options})
    assert isinstance(policy, AccKV)
    return policy


def av_of(selection: Selection, sample: Sample) -> list[set[int]]:
    """Audio-video tokens kept per head (one row in layer mode)."""
    keep = selection.keep & (sample.modality != TEXT)
    return [set(row.nonzero().flatten().tolist()) for row in keep]


def first_has_priority(selection: Selection) -> list[int]:
    assert selection.video_weight is not None
    return [VIDEO if weight >= 0.5 else AUDIO for weight in selection.video_weight.tolist()]


@seeds
@head_modes
@acckv_layouts
def test_invariant_01_weights(layout: str, mode: str, seed: int) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    policy = acckv(head_mode=mode, tau=0.3)
    scores = sample.scores(policy)
    once, scaled = sample.select(policy, scores), sample.select(policy, scores * 64)
    assert once.video_weight is not None and scaled.video_weight is not None
    assert ((once.video_weight > 0) & (once.video_weight < 1)).all()
    assert torch.equal(once.video_weight, scaled.video_weight)
    assert torch.equal(once.keep, scaled.keep)
    even = sample.select(policy, torch.ones_like(scores)).video_weight
    assert even is not None and (even == 0.5).all()
    swap = {TEXT: TEXT, VIDEO: AUDIO, AUDIO: VIDEO}
    mirrored = Sample([swap[kind] for kind in sample.modality.tolist()], seed)
    other = mirrored.select(policy, scores)
    assert other.video_weight is not None
    torch.testing.assert_close(other.video_weight, 1 - once.video_weight)
    assert torch.equal(other.keep, once.keep)
    assert other.filtered is not None and once.filtered is not None
    assert torch.equal(other.filtered, once.filtered)
    stats = sample.compress(policy).stats
    assert stats.video_weight is not None and stats.audio_weight is not None
    assert stats.video_weight + stats.audio_weight == 1


def test_invariant_02_uniform_attention() -> None:
    sample = Sample(LAYOUTS["contiguous"](20, 15, 6))
    rows, keys = torch.zeros(44, HEADS, WIDTH), sample.keys
    full = observed_attention(
        rows, keys, 0, 1.0, acckv(redistribution="paper").weights(sample.layout)
    )
    torch.testing.assert_close(full, torch.ones(2, 44))
    visible = acckv(redistribution="visible").weights(sample.layout)
    text_rows = observed_attention(rows[:6], keys, 38, 1.0, visible)
    torch.testing.assert_close(text_rows[:, :38], torch.ones(2, 38))


@pytest.mark.parametrize("redistribution", ["paper", "visible", "off"])
def test_invariant_03_text_rows_are_rows_of_the_full_matrix(redistribution: str) -> None:
    sample = Sample(LAYOUTS["interleaved"](9, 6, 5))
    attention = full_attention(sample.queries, sample.keys, WIDTH**-0.5)
    length, start = sample.layout.length, sample.layout.text_start
    expected = torch.zeros(2, length, dtype=torch.float64)
    for i in range(start, length):
        for j in range(i + 1):
            seen_by = length - (max(j, start) if redistribution == "visible" else j)
            factor = 1 if redistribution == "off" else (i + 1) / seen_by
            expected[:, j] += attention[:, i, j].reshape(2, 2).mean(1) * factor
    mine = sample.scores(acckv(redistribution=redistribution))
    torch.testing.assert_close(mine, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(2))
@head_modes
@acckv_layouts
@pytest.mark.parametrize("strict", ["off", "tokens", "entries"])
def test_invariant_04_counts(layout: str, mode: str, strict: str, seed: int) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    total = sample.layout.av
    for k in (1, 2, 3, 7, total - 1, total):
        budget = k if k > 1 else 1 / total
        options = {"budget": budget, "head_mode": mode, "strict_budget": strict}
        policy = acckv(**options)
        hitters = policy.heavy_hitters(sample.layout)
        assert hitters == (k if strict != "entries" or k == total else max(k - 2, 0))
        selection = sample.select(policy)
        assert selection.merged is not None
        plain = sample.select(acckv(**options, calibration=False))
        for tokens, joint in zip(av_of(selection, sample), av_of(plain, sample), strict=True):
            counts = [int((sample.modality[sorted(tokens)] == kind).sum()) for kind in (1, 2)]
            wanted = [int((sample.modality[sorted(joint)] == kind).sum()) for kind in (1, 2)]
            assert len(joint) == k and min(counts) >= 1
            assert max(hitters, 2) <= len(tokens) <= max(hitters + (strict == "off"), 2)
            assert min(wanted) == 0 or strict == "entries" or counts == wanted
        for tau in (-1, 0.3, 1):
            entries = sample.compress(acckv(**options, tau=tau)).keys.shape[1]
            bound = {"off": k + 3, "tokens": max(k, 2) + 2, "entries": max(k, 4)}[strict]
            assert entries <= min(bound + sample.layout.text, sample.layout.length)


@seeds
@head_modes
@acckv_layouts
def test_invariant_05_only_merged_entries_are_new(layout: str, mode: str, seed: int) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    text = (sample.modality == TEXT).nonzero().flatten().tolist()
    for options in ({"tau": 0.3}, {"preset": "corrected"}, {"merge_space": "pre_rope"}):
        out = sample.compress(acckv(head_mode=mode, **options))
        assert (out.positions < 0).sum(1).max() <= 2
        for head, row in enumerate(out.positions.expand(2, -1).tolist()):
            assert set(text) <= set(row)
            for entry, position in enumerate(row):
                copies = torch.equal(out.keys[head, entry], sample.keys[head, position])
                assert copies == (position >= 0)


@head_modes
@acckv_layouts
def test_invariant_06_budget_for_everything(layout: str, mode: str) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5))
    for options in ({"budget": 1.0}, {"budget": 99}, {"budget": 99, "preset": "corrected"}):
        out = sample.compress(acckv(head_mode=mode, **options))
        assert torch.equal(out.keys, sample.keys) and torch.equal(out.values, sample.values)
        assert out.stats.merged_entries == 0


def test_tau_of_minus_one_keeps_opposite_keys() -> None:
    """Cosines of exactly opposite keys must not fall below -1 by rounding."""
    for seed in range(20):
        sample = Sample(LAYOUTS["contiguous"](5, 5, 3), seed)
        direction = sample.keys[:, :1]
        sample.keys = direction * torch.rand(2, 16, 1).add(0.1)
        sample.keys[:, 8:13] *= -1
        selection = sample.select(acckv(budget=1.0))
        assert selection.rejected is not None and not selection.rejected.any()


def test_rejected_share_is_none_where_the_filter_did_not_run() -> None:
    both, one = (Sample(LAYOUTS[name](9, 7, 4)) for name in ("contiguous", "video_only"))
    assert both.compress(acckv(tau=0.5)).stats.rejected_share is not None
    assert one.compress(acckv(tau=0.5)).stats.rejected_share is None
    assert both.compress(acckv(calibration=False)).stats.rejected_share is None


@seeds
@head_modes
@acckv_layouts
def test_invariant_07_tau_is_monotone(layout: str, mode: str, seed: int) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    top = av_of(sample.select(acckv(head_mode=mode)), sample)
    previous = top
    for tau in (-1, -0.5, 0, 0.2, 0.4, 0.6, 0.8, 1):
        selection = sample.select(acckv(head_mode=mode, tau=tau))
        assert selection.merged is not None
        kept = av_of(selection, sample)
        for head, high in enumerate(first_has_priority(selection)):
            is_high = {j for j in top[head] if sample.modality[j] == high}
            assert is_high <= kept[head] <= previous[head]
            assert tau > -1 or kept[head] == top[head]
            if tau == 1:  # no mean cosine of random keys is 1
                assert kept[head] == is_high
                alive = selection.merged.valid.expand(2, -1)[head].tolist()
                assert [kind == high for kind in selection.merged.modality.tolist()] == alive
        previous = kept


@seeds
@head_modes
@acckv_layouts
def test_invariant_08_merging_conserves_sums(layout: str, mode: str, seed: int) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    selection = sample.select(acckv(head_mode=mode))
    merged = selection.merged
    assert merged is not None and merged.valid.all()
    keep = selection.keep.expand(2, -1)
    for head in range(2):
        for entry, kind in enumerate(merged.modality.tolist()):
            number = int(merged.sources.expand(2, -1, -1)[head, entry].sum())
            members = sample.modality == kind
            for states, mean in ((sample.keys, merged.key), (sample.values, merged.value)):
                parts = states[head, keep[head] & members].sum(0) + number * mean[head, entry]
                torch.testing.assert_close(parts, states[head, members].sum(0))


@seeds
@head_modes
@acckv_layouts
def test_the_filter_spares_the_best_of_the_low_priority(layout: str, mode: str, seed: int) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    options = {"head_mode": mode, "focusing": False}
    top = av_of(sample.select(acckv(**options)), sample)
    policy = acckv(**options, tau=1, min_keep_low=2, filter_merged=False)
    scores = sample.scores(policy)
    rows = scores.mean(0, keepdim=True) if mode == "layer" else scores
    selection = sample.select(policy, scores)
    assert selection.merged is not None and selection.merged.valid.all()
    for head, kept in enumerate(av_of(selection, sample)):
        high = first_has_priority(selection)[head]
        low = [j for j in top[head] if sample.modality[j] != high]
        best = sorted(low, key=lambda j: -float(rows[head, j]))[:2]
        assert kept == top[head] - set(low) | set(best)


@seeds
@head_modes
@pytest.mark.parametrize("space", ["post_rope", "pre_rope"])
def test_invariant_09_merging_does_not_mix_modalities(space: str, mode: str, seed: int) -> None:
    sample = Sample(LAYOUTS["interleaved"](7, 5, 5), seed)
    policy = acckv(head_mode=mode, merge_space=space)
    scores = sample.scores(policy)
    before = sample.select(policy, scores).merged
    audio = sample.modality == AUDIO
    sample.keys[:, audio], sample.values[:, audio] = 7.0, -3.0
    after = sample.select(policy, scores).merged
    assert before is not None and after is not None
    assert torch.equal(before.key[:, 0], after.key[:, 0])
    assert torch.equal(before.value[:, 0], after.value[:, 0])
    assert not torch.equal(before.key[:, 1], after.key[:, 1])


def mean_cosines(sample: Sample, policy: AccKV) -> dict[int, float]:
    """Eq. 15-16 with the whole cosine matrix, for the low-priority tokens of layer mode."""
    selection = sample.select(policy)
    assert selection.merged is not None and selection.merged.valid.all()
    assert selection.filtered is not None
    (high,) = first_has_priority(selection)
    keys = sample.keys.double()
    merged = selection.merged.key.double()
    if policy.tau_mode == "absolute_pre_rope":
        keys = unrotate(keys, sample.angles.double())
        merged = torch.stack(
            [
                torch.stack(
                    [
                        keys[head, row].mean(0)
                        for row in selection.merged.sources.expand(2, -1, -1)[head]
                    ]
                )
                for head in range(2)
            ]
        )
    low = selection.filtered[0].nonzero().flatten().tolist()
    anchors = [j for j in av_of(selection, sample)[0] if sample.modality[j] == high]
    cosines = torch.zeros(len(low), dtype=torch.float64)
    for head in range(2):
        own = torch.cat([keys[head, anchors], merged[head, [high - 1]]])
        matrix = torch.cosine_similarity(keys[head, low][:, None], own[None], dim=-1)
        cosines += matrix.mean(1) / 2
    return dict(zip(low, cosines.tolist(), strict=True))


@seeds
@acckv_layouts
@pytest.mark.parametrize("tau_mode", ["absolute", "absolute_pre_rope"])
def test_invariant_10_fast_cosine_is_that_of_the_full_matrix(
    tau_mode: str, layout: str, seed: int
) -> None:
    """tau just below and just above a token's mean cosine tells whether it is kept."""
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    cosines = mean_cosines(sample, acckv(tau_mode=tau_mode))
    assert cosines
    for position, cosine in cosines.items():
        assert -1 <= cosine <= 1
        for tau, kept in ((cosine - 1e-5, True), (cosine + 1e-5, False)):
            selection = sample.select(acckv(tau_mode=tau_mode, tau=tau))
            assert (position in av_of(selection, sample)[0]) == kept


@seeds
@head_modes
@acckv_layouts
def test_invariant_11_top_of_a_modality_is_its_share(layout: str, mode: str, seed: int) -> None:
    sample = Sample(LAYOUTS[layout](11, 8, 5), seed)
    for k in range(2, 12, 3):
        options = {"budget": k, "head_mode": mode}
        tops = av_of(sample.select(acckv(**options)), sample)
        joints = av_of(sample.select(acckv(**options, calibration=False)), sample)
        for top, joint in zip(tops, joints, strict=True):
            lifted = top - joint
            assert joint <= top and len(lifted) <= 1
            for position in lifted:
                kind = sample.modality[position]
                assert not any(sample.modality[other] == kind for other in joint)


@seeds
@head_modes
def test_invariant_12_switched_off_modules(mode: str, seed: int) -> None:
    """Focusing by (.5, .5) changes nothing; without calibration this is a joint top-k."""
    sample = Sample(LAYOUTS["contiguous"](8, 8, 5), seed)
    scores = torch.zeros(2, sample.layout.length)
    generator = torch.Generator().manual_seed(seed)
    for head in range(2):
        values = torch.randint(0, 999, (8,), generator=generator).float()
        scores[head, 3:11] = values[torch.randperm(8, generator=generator)]
        scores[head, 11:19] = values
    if mode == "layer":
        scores = scores[:1].expand(2, -1)
    focused, plain = (
        sample.select(acckv(head_mode=mode, focusing=focusing), scores)
        for focusing in (True, False)
    )
    assert focused.video_weight is not None and (focused.video_weight == 0.5).all()
    assert torch.equal(focused.keep, plain.keep)

    policy = acckv(head_mode=mode, focusing=False, calibration=False, budget=6)
    observed = sample.scores(policy)
    rows = observed.mean(0, keepdim=True) if mode == "layer" else observed
    assert sample.select(policy).merged is None
    for row, tokens in zip(rows, av_of(sample.select(policy), sample), strict=True):
        ranking = sorted(range(3, 19), key=lambda j: -float(row[j]))
        assert tokens == set(ranking[:6])


@head_modes
@pytest.mark.parametrize("layout", ["video_only", "audio_only"])
def test_invariant_13_single_modality(layout: str, mode: str) -> None:
    """Selection and merge for the one that is there, no filter."""
    sample = Sample(LAYOUTS[layout](9, 6, 4))
    out = sample.compress(acckv(head_mode=mode, tau=1, budget=5))
    assert out.keys.shape[1] == 5 + 7 + 1
    assert out.stats.merged_entries == 1
    assert out.stats.video_weight == (layout == "video_only")


def test_invariant_13_no_audio_or_video_and_no_text_rows() -> None:
    alone, silent = (Sample(LAYOUTS[name](4, 5, 6)) for name in ("no_av", "no_trailing_text"))
    assert torch.equal(alone.compress(acckv()).keys, alone.keys)
    with pytest.raises(ValueError, match="modality has no text after its last audio-video token"):
        silent.compress(acckv())


@over_cases
def test_invariant_14_masks_and_ranges_agree(case: Case) -> None:
    """Two ranges, and two features over the whole clip whose masks say the same."""

    def feature(modality: str, offset: int, length: int, mask: torch.Tensor | None = None) -> Any:
        place = SimpleNamespace(offset=offset, length=length, is_embed=mask)
        return SimpleNamespace(modality=modality, mm_position=place)

    is_video = torch.arange(20) < 11
    ranges = [feature("video", 3, 11), feature("audio", 14, 9)]
    masks = [feature("video", 3, 20, is_video), feature("audio", 3, 20, ~is_video)]
    by_range, by_mask = (
        Sample(token_modalities(features, 27).tolist()) for features in (ranges, masks)
    )
    policy = made(case)
    assert same(by_range.compress(policy), by_mask.compress(policy))


@seeds
@acckv_layouts
def test_invariant_17_repeated_kv_heads_select_the_same(layout: str, seed: int) -> None:
    grouped = Sample(LAYOUTS[layout](11, 8, 5), seed)
    plain = Sample(LAYOUTS[layout](11, 8, 5), seed)
    plain.keys, plain.values = (
        states.repeat_interleave(2, 0) for states in (grouped.keys, grouped.values)
    )
    for tau in (-1, 0.3, 0.6):
        few, many = (sample.compress(acckv(tau=tau)) for sample in (grouped, plain))
        assert torch.equal(few.positions, many.positions)
        torch.testing.assert_close(few.keys.repeat_interleave(2, 0), many.keys)


@head_modes
@acckv_layouts
def test_invariant_18_ties(layout: str, mode: str) -> None:
    sample = Sample(LAYOUTS[layout](9, 7, 4), equal_keys=True)
    policy = acckv(head_mode=mode, calibration=False, budget=6)
    selection = sample.select(policy, torch.zeros(2, sample.layout.length))
    lowest = np.flatnonzero(sample.layout.modalities)[:6]
    assert all(tokens == set(lowest.tolist()) for tokens in av_of(selection, sample))
