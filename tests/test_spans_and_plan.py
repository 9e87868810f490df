# SPDX-License-Identifier: Apache-2.0
"""Modality of every token, and what is decided from it before the prompt is computed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_acckv.config import KVPolicyConfig
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.plan import make_plan
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, token_modalities

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
    hf_config = SimpleNamespace(model_type="mimo_v2_omni", audio_token_id=9)
    plan = plan_request(request, KVPolicyConfig(), 4, hf_config)
    assert np.bincount(plan.modalities).tolist() == [10, 20, 20]
    plain = plan_request(request, KVPolicyConfig(), 4, SimpleNamespace(model_type="other"))
    assert np.bincount(plain.modalities).tolist() == [10, 40]


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
    plan = make_plan(prompt, KVPolicyConfig(**settings), 16)
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
    plan = make_plan(prompt, KVPolicyConfig(), 16)
    assert plan.keep == keep
    assert plan.freed_blocks == freed
    assert plan.entries <= (prompt == T).sum() + keep + 3
