# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of cached keys, for policies that look behind it."""

from __future__ import annotations

import torch


def rotate(key: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate ``key`` ``[..., D]`` by ``angles`` ``[..., R/2]``, ``R <= D``, in the half-split
    (NeoX) layout: dimension i pairs with i + R/2; dimensions from R on are left alone."""
    half = angles.shape[-1]
    first, second, rest = key[..., :half], key[..., half : 2 * half], key[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def unrotate(key: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`rotate`."""
    return rotate(key, -angles)
