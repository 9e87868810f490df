# SPDX-License-Identifier: Apache-2.0
"""Bring the entries that layers keep to the end of the prompt, in place and in one launch.

Entries keep their order and are aligned to the end, so a token moves to a higher slot or stays; but
a merged entry behind a kept token moves those in front down by one. A program goes from the last
entry to the first, and reads one tile of entries ahead of what it writes: it never overwrites what
it has still to read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_acckv.kernels.paged import PagedLayers, rows_of

_ENTRIES = 64
_PART = 64


def _countable(
    layers: PagedLayers, merged: torch.Tensor | None
) -> tuple[PagedLayers, torch.Tensor | None]:
    """The same numbers as bytes where they are of 8 bits, for which PyTorch can do little else."""
    if layers.dtype.itemsize > 1:
        return layers, merged
    caches = [cache.view(torch.uint8) for cache in layers.caches]
    entries = None if merged is None else merged.view(torch.uint8)
    return PagedLayers(caches, layers.table), entries


def move_reference(
    layers: PagedLayers, sources: torch.Tensor, end: int, merged: torch.Tensor | None = None
) -> None:
    """Rewrite slots ``end - L .. end - 1`` of every layer, in PyTorch.

    Args:
        layers: their dtype may be any, numbers are copied bit by bit.
        sources: int32 ``[layers, G, L]``, or with 1 in place of ``G``: for each slot the token
            whose keys and values go there, in increasing order; ``end + m`` for merged entry
            ``m``; -1 to leave a slot in front as it is.
        end: tokens before the move.
        merged: ``[layers, G, M, 2 * D]`` in the dtype of the cache.
    """
    layers, merged = _countable(layers, merged)
    first = end - sources.shape[-1]
    sources = sources.expand(len(layers), layers.num_kv_heads, -1)
    for index, of_layer in enumerate(sources):
        cache = layers.layer(index)
        rows = old = cache.rows(end)
        if merged is not None:
            rows = torch.cat([rows, merged[index]], 1)
        picked = of_layer.clamp(min=0).long()[..., None].expand(-1, -1, rows.shape[2])
        kept = torch.where((of_layer >= 0)[..., None], rows.gather(1, picked), old[:, first:])
        cache.write(first, kept)


@triton.jit
def _load(
    like, addresses, table, sources, merged, layer, kv_head, head, entries, num_entries, num_merged,
    end, numbers, stride_block, stride_head, stride_slot, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What goes into a tile of slots, and which of them are written."""
    real = (entries >= 0) & (entries < num_entries)
    source = tl.load(sources + entries, mask=real, other=-1)
    token = (source >= 0) & (source < end)
    inside = (numbers < WIDTH)[None, :]
    at = rows_of(
        like, addresses, table, layer, kv_head, source, token,
        stride_block, stride_head, stride_slot, BLOCK,
    )  # fmt: skip
    rows = tl.load(at[:, None] + numbers[None, :], mask=token[:, None] & inside, other=0)
    entry = source >= end
    at = merged + (head * num_merged + source - end) * WIDTH
    other = tl.load(at[:, None] + numbers[None, :], mask=entry[:, None] & inside, other=0)
    return tl.where(entry[:, None], other, rows), source >= 0


@triton.jit(
    do_not_specialize=[
        "num_entries",
        "num_merged",
        "end",
        "sources_stride_layer",
        "sources_stride_head",
    ],
    do_not_specialize_on_alignment=["table"],  # a row of vLLM's
)
def _move(
    like, addresses, table, sources, merged, num_entries, num_merged, end, num_heads,
    stride_block, stride_head, stride_slot, sources_stride_layer, sources_stride_head,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    layer, kv_head = head // num_heads, head % num_heads
    numbers = tl.program_id(1) * PART + tl.arange(0, PART)
    of_head = sources + layer * sources_stride_layer + kv_head * sources_stride_head
    tiles = (num_entries + ENTRIES - 1) // ENTRIES
    entries = (tiles - 1) * ENTRIES + tl.arange(0, ENTRIES)
    rows, stored = _load(
        like, addresses, table, of_head, merged, layer, kv_head, head, entries, num_entries,
        num_merged, end, numbers, stride_block, stride_head, stride_slot, WIDTH, BLOCK,
    )  # fmt: skip
    for _ in range(0, tiles):
        ahead, stored_ahead = _load(
            like, addresses, table, of_head, merged, layer, kv_head, head, entries - ENTRIES,
            num_entries, num_merged, end, numbers, stride_block, stride_head, stride_slot,
            WIDTH, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has read before one writes
        at = rows_of(
            like, addresses, table, layer, kv_head, end - num_entries + entries, stored,
            stride_block, stride_head, stride_slot, BLOCK,
        )  # fmt: skip
        mask = stored[:, None] & (numbers < WIDTH)[None, :]
        tl.store(at[:, None] + numbers[None, :], rows, mask=mask)
        rows, stored, entries = ahead, stored_ahead, entries - ENTRIES


def move(
    layers: PagedLayers, sources: torch.Tensor, end: int, merged: torch.Tensor | None = None
) -> None:
    """:func:`move_reference` in one kernel; arguments as there."""
    layers, merged = _countable(layers, merged)
    num_heads, width = layers.num_kv_heads, 2 * layers.head_size
    num_entries = sources.shape[-1]
    sources = sources.expand(len(layers), num_heads, num_entries)
    if merged is None:
        merged = layers.caches[0].new_empty(len(layers), num_heads, 0, width)
    merged = merged.contiguous()
    _move[(len(layers) * num_heads, triton.cdiv(width, _PART))](
        layers.caches[0], layers.addresses, layers.table, sources, merged, num_entries,
        merged.shape[2], end, num_heads, *layers.caches[0].stride()[:3], *sources.stride()[:2],
        WIDTH=width, BLOCK=layers.block_size, ENTRIES=_ENTRIES, PART=_PART,
    )  # fmt: skip
