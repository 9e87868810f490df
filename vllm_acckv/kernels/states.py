# SPDX-License-Identifier: Apache-2.0
"""What AccKV asks of keys and values, answered from the paged cache for several layers at once.

Each kernel reads the rows of the tokens it is asked about, once, and sums in a fixed order. The
reference is :class:`vllm_acckv.states.DenseStates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_acckv.kernels.paged import PagedLayers, rows_of
from vllm_acckv.states import DenseStates

# Numbers of a tile of rows: 64 registers of each thread.
_TILE = 8192
# Programs of a launch: some for each multiprocessor of a large GPU.
_PROGRAMS = 1024
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
# Merged entries of a prompt are of two modalities at most.
_GROUPS = 2
# No prompt may compile a kernel anew, which takes a second.
_jit = triton.jit(
    do_not_specialize=[
        "num_tokens",
        "part_tokens",
        "groups_stride_layer",
        "groups_stride_head",
        "shares_stride_layer",
        "shares_stride_head",
        "wanted_stride_layer",
        "wanted_stride_head",
    ],
    do_not_specialize_on_alignment=["table"],  # a row of vLLM's
)


@triton.jit
def _read(
    like, addresses, table, cosines, sines, layer, kv_head, tokens, present,
    stride_block, stride_head, stride_slot,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """fp32 ``[tokens, DIMS]``: the first ``WIDTH`` numbers of each row, zero where there is no
    token; keys turned back by ``HALF`` angles each, if any."""
    dims = tl.arange(0, DIMS)
    at = rows_of(
        like, addresses, table, layer, kv_head, tokens, present,
        stride_block, stride_head, stride_slot, BLOCK,
    )  # fmt: skip
    mask = present[:, None] & (dims < WIDTH)[None, :]
    rows = tl.load(at[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    if HALF:
        # Half-split layout: dimension i pairs with i + HALF.
        mask = present[:, None] & (dims < 2 * HALF)[None, :]
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
        other = tl.load(at[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        angle = tokens[:, None] * HALF + (dims % HALF)[None, :]
        cosine = tl.load(cosines + angle, mask=mask, other=1.0)
        sine = tl.load(sines + angle, mask=mask, other=0.0)
        rows = rows * cosine + tl.where((dims < HALF)[None, :], other, -other) * sine
    return rows


@triton.jit
def _units(rows):
    norm = tl.sqrt(tl.sum(rows * rows, 1))
    return rows / tl.where(norm < 1e-12, 1e-12, norm)[:, None]  # NaN stays


@_jit
def _means(
    like, addresses, table, cosines, sines, groups, shares, out, num_tokens, part_tokens, num_heads,
    stride_block, stride_head, stride_slot,
    groups_stride_layer, groups_stride_head, shares_stride_layer, shares_stride_head,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Of one part of the tokens: rows times the share of each in its group's mean."""
    layer, kv_head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    of_row = groups + layer * groups_stride_layer + kv_head * groups_stride_head
    share_of = shares + layer * shares_stride_layer + kv_head * shares_stride_head
    number = tl.arange(0, GROUPS)
    total = tl.zeros([GROUPS, DIMS], tl.float32)
    start = tl.program_id(1) * part_tokens
    for first in range(start, min(start + part_tokens, num_tokens), TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        group = tl.load(of_row + tokens, mask=tokens < num_tokens, other=-1)
        rows = _read(
            like, addresses, table, cosines, sines, layer, kv_head, tokens, group >= 0,
            stride_block, stride_head, stride_slot, WIDTH, DIMS, HALF, BLOCK,
        )  # fmt: skip
        rows = tl.where(rows != rows, 0.0, tl.clamp(rows, -_LARGEST, _LARGEST))
        share = tl.load(share_of + group, mask=group >= 0, other=0.0)
        for one in tl.static_range(GROUPS):
            part = tl.sum(rows * tl.where(group == one, share, 0.0)[:, None], 0)
            total += tl.where((number == one)[:, None], part[None, :], 0.0)
    dims = tl.arange(0, DIMS)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * GROUPS + number
    tl.store(out + at[:, None] * WIDTH + dims[None, :], total, mask=(dims < WIDTH)[None, :])


@_jit
def _directions(
    like, addresses, table, cosines, sines, wanted, out, num_tokens, part_tokens, num_heads,
    stride_block, stride_head, stride_slot, wanted_stride_layer, wanted_stride_head,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Of one part of the tokens: sum of the unit keys."""
    layer, kv_head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    of_row = wanted + layer * wanted_stride_layer + kv_head * wanted_stride_head
    total = tl.zeros([DIMS], tl.float32)
    start = tl.program_id(1) * part_tokens
    for first in range(start, min(start + part_tokens, num_tokens), TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        present = tl.load(of_row + tokens, mask=tokens < num_tokens, other=0) != 0
        rows = _read(
            like, addresses, table, cosines, sines, layer, kv_head, tokens, present,
            stride_block, stride_head, stride_slot, WIDTH, DIMS, HALF, BLOCK,
        )  # fmt: skip
        total += tl.sum(_units(rows), 0)
    dims = tl.arange(0, DIMS)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * WIDTH + dims
    tl.store(out + at, total, mask=dims < WIDTH)


@_jit
def _similarities(
    like, addresses, table, cosines, sines, wanted, direction, out, num_tokens, num_heads,
    stride_block, stride_head, stride_slot, wanted_stride_layer, wanted_stride_head,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """Of one tile of tokens: products of unit keys and the direction, or squared distances of keys
    from it."""
    layer, kv_head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < num_tokens
    of_row = wanted + layer * wanted_stride_layer + kv_head * wanted_stride_head
    present = tl.load(of_row + tokens, mask=inside, other=0) != 0
    rows = _read(
        like, addresses, table, cosines, sines, layer, kv_head, tokens, present,
        stride_block, stride_head, stride_slot, WIDTH, DIMS, HALF, BLOCK,
    )  # fmt: skip
    dims = tl.arange(0, DIMS)
    towards = tl.load(direction + tl.program_id(0) * WIDTH + dims, mask=dims < WIDTH, other=0.0)
    if DISTANCE:
        away = rows - towards[None, :]
        product = tl.sum(away * away, 1)
    else:
        product = tl.sum(_units(rows) * towards[None, :], 1)
    at = out + tl.program_id(0).to(tl.int64) * num_tokens + tokens
    tl.store(at, tl.where(present, product, 0.0), mask=inside)


@dataclass(frozen=True)
class PagedStates:
    """:class:`vllm_acckv.states.States` of the first ``length`` tokens of a request, with a
    dimension of layers.

    Each method moves the rows of the tokens it is asked about: ``layers * G * tokens * D``
    elements, twice as many for :meth:`means`.
    """

    layers: PagedLayers
    length: int

    @property
    def dtype(self) -> torch.dtype:
        return self.layers.dtype

    def dense(self) -> DenseStates:
        """The same as tensors."""
        read = [self.layers.layer(index).read(self.length) for index in range(len(self.layers))]
        keys, values = zip(*read, strict=True)
        return DenseStates(torch.stack(keys), torch.stack(values))

    def means(
        self, groups: torch.Tensor, angles: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        number, width = groups.shape[-2], 2 * self.layers.head_size
        numbers = torch.arange(1, number + 1, dtype=torch.int8, device=groups.device)
        group = (groups * numbers[:, None]).sum(-2, dtype=torch.int8) - 1
        shares = 1 / groups.sum(-1).clamp(min=1)
        shape = self._shape(width, angles)
        parts, part_tokens = self._parts(shape["TOKENS"])
        assert number <= _GROUPS
        out = shares.new_empty(*self._heads, parts, _GROUPS, width)
        group, shares = self._by_head(group), self._by_head(shares)
        _means[(out.shape[0] * out.shape[1], parts)](
            *self._pointers(angles), group, shares, out, self.length, part_tokens, *self._strides,
            *group.stride()[:2], *shares.stride()[:2],
            **shape, GROUPS=_GROUPS,
        )  # fmt: skip
        keys, values = out.sum(2)[:, :, :number].split(self.layers.head_size, -1)
        return keys, values

    def directions(self, tokens: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
        width = self.layers.head_size
        shape = self._shape(width, angles)
        parts, part_tokens = self._parts(shape["TOKENS"])
        out = torch.empty(*self._heads, parts, width, device=tokens.device)
        tokens = self._by_head(tokens)
        _directions[(out.shape[0] * out.shape[1], parts)](
            *self._pointers(angles), tokens, out, self.length, part_tokens, *self._strides,
            *tokens.stride()[:2], **shape,
        )  # fmt: skip
        return out.sum(2)

    def similarities(
        self, direction: torch.Tensor, tokens: torch.Tensor, angles: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._along(direction, tokens, angles, distance=False)

    def distances(
        self, centre: torch.Tensor, tokens: torch.Tensor, angles: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._along(centre, tokens, angles, distance=True)

    def _along(
        self,
        direction: torch.Tensor,
        tokens: torch.Tensor,
        angles: torch.Tensor | None,
        distance: bool,
    ) -> torch.Tensor:
        shape = self._shape(self.layers.head_size, angles)
        out = torch.empty(*self._heads, self.length, device=tokens.device)
        tokens = self._by_head(tokens)
        _similarities[(out.shape[0] * out.shape[1], triton.cdiv(self.length, shape["TOKENS"]))](
            *self._pointers(angles), tokens, direction.contiguous(), out, self.length,
            *self._strides, *tokens.stride()[:2], **shape, DISTANCE=distance,
        )  # fmt: skip
        return out

    @property
    def _heads(self) -> tuple[int, int]:
        return len(self.layers), self.layers.num_kv_heads

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., S, n]`` as ``[layers, G, n]``, contiguous in ``n``, without copying heads."""
        return rows.contiguous().expand(*self._heads, rows.shape[-1])

    def _parts(self, tile: int) -> tuple[int, int]:
        """How many parts of the prompt are summed apart, and the tokens of each: whole tiles."""
        tiles = triton.cdiv(self.length, tile)
        parts = max(1, min(_PROGRAMS // (len(self.layers) * self.layers.num_kv_heads), tiles))
        part_tokens = triton.cdiv(tiles, parts) * tile
        return triton.cdiv(self.length, part_tokens), part_tokens

    def _pointers(self, angles: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        layers, turns = self.layers, (self.layers.addresses,) * 2
        if angles is not None:
            angles = angles.contiguous()
            turns = angles.cos(), angles.sin()
        return layers.caches[0], layers.addresses, layers.table, *turns

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.layers.num_kv_heads, *self.layers.caches[0].stride()[:3]

    def _shape(self, width: int, angles: torch.Tensor | None) -> dict[str, Any]:
        dims = max(16, triton.next_power_of_2(width))
        tokens = _TILE // dims
        return {
            "WIDTH": width,
            "DIMS": dims,
            "HALF": 0 if angles is None else angles.shape[1],
            "BLOCK": self.layers.block_size,
            "TOKENS": tokens if angles is None else tokens // 4,  # cosines, sines, partners
        }
