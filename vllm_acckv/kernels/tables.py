# SPDX-License-Identifier: Apache-2.0
"""Block tables and lengths per layer, in buffers that CUDA graphs may read at fixed addresses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024


class LayerTables:
    """What each layer of an attention group attends to: a row's blocks without those that the
    layer left empty.

    Attributes:
        freed: int32 ``[slots, layers]``, leading blocks that a layer left empty of the request in
            a slot of the model runner's table; in blocks of the cache.
        blocks: int32 ``[layers, rows, columns]``.
        lengths: int32 ``[layers, rows]``, tokens including those of the step.
        longest: int32 ``[rows]``, the longest of a row's lengths.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_columns: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.block_size = block_size
        self.freed = zeros(num_rows, num_layers)
        self.blocks = zeros(num_layers, num_rows, num_columns)
        self.lengths = zeros(num_layers, num_rows)
        self.longest = zeros(num_rows)

    def refresh_reference(
        self, table: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Fill the first rows for a batch, in PyTorch.

        Args:
            table: int32 ``[rows, columns]``, blocks of each row in logical order.
            lengths: int32 ``[rows]``, tokens of each row with nothing freed.
            slots: int64 ``[n]`` of the first ``n`` rows; the others are padding.
        """
        rows, columns = len(lengths), self.blocks.shape[2]
        freed = torch.zeros_like(self.freed[:rows])
        freed[: len(slots)] = self.freed[slots]
        self.lengths[:, :rows] = lengths - freed.T * self.block_size
        self.longest[:rows] = self.lengths[:, :rows].amax(0)
        source = torch.arange(columns, device=table.device) + freed.T[..., None]
        index = source.clamp(max=columns - 1).long()
        self.blocks[:, :rows] = table.expand(len(index), -1, -1).gather(2, index)

    def refresh(self, table: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor) -> None:
        """:meth:`refresh_reference` in one kernel; arguments as there. Columns behind a row's
        length are left as they are."""
        num_layers, _, num_columns = self.blocks.shape
        _refresh[(len(lengths), num_layers)](
            table, lengths, slots, self.freed, self.blocks, self.lengths, self.longest,
            len(slots), num_columns, self.block_size, table.stride(0), self.freed.stride(0),
            self.blocks.stride(0), self.blocks.stride(1), self.lengths.stride(0),
            LAYERS=triton.next_power_of_2(num_layers), COLUMNS=_COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots"])
def _refresh(
    table, lengths, slots, freed, layer_blocks, layer_lengths, longest,
    num_slots, num_columns, block_size, table_stride, freed_stride,
    blocks_stride_layer, blocks_stride_row, lengths_stride,
    LAYERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, layer = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    shift = 0
    least = 0
    if row < num_slots:
        of_row = freed + tl.load(slots + row) * freed_stride
        shift = tl.load(of_row + layer)
        layers = tl.arange(0, LAYERS)
        most = 2147483647
        least = tl.min(tl.load(of_row + layers, mask=layers < tl.num_programs(1), other=most), 0)
    seen = length - shift * block_size
    tl.store(layer_lengths + layer * lengths_stride + row, seen)
    if layer == 0:
        tl.store(longest + row, length - least * block_size)
    used = tl.minimum((seen + block_size - 1) // block_size, num_columns - shift)
    source = table + row.to(tl.int64) * table_stride + shift
    target = layer_blocks + layer.to(tl.int64) * blocks_stride_layer + row * blocks_stride_row
    for first in range(0, used, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = columns < used
        tl.store(target + columns, tl.load(source + columns, mask=mask), mask=mask)
