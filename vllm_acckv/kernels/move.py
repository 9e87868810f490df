# SPDX-License-Identifier: Apache-2.0
"""Bring the entries that a layer keeps to the end of the prompt, in place and in one launch.

Entries keep their order and are aligned to the end, so none moves to a lower slot: a program that
goes from the last entry to the first never overwrites what it has still to read. That holds beside
merged entries, too: each of them stands behind a token that is not kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_acckv.kernels.paged import PagedCache

_ENTRIES = 64
_PART = 64


def move_reference(
    cache: PagedCache, sources: torch.Tensor, end: int, merged: torch.Tensor | None = None
) -> None:
    """Rewrite slots ``end - L .. end - 1``, in PyTorch.

    Args:
        cache: of one request; its dtype may be any, numbers are copied bit by bit.
        sources: int32 ``[G, L]``, for each slot the token whose keys and values go there, in
            increasing order; ``end + m`` for merged entry ``m``, -1 to leave the slot as it is.
        end: tokens before the move.
        merged: ``[G, M, 2 * D]`` in the dtype of the cache.
    """
    rows = cache.rows(end)
    if merged is not None:
        rows = torch.cat([rows, merged], 1)
    index = sources.clamp(min=0).long()[..., None].expand(-1, -1, rows.shape[2])
    first = end - sources.shape[1]
    kept = rows.gather(1, index)
    old = rows[:, first:end]
    cache.write(first, torch.where((sources >= 0)[..., None], kept, old))


@triton.jit
def _move(
    cache, table, sources, merged, num_entries, num_merged, end,
    stride_block, stride_head, stride_slot, sources_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    numbers = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = (numbers < WIDTH)[None, :]
    of_head = cache + kv_head * stride_head
    tiles = (num_entries + ENTRIES - 1) // ENTRIES
    for done in range(0, tiles):
        entries = (tiles - 1 - done) * ENTRIES + tl.arange(0, ENTRIES)
        real = entries < num_entries
        source = tl.load(sources + kv_head * sources_stride + entries, mask=real, other=-1)
        token = (source >= 0) & (source < end)
        block = tl.load(table + source // BLOCK, mask=token, other=0).to(tl.int64)
        at = of_head + block * stride_block + (source % BLOCK) * stride_slot
        rows = tl.load(at[:, None] + numbers[None, :], mask=token[:, None] & inside, other=0)
        entry = source >= end
        at = merged + (kv_head * num_merged + source - end) * WIDTH
        other = tl.load(at[:, None] + numbers[None, :], mask=entry[:, None] & inside, other=0)
        rows = tl.where(entry[:, None], other, rows)
        tl.debug_barrier()  # a slot of this tile may hold a row of this tile
        slot = end - num_entries + entries
        block = tl.load(table + slot // BLOCK, mask=real, other=0).to(tl.int64)
        at = of_head + block * stride_block + (slot % BLOCK) * stride_slot
        stored = (source >= 0)[:, None] & inside
        tl.store(at[:, None] + numbers[None, :], rows, mask=stored)


def move(
    cache: PagedCache, sources: torch.Tensor, end: int, merged: torch.Tensor | None = None
) -> None:
    """:func:`move_reference` in one kernel; arguments as there."""
    num_heads, num_entries = sources.shape
    width = 2 * cache.head_size
    if merged is None:
        merged = cache.blocks.new_empty(num_heads, 0, width)
    _move[(num_heads, triton.cdiv(width, _PART))](
        cache.blocks, cache.table, sources, merged, num_entries, merged.shape[1], end,
        *cache.blocks.stride()[:3], sources.stride(0),
        WIDTH=width, BLOCK=cache.block_size, ENTRIES=_ENTRIES, PART=_PART,
    )  # fmt: skip
