# SPDX-License-Identifier: Apache-2.0
"""Bring the kept entries of a layer into the order in which they are written back."""

from __future__ import annotations

import torch

from vllm_acckv.selection import Kept


def gather_kept(
    kept: Kept, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collect the kept keys and values of a layer.

    Entries keep the order of the prompt; a merged entry stands where the last token merged into it
    was. Trailing text that is kept therefore stays where it is.

    Args:
        kept: what to keep of ``l`` tokens.
        key, value: ``[G, l, D]``.

    Returns:
        keys and values ``[G, L, D]`` with ``L = kept.length``, and their positions in the prompt,
        int64 ``[G, L]``, -1 for merged entries. In ``kept.empty_blocks`` at the front, keys and
        values are arbitrary and positions -1.
    """
    length = key.shape[1]
    # Sort keys: token j has 2 j, a merged entry 2 j + 1 behind token j; -1 is not stored.
    order = torch.arange(length, device=key.device) * 2
    order = torch.where(kept.tokens, order, -1)
    if kept.merged is not None:
        merged = kept.merged
        positions = torch.arange(length, device=key.device)
        last = torch.where(merged.sources, positions, -1).amax(-1)
        order = torch.cat([order, torch.where(merged.valid, last * 2 + 1, -1)], dim=1)
        key = torch.cat([key, merged.key], dim=1)
        value = torch.cat([value, merged.value], dim=1)
    source = order.argsort(dim=1, stable=True)[:, order.shape[1] - kept.length :]
    stored = order.gather(1, source) >= 0
    index = source[..., None]
    return (
        key.gather(1, index.expand(-1, -1, key.shape[2])),
        value.gather(1, index.expand(-1, -1, value.shape[2])),
        torch.where(stored & (source < length), source, -1),
    )
