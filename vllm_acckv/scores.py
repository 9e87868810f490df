# SPDX-License-Identifier: Apache-2.0
"""Attention that observing query rows pay to every key, without the l x l matrix.

Only the rows a policy observes (for AccKV the text after the last clip) are ever computed, so
prefill itself keeps its fast attention kernel, and rows that arrive in different chunks of a
chunked prefill simply add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Weights:
    """Factor on each probability: one of its row times one of its column.

    Attributes:
        rows, columns: fp32 ``[l]``, by position.
    """

    rows: torch.Tensor
    columns: torch.Tensor


# Largest number of attention probabilities held at once (fp32, so 64 MiB).
_MAX_PROBABILITIES = 1 << 24


def observed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    first_row: int,
    scale: float,
    weights: Weights | None = None,
) -> torch.Tensor:
    """Sum of softmax attention over the given query rows.

    Args:
        query: ``[n, H, D]`` rotated queries of consecutive tokens.
        key: ``[G, m, D]`` cached keys of tokens ``0 .. m-1``, ``m >= first_row + n``.
        first_row: position of ``query[0]``.
        scale: softmax scale.
        weights: factors applied to each probability before summing (eq. 1 of AccKV).

    Returns:
        fp32 ``[G, m]``: per KV head, the sum over rows of the mean over its query heads.
    """
    num_rows, num_heads, _ = query.shape
    num_kv_heads, num_keys, _ = key.shape
    columns = torch.arange(num_keys, device=key.device)
    keys = key.float().transpose(1, 2)
    total = torch.zeros(num_kv_heads, num_keys, device=key.device)
    step = max(1, _MAX_PROBABILITIES // (num_heads * num_keys))
    for start in range(0, num_rows, step):
        part = query[start : start + step].float()
        first = first_row + start
        rows = torch.arange(first, first + len(part), device=key.device)[:, None]
        # [n, H, D] -> [G, n * H/G, D]: query heads of one group share its keys.
        grouped = part.unflatten(1, (num_kv_heads, -1)).movedim(1, 0)
        logits = (grouped.flatten(1, 2) @ keys).unflatten(1, grouped.shape[1:3]) * scale
        logits.masked_fill_((columns > rows)[None, :, None, :], float("-inf"))
        attention = logits.softmax(-1).mean(2)
        if weights is not None:
            attention = attention * weights.rows[first : first + len(part), None]
        total += attention.sum(1)
    return total if weights is None else total * weights.columns[:num_keys]
