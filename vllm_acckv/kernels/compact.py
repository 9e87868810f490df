# SPDX-License-Identifier: Apache-2.0
"""Compaction of several layers of one request, inside the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_acckv.kernels.move import move
from vllm_acckv.kernels.paged import PagedLayers
from vllm_acckv.kernels.score import observe
from vllm_acckv.kernels.states import PagedStates
from vllm_acckv.movement import entry_sources
from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.policies.acckv_plus import AccKVPlus
from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.scores import Weights
from vllm_acckv.selection import Kept, Selection
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout

# Audio and video tokens each of the prompt that warms up: enough for PyTorch to sort as it does
# with long ones.
_CLIP = 2500


def compact(
    policy: Policy,
    scores: torch.Tensor,
    layers: PagedLayers,
    prompt: Prompt,
    first: Layer,
    block_size: int,
) -> tuple[Selection, Kept]:
    """Decide for all layers, and move their entries to the end of the prompt in one launch.

    Args:
        policy: one with ``layers_alike``.
        scores: fp32 ``[layers, G, l]``.
        layers: holding the ``l`` tokens of the prompt.
        first: of the layers, and the ranks that hold their other heads.
        block_size: of the block manager.
    """
    length = scores.shape[-1]
    states = PagedStates(layers, length)
    selection, kept = policy.decide(scores, states, prompt, first, block_size, wait=False)
    merged = None
    if kept.merged is not None:
        merged = torch.cat([kept.merged.key, kept.merged.value], -1)
    move(layers, entry_sources(kept).int(), length, merged)
    return selection, kept


def warm_up(
    policy: Policy,
    caches: Sequence[torch.Tensor],
    num_heads: int,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    """Compile what a first clip would wait seconds for, whatever its request sets.

    Args:
        caches: of the layers, as in :class:`PagedLayers`; their first block holds nobody's tokens.
        num_heads: query heads of this rank.
        dtype: of queries.
    """
    device = caches[0].device
    layout = Layout(np.repeat(np.array([VIDEO, AUDIO, TEXT], np.int8), [_CLIP, _CLIP, 9]))
    table = torch.zeros(layout.length, dtype=torch.int32, device=device)
    layers = PagedLayers(caches, table)
    scores = torch.zeros(len(layers), layers.num_kv_heads, layout.length, device=device)
    query = torch.zeros(9, num_heads, layers.head_size, dtype=dtype, device=device)
    ones = torch.ones(layout.length, device=device)
    for weights in (None, Weights(ones, ones)):
        observe(scores[0], query, layers.layer(0), 2 * _CLIP, 1.0, weights)
    angles = torch.zeros(layout.length, layers.head_size // 2, device=device)
    prompt = Prompt.of(layout, device, angles)
    if policy.layers_alike:
        compact(policy, scores, layers, prompt, Layer(), block_size)
    of_requests = [AccKV(**AccKV.presets[preset]) for preset in ("paper", "corrected")]
    for other in (*of_requests, AccKVPlus()):
        compact(other, scores, layers, prompt, Layer(), block_size)
