# SPDX-License-Identifier: Apache-2.0
"""One request's part of a paged KV cache, as kernels and their references see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
