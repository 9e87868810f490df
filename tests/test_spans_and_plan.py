# SPDX-License-Identifier: Apache-2.0
"""Modality of every token, and what is decided from it before the prompt is computed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_acckv.config import from_mapping
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.plan import make_plan, returns_memory
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.policies.recent import Recent
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout, token_modalities

T, V, A = TEXT, VIDEO, AUDIO


def feature(modality: str, offset: int, length: int, is_embed: list[int] | None = None):
    mask = None if is_embed is None else torch.tensor(is_embed, dtype=torch.bool)
    place = SimpleNamespace(offset=offset, length=length, is_embed=mask)
    return SimpleNamespace(modality=modality, mm_position=place)


def test_separate_layout() -> None:
    features = [feature("video", 1, 3), feature("audio", 5, 2)]
    assert token_modalities(features, 8).tolist() == [T, V, V, V, T, A, A, T]


def test_interleaved_layout_with_markers() -> None:
    """Audio in video: both features span the same tokens, begin and end markers are text."""
    video, audio = [0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0, 1, 0]
    features = [feature("video", 1, 8, video), feature("audio", 1, 8, audio)]
    expected = [T, T, V, V, A, A, V, A, T, T]
    assert token_modalities(features, 10).tolist() == expected
    assert token_modalities(features[::-1], 10).tolist() == expected


def test_images_and_other_features() -> None:
    features = [feature("image", 0, 2), feature("prompt_embeds", 2, 2)]
    assert token_modalities(features, 5).tolist() == [V, V, T, T, T]
    assert token_modalities(features, 5, image_as="text").tolist() == [T] * 5


def test_model_hook_finds_sound_inside_a_video_feature() -> None:
    """One feature covers pictures and sound; the audio placeholder token tells them apart."""
    request = SimpleNamespace(
        mm_features=[feature("video", 1, 40)],
        num_prompt_tokens=50,
        prompt_token_ids=[0] + [7, 7, 9, 9] * 10 + [0] * 9,
        sampling_params=None,
    )
    hf_config = SimpleNamespace(model_type="mimo_v2", processor_config={"audio_token_id": 9})
    policy = make_policy("acckv")
    plan = plan_request(request, policy, 4, 2, hf_config)
    assert np.bincount(plan.layout.modalities).tolist() == [10, 20, 20]
    plain = plan_request(request, policy, 4, 2, SimpleNamespace(model_type="other"))
    assert np.bincount(plain.layout.modalities).tolist() == [10, 40]


def modalities(*parts: tuple[int, int]) -> np.ndarray:
    return np.array([code for code, count in parts for _ in range(count)], dtype=np.int8)


HAZARD_16 = [
    (modalities((T, 50)), {}, "no audio or video"),
    (modalities((T, 5), (V, 50), (T, 5)), {"budget": 100}, "within the budget"),
    (modalities((T, 5), (V, 50), (T, 5)), {"budget": 1.0}, "within the budget"),
    (modalities((T, 5), (V, 50)), {}, "no text after the last clip"),
    (modalities((V, 10), (T, 5)), {"budget": 0.5}, "would free less than a block"),
    (modalities((T, 5), (V, 50), (T, 1)), {"compress_before_last_token": True},
     "no text after the last clip"),
    (modalities((T, 5), (V, 50), (T, 5)), {"policy": "full"}, "policy full"),
    (modalities((T, 1)), {"compress_before_last_token": True}, "no audio or video"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "settings", "reason"), HAZARD_16)
def test_hazard_16_prompts_that_stay_uncompressed(
    prompt: np.ndarray, settings: dict, reason: str
) -> None:
    plan = make_plan(prompt, from_mapping(settings), 16, num_layers=3)
    assert plan.skipped == reason
    assert not plan.active
    assert plan.freed_blocks == 0


@pytest.mark.parametrize(
    ("prompt", "keep", "freed"),
    [
        (modalities((T, 5), (V, 300), (T, 5)), 60, 14),
        (modalities((T, 5), (A, 300), (T, 5)), 60, 14),
        (modalities((V, 100), (A, 100), (T, 8), (V, 100), (A, 100), (T, 9)), 80, 19),
        (modalities((T, 2), (V, 4), (A, 4), *[(V, 4), (A, 4)] * 20, (T, 9)), 34, 8),
    ],
)
def test_one_modality_several_clips_interleaved(prompt: np.ndarray, keep: int, freed: int) -> None:
    """Each layer keeps at most the text, k + 1 tokens and one merged entry per modality."""
    policy = AccKV()
    plan = make_plan(prompt, policy, 16, num_layers=3)
    assert policy.heavy_hitters(plan.layout) == keep
    assert plan.freed_blocks == freed
    assert len(plan.entries) == 3
    assert max(plan.entries) <= (prompt == T).sum() + keep + 3


def test_layout() -> None:
    layout = Layout(modalities((T, 3), (A, 2), (T, 4), (V, 5), (T, 6)))
    assert (layout.length, layout.counts, layout.av, layout.present) == (20, (13, 5, 2), 7, (V, A))
    assert (layout.text_start, layout.trailing_text) == (14, 6)
    assert [layout.text_before(position) for position in (0, 4, 5, 9, 14, 20)] == [
        0,
        3,
        3,
        7,
        7,
        13,
    ]
    silent = Layout(modalities((T, 4)))
    assert (silent.av, silent.present, silent.text_start) == (0, (), 0)
    cut = Layout(modalities((T, 4), (A, 3)))
    assert (cut.present, cut.text_start, cut.trailing_text) == ((A,), 7, 0)
    assert Layout(modalities()).counts == (0, 0, 0)


def test_prefix_cache_may_cover_what_is_not_observed() -> None:
    """300 of 310 tokens are audio or video; AccKV observes rows from 305 on, H2O all rows."""
    prompt = modalities((T, 5), (V, 300), (T, 5))
    acckv, h2o = (make_plan(prompt, make_policy(name), 16) for name in ("acckv", "h2o"))
    assert (acckv.freed_blocks, acckv.first_query, acckv.reusable_blocks) == (14, 305, 19)
    assert (h2o.freed_blocks, h2o.first_query, h2o.reusable_blocks) == (15, 0, 0)
    snapkv = make_plan(prompt, make_policy("snapkv", window=100), 16)
    assert (snapkv.freed_blocks, snapkv.first_query, snapkv.reusable_blocks) == (15, 210, 13)


def test_the_layer_that_keeps_most_decides_what_is_freed() -> None:
    """FastV's first two layers keep everything, so no block comes back, yet layer 2 shrinks."""
    plan = make_plan(modalities((V, 90), (T, 10)), make_policy("fastv", budget=0.6), 16, 4)
    assert plan.active and plan.entries == (100, 100, 28, 28)
    assert (plan.freed_blocks, plan.reusable_blocks) == (0, 98 // 16)
    assert [plan.compacts(layer) for layer in range(4)] == [False, False, True, True]
    pyramid = make_plan(modalities((V, 300), (T, 10)), make_policy("pyramidkv", window=8), 16, 4)
    assert list(pyramid.entries) == sorted(pyramid.entries, reverse=True)
    assert pyramid.freed_blocks == (310 - pyramid.entries[0]) // 16


def test_sizes_of_a_careless_policy_stay_inside_the_prompt() -> None:
    """The scheduler counts blocks with what a policy of another package answers."""

    class Careless(Recent):
        name = "careless"

        def entries(self, layout, layer):
            return [-100, 1000, 40.0, 41][layer.index]

    plan = make_plan(modalities((T, 5), (V, 80), (T, 5)), Careless(), 16, num_layers=4)
    assert plan.entries == (0, 90, 40, 41)
    assert plan.freed_blocks == 0
    assert all(isinstance(size, int) for size in plan.entries)


@pytest.mark.parametrize(
    ("name", "options", "returns"),
    [
        ("acckv", {}, True),
        ("pyramidkv", {}, True),
        ("drop_audio", {}, True),
        ("drop_audio", {"first_layer": 14}, False),
        ("fastv", {}, False),
        ("full", {}, False),
        ("snapkv", {"budget": 1.0}, False),
    ],
)
def test_policies_that_return_no_memory_are_known_at_startup(
    name: str, options: dict, returns: bool
) -> None:
    assert returns_memory(make_policy(name, **options), 16, 28) == returns
