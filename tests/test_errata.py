# SPDX-License-Identifier: Apache-2.0
"""The figures that docs/policies.md quotes about the AccKV paper's equations.

The layout is that of VideoLLaMA2-AV with 8 frames: 14 tokens of prefix, 676 of video, 1496 of
audio, 60 of text.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_acckv.policies import make_policy
from vllm_acckv.rotary import rotate
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

PREFIX, VIDEOS, AUDIOS, TAIL = 14, 676, 1496, 60
MODALITY = torch.tensor(
    [TEXT] * PREFIX + [VIDEO] * VIDEOS + [AUDIO] * AUDIOS + [TEXT] * TAIL, dtype=torch.int8
)
LENGTH = len(MODALITY)


def angles(theta: float, positions: torch.Tensor, width: int = 128) -> torch.Tensor:
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return positions.double()[:, None] * frequency


def test_redistribution_of_text_rows_is_a_recency_prior() -> None:
    last = PREFIX + VIDEOS + AUDIOS - 1
    assert (LENGTH - PREFIX) / (LENGTH - last) == pytest.approx(36.6, abs=0.05)
    # Uniform attention: all keys alike.
    key = torch.ones(1, LENGTH, 8)
    query = torch.ones(1, TAIL, 8)
    plain = make_policy("acckv", budget=0.2, calibration=False)
    kept = {}
    for mode in ("paper", "visible"):
        policy = plain.model_copy(update={"redistribution": mode})
        kept[mode] = policy.compress(query, key, key, MODALITY).stats
    assert kept["paper"].video_weight == pytest.approx(0.197, abs=5e-4)
    assert kept["paper"].kept == {"text": PREFIX + TAIL, "video": 0, "audio": 434}
    assert kept["visible"].video_weight == pytest.approx(0.5)


def test_full_column_sums_are_one_after_redistribution() -> None:
    """What eq. 1 is right for: all rows, uniform causal attention."""
    length = 50
    rows, columns = np.mgrid[:length, :length]
    attention = np.tril(np.ones((length, length))) / (rows + 1)
    redistributed = attention * (rows + 1) / (length - columns)
    np.testing.assert_allclose(redistributed.sum(0), 1)


@pytest.mark.parametrize(("theta", "count", "norm"), [(1e6, 540, 0.78), (1e4, 540, 0.64)])
def test_averaging_rotated_keys_shrinks_them(theta: float, count: int, norm: float) -> None:
    """Identical content, energy spread evenly over the frequencies."""
    key = torch.ones(count, 128, dtype=torch.float64)
    mean = rotate(key, angles(theta, torch.arange(count))).mean(0)
    assert float(mean.norm() / key[0].norm()) == pytest.approx(norm, abs=0.005)


def test_cosine_of_rotated_keys_measures_distance() -> None:
    """Identical content in video and audio, energy spread evenly over the frequencies."""
    key = torch.ones(VIDEOS + AUDIOS, 128, dtype=torch.float64) / 128**0.5
    rotated = rotate(key, angles(1e6, torch.arange(VIDEOS + AUDIOS)))
    similarity = rotated[VIDEOS:] @ rotated[:VIDEOS].mean(0)
    assert float(similarity.mean()) == pytest.approx(0.454, abs=0.005)
    assert float(similarity.max()) < 0.6
