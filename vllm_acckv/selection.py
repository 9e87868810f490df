# SPDX-License-Identifier: Apache-2.0
"""What a policy decided for one layer, and how it is cut to whole blocks.

A policy says which tokens it wants (:class:`Selection`). Memory comes back in blocks, so the
number of entries is then rounded up to the next block boundary and the spare slots take the next
best tokens: more information for no extra memory (:func:`align`).

Nothing here waits for the device, except where :func:`align` says so.
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

    A decision that all heads share has 1 in place of ``G``.

    Attributes:
        keep: bool ``[G, l]``, tokens to keep.
        fill_rank: int64 ``[G, l]``, order in which dropped tokens may fill spare slots: the
            token to take back first has rank 0, tokens in ``keep`` come after all others.
        size: entries of every head where the prompt's layout alone decides that, else ``None``.
        merged: merged entries, or ``None`` for a policy that makes none.
        video_weight: fp32 ``[G]``, W_v of AccKV's eq. 4, for policies that weigh modalities.
        filtered, rejected: bool ``[G, l]``, tokens that AccKV's similarity filter looked at, and
            those of them that it dropped.
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
    """The entries a layer really keeps: :class:`Selection` rounded up to whole blocks.

    Attributes:
        freed_blocks: leading blocks this layer leaves empty, as far as the host knows.
        length: slots of every KV head behind them, ``l - freed_blocks * block_size``.
        tokens: bool ``[G, l]``, original tokens kept, those that fill spare slots included.
        merged: surviving merged entries, or ``None``.
        folded: bool ``[G, l]``, dropped tokens that live on inside a kept or merged entry, or
            ``None`` if there are none.
        empty_blocks: leading blocks of ``length`` that are empty, too, because of the data: 0 or
            an int64 scalar on the device.
    """

    freed_blocks: int
    length: int
    tokens: torch.Tensor
    merged: Merged | None
    folded: torch.Tensor | None = None
    empty_blocks: torch.Tensor | int = 0

    @property
    def all_freed(self) -> torch.Tensor | int:
        """Leading blocks this layer leaves empty, on the device if they depend on the data."""
        return self.freed_blocks + self.empty_blocks

    def fates(self, modality: torch.Tensor) -> torch.Tensor:
        """Tokens kept, merged and evicted, by modality code: fp32 ``[3, 3]``, means over KV
        heads.

        Args:
            modality: int8 ``[l]`` on the device of the cache.
        """
        folded = torch.zeros_like(self.tokens) if self.folded is None else self.folded
        fates = torch.stack([self.tokens, folded, ~self.tokens & ~folded]).float().mean(1)
        codes = torch.arange(3, device=modality.device)
        return fates @ (modality[:, None] == codes).float()


def select_best(
    scores: torch.Tensor,
    size: int,
    protected: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
) -> Selection:
    """Keep the ``size`` tokens of highest score; among equals the lower position wins.

    Args:
        scores: fp32 ``[G, l]``.
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
    return Selection(keep, torch.where(keep, scores.shape[1], rank - size), size)


def ranked(scores: torch.Tensor) -> torch.Tensor:
    """Rank of every token, int64 like ``scores`` ``[..., l]``: 0 for the highest score, the
    lower position first among equals."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def align(
    selection: Selection,
    num_heads: int,
    block_size: int,
    ranks: Ranks,
    most: int | None = None,
) -> Kept:
    """Round the number of entries up so that the freed slots are whole blocks.

    Every KV head of the layer ends with the same number of entries: that of the head that wants
    most, rounded up. A layer that would free less than a block keeps all tokens, unmerged.

    Args:
        block_size: 1 keeps exactly the entries wanted, if all heads want equally many.
        most: entries that the prompt's layout allows. Where their number depends on the data
            (``selection.size`` is ``None``: AccKV's similarity filter), it is then left on the
            device, in ``empty_blocks``; without ``most`` it is read from there.
    """
    length = selection.keep.shape[1]
    tokens = selection.keep.expand(num_heads, length)
    wanted = tokens.sum(1)
    if selection.merged is not None:
        wanted = wanted + selection.merged.valid.sum(1)
    largest = ranks.max(wanted.max()) if selection.size is None else selection.size
    on_device = isinstance(largest, torch.Tensor) and most is not None
    bound = most if on_device else int(largest)
    assert bound is not None
    freed_blocks = max(0, length - bound) // block_size
    if freed_blocks == 0 and block_size > 1:
        return Kept(0, length, torch.ones_like(tokens), None)
    all_freed = (length - largest) // block_size if on_device else freed_blocks
    entries = length - all_freed * block_size
    tokens = tokens | (selection.fill_rank < (entries - wanted)[:, None])
    folded = None
    if selection.merged is not None:
        alive = selection.merged.sources & selection.merged.valid[..., None]
        folded = alive.any(1) & ~tokens
    return Kept(
        freed_blocks,
        length - freed_blocks * block_size,
        tokens,
        selection.merged,
        folded,
        all_freed - freed_blocks,
    )
