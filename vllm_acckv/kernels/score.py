# SPDX-License-Identifier: Apache-2.0
"""Observed attention from a paged cache: the sums of :mod:`vllm_acckv.scores` in two passes.

The first pass reads the keys for the log-sum-exp of every observed row, the second reads them once
more and adds up what the rows pay to each. Nothing of size rows x keys is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_acckv.kernels.paged import PagedCache
from vllm_acckv.scores import Weights, observed_attention

_LOG2_E = 1.4426950408889634
# Programs of the first pass: about two for each multiprocessor of a large GPU.
_PROGRAMS = 256
_MAX_SPLITS = 64
_ROWS, _COLUMNS = 64, 64
# Triton's interpreter multiplies the bits of bf16 numbers as if they were integers.
_UPCAST = triton.knobs.runtime.interpret


def observe_reference(
    scores: torch.Tensor,
    query: torch.Tensor,
    cache: PagedCache,
    first_row: int,
    scale: float,
    weights: Weights | None = None,
) -> None:
    """Add the attention of some rows to ``scores``, in PyTorch.

    Args:
        scores: fp32 ``[G, l]``, ``l >= first_row + n``; columns behind the rows stay as they are.
        query: ``[n, H, D]`` rotated queries of consecutive tokens.
        cache: keys of tokens ``0 .. first_row + n - 1``.
        first_row: position of ``query[0]``.
        scale: softmax scale, times the scale of quantised keys.
        weights: factors on each probability (eq. 1 of AccKV).
    """
    length = first_row + len(query)
    key, _ = cache.read(length)
    scores[:, :length] += observed_attention(query, key, first_row, scale, weights)


@triton.jit
def _load_query(
    query, rows, num_rows, kv_head, stride_token, stride_head,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, DIMS]``: row ``r`` is query head ``r % HEADS`` of token ``r // HEADS``."""
    dims = tl.arange(0, DIMS)
    head = kv_head * HEADS + rows % HEADS
    at = query + (rows // HEADS)[:, None] * stride_token + head[:, None] * stride_head + dims
    return tl.load(at, mask=(rows < num_rows)[:, None] & (dims < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def _load_keys(
    cache, table, columns, num_columns, kv_head, stride_block, stride_head, stride_slot,
    HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``[DIMS, COLUMNS]``, zero behind ``num_columns``."""
    dims = tl.arange(0, DIMS)
    present = columns < num_columns
    block = tl.load(table + columns // BLOCK, mask=present, other=0).to(tl.int64)
    at = cache + block * stride_block + kv_head * stride_head + (columns % BLOCK) * stride_slot
    mask = (dims < HEAD_SIZE)[:, None] & present[None, :]
    return tl.load(at[None, :] + dims[:, None], mask=mask, other=0.0)


@triton.jit
def _logits(
    queries, keys, rows, columns, first_row, scale, HEADS: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Base-2 logits ``[ROWS, COLUMNS]`` under the causal mask."""
    if UPCAST:
        queries = queries.to(tl.float32)
    product = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee")
    seen = columns[None, :] <= (first_row + rows // HEADS)[:, None]
    return tl.where(seen, product * scale, float("-inf"))


@triton.jit
def _log_sums(
    query, cache, table, maxima, sums, num_rows, num_columns, split_columns, first_row, scale,
    query_stride_token, query_stride_head, stride_block, stride_head, stride_slot,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of one split of the columns: maximum and sum of exponentials of every row."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    queries = _load_query(
        query, rows, num_rows, kv_head, query_stride_token, query_stride_head,
        HEADS, HEAD_SIZE, DIMS,
    )  # fmt: skip
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    start = split * split_columns
    for first in range(start, min(start + split_columns, num_columns), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        keys = _load_keys(
            cache, table, columns, num_columns, kv_head, stride_block, stride_head, stride_slot,
            HEAD_SIZE, DIMS, BLOCK,
        )  # fmt: skip
        logits = _logits(queries, keys, rows, columns, first_row, scale, HEADS, UPCAST)
        higher = tl.maximum(maximum, tl.max(logits, 1))
        # A row that sees nothing yet keeps a sum of 0 and must not subtract infinities.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(maximum - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        maximum = higher
    at = (split * tl.num_programs(1) + kv_head) * num_rows + rows
    tl.store(maxima + at, maximum, mask=rows < num_rows)
    tl.store(sums + at, total, mask=rows < num_rows)


@triton.jit
def _column_sums(
    query, cache, table, maxima, sums, scores, row_factors, column_factors,
    num_rows, num_columns, num_splits, first_row, scale, scores_stride,
    query_stride_token, query_stride_head, stride_block, stride_head, stride_slot,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Add to ``scores`` what all rows pay to one tile of columns."""
    kv_head = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keys = _load_keys(
        cache, table, columns, num_columns, kv_head, stride_block, stride_head, stride_slot,
        HEAD_SIZE, DIMS, BLOCK,
    )  # fmt: skip
    splits = tl.arange(0, SPLITS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = (splits[:, None] * tl.num_programs(1) + kv_head) * num_rows + rows[None, :]
        mask = (splits < num_splits)[:, None] & (rows < num_rows)[None, :]
        part_maxima = tl.load(maxima + at, mask=mask, other=float("-inf"))
        part_sums = tl.load(sums + at, mask=mask, other=0.0)
        maximum = tl.max(part_maxima, 0)
        maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
        denominator = tl.sum(part_sums * tl.exp2(part_maxima - maximum[None, :]), 0)
        queries = _load_query(
            query, rows, num_rows, kv_head, query_stride_token, query_stride_head,
            HEADS, HEAD_SIZE, DIMS,
        )  # fmt: skip
        logits = _logits(queries, keys, rows, columns, first_row, scale, HEADS, UPCAST)
        attention = tl.exp2(logits - maximum[:, None])
        real = rows < num_rows
        factor = tl.where(real, 1.0, 0.0) / (tl.where(real, denominator, 1.0) * HEADS)
        if WEIGHTED:
            factor *= tl.load(row_factors + rows // HEADS, mask=real, other=0.0)
        total += tl.sum(attention * factor[:, None], 0)
    present = columns < num_columns
    if WEIGHTED:
        total *= tl.load(column_factors + columns, mask=present, other=0.0)
    at = scores + kv_head * scores_stride + columns
    tl.store(at, tl.load(at, mask=present, other=0.0) + total, mask=present)


def observe(
    scores: torch.Tensor,
    query: torch.Tensor,
    cache: PagedCache,
    first_row: int,
    scale: float,
    weights: Weights | None = None,
) -> None:
    """:func:`observe_reference` in two kernels; arguments as there.

    Moves ``2 * G * m * D`` elements of the cache, ``m`` being the last row's position plus one.
    """
    num_tokens, num_heads, head_size = query.shape
    heads = num_heads // cache.num_kv_heads
    num_rows, num_columns = num_tokens * heads, first_row + num_tokens
    row_tiles = triton.cdiv(num_rows, _ROWS)
    splits = max(1, min(_PROGRAMS // (row_tiles * cache.num_kv_heads), _MAX_SPLITS))
    tiles = triton.cdiv(num_columns, _COLUMNS)
    split_columns = triton.cdiv(tiles, min(splits, tiles)) * _COLUMNS
    splits = triton.cdiv(num_columns, split_columns)
    maxima, sums = scores.new_empty(2, splits, cache.num_kv_heads, num_rows)
    row_factors = column_factors = scores
    if weights is not None:
        positions = torch.arange(num_columns, device=scores.device)
        row_factors = weights.rows(positions[first_row:])
        column_factors = weights.columns(positions)
    strides = (*query.stride()[:2], *cache.blocks.stride()[:3])
    shape = {
        "HEADS": heads,
        "HEAD_SIZE": head_size,
        "DIMS": max(16, triton.next_power_of_2(head_size)),
        "BLOCK": cache.block_size,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "UPCAST": _UPCAST,
    }
    _log_sums[(row_tiles, cache.num_kv_heads, splits)](
        query, cache.blocks, cache.table, maxima, sums, num_rows, num_columns, split_columns,
        first_row, scale * _LOG2_E, *strides, **shape,
    )  # fmt: skip
    _column_sums[(tiles, cache.num_kv_heads)](
        query, cache.blocks, cache.table, maxima, sums, scores, row_factors, column_factors,
        num_rows, num_columns, splits, first_row, scale * _LOG2_E, scores.stride(0), *strides,
        **shape, SPLITS=triton.next_power_of_2(splits), WEIGHTED=weights is not None,
    )  # fmt: skip
