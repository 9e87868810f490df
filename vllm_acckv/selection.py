# SPDX-License-Identifier: Apache-2.0
"""What a policy decided for one layer, and how it is cut to whole blocks.

A policy says which tokens it wants (:class:`Selection`). Memory comes back in blocks, so the
number of entries is then rounded up to the next block boundary and the spare slots take the next
best tokens: more information for no extra memory (:func:`align`).

``...`` in shapes stands for no dimension, or for one of layers that are decided together. ``S`` is
the number of KV heads ``G``, or 1 where all of them share a decision.

Nothing here waits for the device, except where :func:`align` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        key, value: ``[..., G, M, D]`` in the dtype of the cache.
        valid: bool ``[..., S, M]``; entries that are not valid are not stored.
        sources: bool ``[..., S, M, l]``, the tokens each entry stands for.
        modality: int8 ``[M]``.
    """

    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor
    sources: torch.Tensor
    modality: torch.Tensor


@dataclass(frozen=True)
class Selection:
    """A policy's decision for one request, over ``l`` tokens.

    A decision that several layers share may lack their dimension.

    Attributes:
        keep: bool ``[..., S, l]``, tokens to keep.
        fill_rank: int64 ``[..., S, l]``, order in which dropped tokens may fill spare slots: the
            token to take back first has rank 0, tokens in ``keep`` come after all others.
        size: entries of every layer and head where the prompt's layout alone decides that, else
            ``None``.
        merged: merged entries, or ``None`` for a policy that makes none.
        video_weight: fp32 ``[..., S]``, W_v of AccKV's eq. 4, for policies that weigh modalities.
        filtered, rejected: bool ``[..., S, l]``, tokens that AccKV's similarity filter looked at,
            and those of them that it dropped.
    """

    keep: torch.Tensor
    fill_rank: torch.Tensor
    size: int | None
    merged: Merged | None = None
    video_weight: torch.Tensor | None = None
    filtered: torch.Tensor | None = None
    rejected: torch.Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """The entries that really stay: :class:`Selection` rounded up to whole blocks.

    Attributes:
        freed_blocks: leading blocks that every layer leaves empty, as far as the host knows.
        length: slots of every KV head behind them, ``l - freed_blocks * block_size``.
        tokens: bool ``[..., S, l]``, original tokens kept, those that fill spare slots included.
        merged: surviving merged entries, or ``None``.
        folded: bool ``[..., S, l]``, dropped tokens that live on inside a kept or merged entry,
            or ``None`` if there are none.
        empty_blocks: leading blocks of ``length`` that are empty, too, because of the data: 0 or
            int64 ``[...]`` on the device.
    """

    freed_blocks: int
    length: int
    tokens: torch.Tensor
    merged: Merged | None
    folded: torch.Tensor | None = None
    empty_blocks: torch.Tensor | int = 0

    @property
    def all_freed(self) -> torch.Tensor | int:
        """Leading blocks each layer leaves empty, on the device if they depend on the data."""
        return self.freed_blocks + self.empty_blocks

    def fates(self, modality: torch.Tensor) -> torch.Tensor:
        """Tokens kept, merged and evicted, by modality code: fp32 ``[3, 3]``, means over KV
        heads and sums over layers.

        Args:
            modality: int8 ``[l]`` on the device of the cache.
        """
        folded = torch.zeros_like(self.tokens) if self.folded is None else self.folded
        fates = torch.stack([self.tokens, folded, ~self.tokens & ~folded]).float().mean(-2)
        codes = torch.arange(3, device=modality.device)
        counts = fates @ (modality[:, None] == codes).float()
        return counts.unflatten(0, (3, 1)).flatten(1, -2).sum(1)


def select_best(
    scores: torch.Tensor,
    size: int,
    protected: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
) -> Selection:
    """Keep the ``size`` tokens of highest score; among equals the lower position wins.

    Args:
        scores: fp32 ``[..., S, l]``.
        size: tokens to keep, at least as many as are protected.
        protected: bool ``[l]``, tokens that are kept whatever their score.
        candidates: bool ``[l]``, the other tokens to choose from (default: all). The rest is
            only taken back to fill a block, and then last.
    """
    if candidates is not None:
        scores = scores.masked_fill(~candidates, -torch.inf)
    if protected is not None:
        scores = scores.masked_fill(protected, torch.inf)
    rank = ranked(scores)
    keep = rank < size
    return Selection(keep, torch.where(keep, scores.shape[-1], rank - size), size)


def ranked(scores: torch.Tensor) -> torch.Tensor:
    """Rank of every token, int64 like ``scores`` ``[..., l]``: 0 for the highest score, the
    lower position first among equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return torch.empty_like(order).scatter_(-1, order, ranks.expand_as(order))


def align(
    selection: Selection,
    layers: Sequence[int],
    block_size: int,
    ranks: Ranks,
    most: int | None = None,
) -> Kept:
    """Round the number of entries up so that the freed slots are whole blocks.

    Every KV head of a layer ends with the same number of entries: that of the head that wants
    most, rounded up. A layer that would free less than a block keeps all tokens, unmerged.

    Args:
        layers: the dimension of the layers that are decided together, if any: ``...`` of shapes.
        block_size: 1 keeps exactly the entries wanted, if all heads want equally many.
        most: entries that the prompt's layout allows. Where their number depends on the data
            (``selection.size`` is ``None``: AccKV's similarity filter), it is then left on the
            device, in ``empty_blocks``; without ``most`` it is read from there, for one layer.
    """
    tokens, merged = selection.keep, selection.merged
    tokens = tokens.expand(*layers, *tokens.shape[-2:])
    length = tokens.shape[-1]
    wanted = tokens.sum(-1)
    if merged is not None:
        wanted = wanted + merged.valid.sum(-1)
    largest = ranks.max(wanted.amax(-1)) if selection.size is None else selection.size
    on_device = isinstance(largest, torch.Tensor) and most is not None
    bound = most if on_device else int(largest)
    assert bound is not None
    freed_blocks = max(0, length - bound) // block_size
    if freed_blocks == 0 and block_size > 1:
        return Kept(0, length, torch.ones_like(tokens), None)
    missing = length - freed_blocks * block_size - wanted
    empty_blocks: torch.Tensor | int = 0
    if isinstance(largest, torch.Tensor) and on_device:
        empty_blocks = (length - largest) // block_size - freed_blocks
        missing = missing - empty_blocks[..., None] * block_size
    tokens = tokens | (selection.fill_rank < missing[..., None])
    folded = None
    if merged is not None:
        alive = merged.sources & merged.valid[..., None]
        folded = alive.any(-2) & ~tokens
    slots = length - freed_blocks * block_size
    return Kept(freed_blocks, slots, tokens, merged, folded, empty_blocks)
