# SPDX-License-Identifier: Apache-2.0
"""What a policy decided for one layer, and how it is cut to whole blocks.

A policy says which tokens it wants (:class:`Selection`). Memory comes back in blocks, so the
number of entries is then rounded up to the next block boundary and the spare slots take the next
best tokens: more information for no extra memory (:func:`align`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Ranks(Protocol):
    """Agreement between the tensor-parallel ranks, each of which holds some of the heads."""

    def mean(self, value: torch.Tensor) -> torch.Tensor: ...

    def max(self, value: torch.Tensor) -> torch.Tensor: ...


class SingleRank:
    """One rank holds every head."""

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def max(self, value: torch.Tensor) -> torch.Tensor:
        return value


@dataclass(frozen=True)
class Merged:
    """Entries that stand for several dropped tokens.

    Attributes:
        key, value: ``[G, M, D]`` in the dtype of the cache.
        valid: bool ``[G, M]``; entries that are not valid are not stored.
        sources: bool ``[G, M, l]``, the tokens each entry stands for.
        modality: int8 ``[M]``.
    """

    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor
    sources: torch.Tensor
    modality: torch.Tensor


@dataclass(frozen=True)
class Selection:
    """A policy's decision for one layer of one request, over ``l`` tokens and ``G`` KV heads.

    Attributes:
        keep: bool ``[G, l]``, tokens to keep.
        fill_rank: int64 ``[G, l]``, order in which dropped tokens may fill spare slots: the
            token to take back first has rank 0, tokens in ``keep`` come after all others.
        merged: merged entries, or ``None`` for a policy that never merges.
        video_weight: fp32 ``[1]`` or ``[G]``, W_v of eq. 4 (0 where not defined).
    """

    keep: torch.Tensor
    fill_rank: torch.Tensor
    merged: Merged | None
    video_weight: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """The entries a layer really keeps: :class:`Selection` rounded up to whole blocks.

    Attributes:
        freed_blocks: leading blocks this layer leaves empty.
        tokens: bool ``[G, l]``, original tokens kept, those that fill spare slots included.
        merged: surviving merged entries, or ``None``.
    """

    freed_blocks: int
    tokens: torch.Tensor
    merged: Merged | None


def align(selection: Selection, block_size: int, ranks: Ranks) -> Kept:
    """Round the number of entries up so that the freed slots are whole blocks.

    Every KV head of the layer ends with the same number of entries: that of the head that wants
    most, rounded up. A layer that would free less than a block keeps all tokens, unmerged.
    """
    length = selection.keep.shape[1]
    wanted = selection.keep.sum(1)
    if selection.merged is not None:
        wanted = wanted + selection.merged.valid.sum(1)
    most = int(ranks.max(wanted.max()))
    freed_blocks = max(0, length - most) // block_size
    if freed_blocks == 0:
        return Kept(0, torch.ones_like(selection.keep), None)
    spare = length - freed_blocks * block_size - wanted
    filled = selection.fill_rank < spare[:, None]
    return Kept(freed_blocks, selection.keep | filled, selection.merged)
