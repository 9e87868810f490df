# SPDX-License-Identifier: Apache-2.0
"""A layer of ``DynamicCache`` that holds fewer entries than it has seen tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from vllm_acckv.policies.h2o import H2O
from vllm_acckv.scores import observed_attention
from vllm_acckv.selection import select_best
from vllm_acckv.spans import TEXT, Layout

ONE_SEQUENCE = "a KV policy works on one sequence, without padding to a batch and without beams"


def kept_entries(scores: torch.Tensor, size: int, recent: int) -> torch.Tensor:
    """What one step of H2O keeps: the best of all entries but the last, and the last.

    Args:
        scores: fp32 ``[G, L]`` in the order of the entries; ``size <= L``.
        size: entries to keep.
        recent: how many of them are the last ones, whatever their score.

    Returns:
        int64 ``[G, size]``, ascending; among equal scores the lower index is kept.
    """
    last = torch.arange(scores.shape[1], device=scores.device) >= scores.shape[1] - recent
    keep = select_best(scores, size, protected=last).keep
    return keep.int().argsort(dim=1, descending=True, stable=True)[:, :size]


@dataclass
class Eviction:
    """H2O's running scores of the entries of a layer, for ``decode="evict"``.

    Attributes:
        size: entries to keep, as soon as there are so many.
        recent: entries at the end that are always kept.
        normalize: rank by the mean over the rows that saw an entry, not by their sum.
        totals: fp32 ``[G, L]`` attention each entry has got so far, mean over a group's heads.
        rows: int64 ``[G, L]`` query rows that saw it.
        protected: bool ``[G, L]`` entries that are never evicted.
    """

    size: int
    recent: int
    normalize: bool
    totals: torch.Tensor
    rows: torch.Tensor
    protected: torch.Tensor

    @classmethod
    def after_prompt(
        cls, policy: H2O, layout: Layout, scores: torch.Tensor, positions: torch.Tensor
    ) -> Eviction:
        """State of a layer that was just compacted.

        Args:
            scores: fp32 ``[G, l]`` observed attention, weighted as the policy wants.
            positions: int64 ``[1 or G, L]`` of the entries in the ``l`` tokens.
        """
        positions = positions.expand(len(scores), -1)
        rows = layout.length - positions
        totals = scores.gather(1, positions)
        modality = torch.from_numpy(layout.modalities).to(positions.device)
        text = modality[positions] == TEXT
        size = policy.decode_entries(layout)
        return cls(
            size,
            policy.recent(size - (layout.text if policy.protect_text else 0)),
            policy.normalize,
            totals * rows if policy.normalize else totals,
            rows,
            text if policy.protect_text else torch.zeros_like(text),
        )

    def step(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """Count ``n`` new rows, and drop what exceeds ``size``.

        Args:
            query: ``[n, H, d]``.
            key: ``[G, L + n, d]``, the new tokens' keys last.

        Returns:
            int64 ``[G, min(L + n, size)]``, indices of the entries that stay, ascending.
        """
        count, held = len(query), self.totals.shape[1]

        def extended(state: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(state, (0, count))

        totals = extended(self.totals) + observed_attention(query, key, held, scale)
        seen_by = torch.arange(held + count, 0, -1, device=key.device).clamp(max=count)
        rows = extended(self.rows) + seen_by
        protected = extended(self.protected)
        scores = totals / rows if self.normalize else totals
        stay = min(self.size, held + count)
        keep = kept_entries(scores.masked_fill(protected, torch.inf), stay, self.recent)
        self.totals, self.rows, self.protected = (
            state.gather(1, keep) for state in (totals, rows, protected)
        )
        return keep


class CompressedLayer(DynamicLayer):
    """Keys and values ``[1, G, L, d]`` of a compressed prompt and of what followed it.

    Lengths are those of the text, not of the cache, so positions and mask sizes that are derived
    from them stay true, whatever a layer dropped.

    Attributes:
        prompt_tokens: tokens that were compressed, left padding included.
        dropped: tokens seen that have no entry of their own.
        eviction: the scores of H2O's ``decode="evict"``, else ``None``.
        awaited: whether the attention that comes next knows how to read this layer.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        prompt_tokens: int,
        eviction: Eviction | None = None,
    ) -> None:
        super().__init__()
        self.lazy_initialization(key, value)
        self.keys, self.values = key, value
        self.prompt_tokens = prompt_tokens
        self.dropped = prompt_tokens - key.shape[-2]
        self.eviction = eviction
        self.awaited = False
        self.is_croppable = eviction is None

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.dropped + (self.keys.shape[-2] if self.is_initialized else 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[1, G, n, d]``.

        Raises:
            ValueError: outside ``kv_policy``, where masks would not fit.
        """
        if self.prompt_tokens and not self.awaited:
            raise ValueError(
                "past_key_values was compressed by a KV policy; go on inside `with kv_policy(...)`."
            )
        self.awaited = False
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.prompt_tokens = self.dropped = 0
        self.eviction = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: ``-n`` removes ``n``, a positive number is the length to keep.

        Raises:
            ValueError: if some of them belong to the compressed prompt, or entries were evicted.
        """
        length = self.get_seq_length()
        remove = -tokens_to_remove
        if tokens_to_remove > 0:
            remove = max(0, length - tokens_to_remove)
        if remove == 0:
            return
        if self.eviction is not None:
            raise ValueError("crop cannot bring back what h2o evicted; use decode='static'.")
        if length - remove < self.prompt_tokens:
            raise ValueError(
                f"crop to {length - remove} tokens reaches into the {self.prompt_tokens} tokens "
                "that a KV policy compressed; crop later tokens only."
            )
        super().crop(-remove)

    def evict(self, query: torch.Tensor, scale: float) -> None:
        """Count the attention of the new rows ``[n, H, d]`` and drop as many entries."""
        if self.eviction is None:
            return
        keep = self.eviction.step(query, self.keys[0], scale)
        self.dropped += self.keys.shape[-2] - keep.shape[1]
        index = keep[None, :, :, None]
        self.keys = self.keys.gather(2, index.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, index.expand(-1, -1, -1, self.values.shape[-1]))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        _check_batch(len(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        _check_batch(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        _check_batch(len(torch.arange(1, device=indices.device)[indices]))


def _check_batch(rows: int) -> None:
    if rows != 1:
        raise ValueError(f"The batch would become {rows}; {ONE_SEQUENCE}.")
