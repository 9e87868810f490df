# SPDX-License-Identifier: Apache-2.0
"""Bring the kept entries into the order in which they are written back."""

from __future__ import annotations

import torch

from vllm_acckv.selection import Kept


def entry_sources(kept: Kept) -> torch.Tensor:
    """What goes into each slot.

    Entries keep the order of the prompt; a merged entry stands where the last token merged into it
    was. Trailing text that is kept therefore stays where it is.

    Args:
        kept: what to keep of ``l`` tokens.

    Returns:
        int64 ``[..., S, L]`` with ``L = kept.length``: a token, ``l + m`` for merged entry ``m``,
        or -1 for the slots of ``kept.empty_blocks`` at the front.
    """
    tokens, merged = kept.tokens, kept.merged
    length = tokens.shape[-1]
    positions = torch.arange(length, device=tokens.device)
    before = tokens.cumsum(-1)
    total = before[..., -1:]
    place, source, stored = before - 1, positions.expand_as(before), tokens
    if merged is not None:
        last = torch.where(merged.sources, positions, -1).amax(-1)
        last = torch.where(merged.valid, last, length)  # those that are not stored move nothing
        last = last.expand(*tokens.shape[:-1], last.shape[-1])
        total = total + (last < length).sum(-1, keepdim=True)
        moved = (last[..., None] < positions).sum(-2)
        in_front = (last[..., None] > last[..., None, :]).sum(-1)
        entry_place = before.gather(-1, last.clamp(max=length - 1)) + in_front
        entries = length + torch.arange(last.shape[-1], device=tokens.device)
        place = torch.cat([place + moved, entry_place], -1)
        source = torch.cat([source, entries.expand_as(last)], -1)
        stored = torch.cat([stored, last < length], -1)
    # One slot more than there are, for what is not stored.
    slots = torch.full((*tokens.shape[:-1], kept.length + 1), -1, device=tokens.device)
    place = torch.where(stored, place + kept.length - total, kept.length)
    return slots.scatter_(-1, place, source)[..., :-1]


def gather_kept(
    kept: Kept, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collect the kept keys and values of a layer, as :func:`entry_sources` orders them.

    Args:
        kept: what to keep of ``l`` tokens.
        key, value: ``[G, l, D]``.

    Returns:
        keys and values ``[G, L, D]``, and their positions in the prompt, int64 ``[G, L]``, -1 for
        merged entries. In ``kept.empty_blocks`` at the front, keys and values are arbitrary and
        positions -1.
    """
    length = key.shape[1]
    source = entry_sources(kept).expand(len(key), -1)
    if kept.merged is not None:
        key = torch.cat([key, kept.merged.key], dim=1)
        value = torch.cat([value, kept.merged.value], dim=1)
    index = source.clamp(min=0)[..., None]
    return (
        key.gather(1, index.expand(-1, -1, key.shape[2])),
        value.gather(1, index.expand(-1, -1, value.shape[2])),
        torch.where(source < length, source, -1),
    )
