# SPDX-License-Identifier: Apache-2.0
"""FlashAttention's functions in plain PyTorch, so that vLLM's backend around them runs on CPU."""

from __future__ import annotations

from typing import Any

import torch


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    **_: Any,
) -> None:
    """Causal attention of each row over the first ``seqused_k`` tokens of its blocks."""
    assert causal
    group = q.shape[1] // k.shape[2]
    for row, length in enumerate(seqused_k.tolist()):
        first, last = cu_seqlens_q[row : row + 2].tolist()
        if first == last:
            continue
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (one[blocks].flatten(0, 1)[:length].movedim(0, 1) for one in (k, v))
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        logits = q[first:last].movedim(0, 1) @ keys.transpose(1, 2) * softmax_scale
        place = torch.arange(length - (last - first), length)[:, None]
        logits = logits.masked_fill(torch.arange(length) > place, float("-inf"))
        out[first:last] = (logits.softmax(-1) @ values).movedim(0, 1)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *_: Any,
) -> None:
    """Write rows to their slots; a slot of -1 is padding."""
    slots = slot_mapping[slot_mapping >= 0]
    for cache, rows in ((key_cache, key), (value_cache, value)):
        rows = rows[: len(slot_mapping)][slot_mapping >= 0]
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def install() -> None:
    from vllm.v1.attention.backends import flash_attn

    flash_attn.get_flash_attn_version = lambda *_, **__: 3
    flash_attn.get_scheduler_metadata = lambda *_, **__: torch.zeros(1, dtype=torch.int32)
    flash_attn.flash_attn_varlen_func = varlen
    flash_attn.reshape_and_cache_flash = reshape_and_cache
