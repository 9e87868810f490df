# SPDX-License-Identifier: Apache-2.0
"""Shapes of attention, caches and lines of a table, shared by gpu_check.py and gpu_bench.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_acckv.kernels.paged import PagedCache

BLOCK = 16


@dataclass(frozen=True)
class Shape:
    """Attention: query heads, KV heads, head size; how many layers there are."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    layers: int


SHAPES = (Shape("Qwen2.5-Omni-7B", 28, 4, 128, 28), Shape("Vicuna-7B", 32, 32, 128, 32))
SMALL = (Shape("small", 6, 2, 24, 2),)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        error: largest error of a number, or the share of numbers or answers that differ.
        bound: what ``error`` may be.
    """

    what: str
    shape: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def paged(shape: Shape, length: int, dtype: torch.dtype, device: str) -> PagedCache:
    """A cache with the request's blocks in random order."""
    from vllm_acckv.kernels.paged import PagedCache

    needed = -(-length // BLOCK)
    size = (needed + 5, shape.kv_heads, BLOCK, 2 * shape.head_size)
    table = torch.randperm(needed + 5, device=device)[:needed].int()
    return PagedCache(torch.randn(size, device=device).to(dtype), table)
