# SPDX-License-Identifier: Apache-2.0
"""Observed attention from a paged cache: the sums of :mod:`vllm_acckv.scores` in two passes.

The first pass reads the keys for the log-sum-exp of every observed row, the second reads them once
more and adds up what the rows pay to each. Nothing of size rows x keys is ever stored.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from vllm_acckv.kernels.paged import PagedCache
from vllm_acckv.scores import Weights, observed_attention

_LOG2_E = 1.4426950408889634
# Programs of the first pass: about two for each multiprocessor of a large GPU.
_PROGRAMS = 256
_MAX_SPLITS = 32
_ROWS, _COLUMNS = 64, 64
# Triton's interpreter multiplies the bits of bf16 numbers as if they were integers, and loses the
# smallest FP8 numbers on their way to fp16, not to fp32.
_UPCAST = triton.knobs.runtime.interpret

# No prompt may compile a kernel anew, which takes a second.
_jit = triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_columns",
        "num_splits",
        "split_columns",
        "first_row",
        "scores_stride",
    ],
    do_not_specialize_on_alignment=["table"],  # a row of vLLM's
)


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
        query: ``[n, H, D]`` rotated queries of consecutive tokens, FP8, fp16, bf16 or fp32.
        cache: keys of tokens ``0 .. first_row + n - 1``, of the queries' dtype or FP8.
        first_row: position of ``query[0]``.
        scale: softmax scale, times the scales of quantised keys and queries.
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
    """Base-2 logits ``[ROWS, COLUMNS]`` under the causal mask, fp32."""
    if UPCAST:
        queries = queries.to(tl.float32)
    elif queries.dtype.is_fp8():
        # Hopper adds up products of FP8 numbers with less precision than fp32; bf16 holds them all.
        queries = queries.to(tl.bfloat16)
    product = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee")
    seen = columns[None, :] <= (first_row + rows // HEADS)[:, None]
    return tl.where(seen, product * scale, float("-inf"))


@_jit
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


@_jit
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
            factor *= tl.load(row_factors + first_row + rows // HEADS, mask=real, other=0.0)
        total += tl.sum(attention * factor[:, None], 0)
    present = columns < num_columns
    if WEIGHTED:
        total *= tl.load(column_factors + columns, mask=present, other=0.0)
    at = scores + kv_head * scores_stride + columns
    tl.store(at, tl.load(at, mask=present, other=0.0) + total, mask=present)


def _log_sums_xformers(
    query: torch.Tensor, cache: PagedCache, length: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pass by xformers, for fp16, bf16 and FP8 queries on a GPU.

    What it has for a causal mask and any number of tokens is FlashAttention, PyTorch's own unless
    that package is installed. It cannot read blocks in which keys and values stand side by side, so
    the keys are copied out of the cache; and it wants values, which are the keys once more.

    Returns:
        maxima, sums: fp32 ``[1, G, n * H / G]``, the base-2 log-sum-exp of each row, and ones.
    """
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ImportError(
            "first_pass='xformers' needs xformers: pip install 'vllm-acckv[xformers]'"
        ) from error
    dtype = torch.bfloat16 if query.dtype.itemsize == 1 else query.dtype
    blocks = cache.table[: triton.cdiv(length, cache.block_size)].long()
    keys = cache.blocks[..., : cache.head_size][blocks].transpose(1, 2).flatten(0, 1)[:length]
    # Queries [1, n, G, H / G, D], keys [1, length, G, H / G, D] without copying them for each head.
    queries = query.to(dtype).unflatten(1, (cache.num_kv_heads, -1))[None]
    keys = keys.to(dtype)[None, :, :, None].expand(-1, -1, -1, queries.shape[3], -1)
    _, log_sums = fmha.memory_efficient_attention_partial(
        queries,
        keys,
        keys,
        attn_bias=fmha.attn_bias.LowerTriangularFromBottomRightMask(),
        scale=scale,
    )
    # [1, G, H / G, n], natural logarithms
    maxima = (log_sums * _LOG2_E).transpose(2, 3).flatten(2).contiguous()
    return maxima, torch.ones_like(maxima)


def observe(
    scores: torch.Tensor,
    query: torch.Tensor,
    cache: PagedCache,
    first_row: int,
    scale: float,
    weights: Weights | None = None,
    first_pass: Literal["triton", "xformers"] = "triton",
) -> None:
    """:func:`observe_reference` in two kernels; arguments as there.

    Moves ``2 * G * m * D`` elements of the cache, ``m`` being the last row's position plus one.

    Args:
        first_pass: who computes the log-sum-exps. xformers moves at least ``4 * G * m * D``
            elements for them, Triton ``G * m * D``.
    """
    num_tokens, num_heads, head_size = query.shape
    heads = num_heads // cache.num_kv_heads
    num_rows, num_columns = num_tokens * heads, first_row + num_tokens
    row_tiles, tiles = triton.cdiv(num_rows, _ROWS), triton.cdiv(num_columns, _COLUMNS)
    row_factors = column_factors = scores
    if weights is not None:
        row_factors, column_factors = weights.rows, weights.columns
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
    if first_pass == "xformers":
        maxima, sums = _log_sums_xformers(query, cache, num_columns, scale)
    else:
        splits = max(1, min(_PROGRAMS // (row_tiles * cache.num_kv_heads), _MAX_SPLITS))
        split_columns = triton.cdiv(tiles, min(splits, tiles)) * _COLUMNS
        splits = triton.cdiv(num_columns, split_columns)
        maxima = scores.new_empty(splits, cache.num_kv_heads, num_rows)
        sums = torch.empty_like(maxima)
        _log_sums[(row_tiles, cache.num_kv_heads, splits)](
            query, cache.blocks, cache.table, maxima, sums, num_rows, num_columns, split_columns,
            first_row, scale * _LOG2_E, *strides, **shape,
        )  # fmt: skip
    splits = len(maxima)
    _column_sums[(tiles, cache.num_kv_heads)](
        query, cache.blocks, cache.table, maxima, sums, scores, row_factors, column_factors,
        num_rows, num_columns, splits, first_row, scale * _LOG2_E, scores.stride(0), *strides,
        **shape, SPLITS=_MAX_SPLITS, WEIGHTED=weights is not None,
    )  # fmt: skip
