# SPDX-License-Identifier: Apache-2.0
"""One request's part of a paged KV cache, as kernels and their references see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer and the blocks of one request.

    Attributes:
        blocks: ``[num_blocks, G, B, 2 * D]``, the cache of the layer: keys in front of values. Any
            strides, but the last one is 1.
        table: int32 ``[n]``, the request's blocks in logical order, on the same device.
    """

    blocks: torch.Tensor
    table: torch.Tensor

    @property
    def num_kv_heads(self) -> int:
        return self.blocks.shape[1]

    @property
    def block_size(self) -> int:
        return self.blocks.shape[2]

    @property
    def head_size(self) -> int:
        return self.blocks.shape[3] // 2

    def rows(self, length: int) -> torch.Tensor:
        """Keys and values side by side, ``[G, length, 2 * D]`` of slots ``0 .. length-1``."""
        blocks = self.blocks[self.table[: -(-length // self.block_size)].long()]
        return blocks.movedim(1, 0).flatten(1, 2)[:, :length]

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[G, length, D]`` of slots ``0 .. length-1``, copied."""
        key, value = self.rows(length).split(self.head_size, dim=-1)
        return key, value

    def write(self, first_slot: int, rows: torch.Tensor) -> None:
        """Store ``[G, n, 2 * D]`` into slots ``first_slot .. first_slot+n-1``."""
        slots = first_slot + torch.arange(rows.shape[1], device=rows.device)
        blocks = self.table[slots // self.block_size].long()
        self.blocks[blocks, :, slots % self.block_size] = rows.transpose(0, 1)


@dataclass(frozen=True)
class PagedLayers:
    """Keys and values of several layers and the blocks of one request.

    Attributes:
        caches: of each layer, see :attr:`PagedCache.blocks`; all of one shape, stride and dtype.
        table: int32 ``[n]``, the request's blocks in logical order; the layers share them.
    """

    caches: Sequence[torch.Tensor]
    table: torch.Tensor

    def __post_init__(self) -> None:
        forms = {(one.shape, one.stride(), one.dtype) for one in self.caches}
        if len(forms) != 1:
            raise ValueError(f"The caches of layers have {len(forms)} forms; expected one.")
        if any(cache.data_ptr() % 16 for cache in self.caches):
            raise ValueError("The cache of a layer does not begin at a multiple of 16 bytes.")

    @cached_property
    def addresses(self) -> torch.Tensor:
        """int64 ``[layers]`` on the device: where each cache begins."""
        pointers = [cache.data_ptr() for cache in self.caches]
        device = self.table.device
        made = torch.tensor(pointers, pin_memory=device.type == "cuda")
        return made.to(device, non_blocking=True)

    def __len__(self) -> int:
        return len(self.caches)

    @property
    def num_kv_heads(self) -> int:
        return self.caches[0].shape[1]

    @property
    def block_size(self) -> int:
        return self.caches[0].shape[2]

    @property
    def head_size(self) -> int:
        return self.caches[0].shape[3] // 2

    @property
    def dtype(self) -> torch.dtype:
        return self.caches[0].dtype

    def layer(self, index: int) -> PagedCache:
        return PagedCache(self.caches[index], self.table)


@triton.jit
def rows_of(
    like, addresses, table, layer, kv_head, tokens, present,
    stride_block, stride_head, stride_slot, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pointers to the rows of ``tokens`` in a layer's cache, where ``present``; ``like`` is any
    pointer of its dtype."""
    # An address read from memory could be any; known to be aligned, 16 bytes are read at once.
    cache = tl.multiple_of(tl.load(addresses + layer).to(like.dtype), 16)
    block = tl.load(table + tokens // BLOCK, mask=present, other=0).to(tl.int64)
    return cache + block * stride_block + kv_head * stride_head + (tokens % BLOCK) * stride_slot
