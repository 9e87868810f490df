# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from vllm_acckv.scores import Weights
    from vllm_acckv.selection import Ranks, Selection


@dataclass(frozen=True)
class Prompt:
    """The part of a prompt that is compressed, as the policy sees it.

    Attributes:
        modality: int8 ``[l]`` on the device of the cache.
        text_start: first token after the last audio-video token.
        budget: audio-video tokens to select (k).
        angles: fp32 ``[l, D/2]`` rotary angle of every token and frequency, for policies that
            look at keys before rotary embedding; ``None`` where the engine has none.
    """

    modality: torch.Tensor
    text_start: int
    budget: int
    angles: torch.Tensor | None = None


class Policy(Protocol):
    """A KV policy that observes some query rows and then decides once per layer."""

    needs_angles: bool

    def budget(
        self, *, video: int, audio: int, prefix_text: int, trailing_text: int
    ) -> tuple[int, int]:
        """``(k, most entries a layer keeps)`` for a prompt with these token counts.

        The second number is what the block manager relies on: no decision of :meth:`select` may
        exceed it.
        """

    def first_query(self, text_start: int) -> int:
        """First token whose query row is observed; all later rows are observed too."""

    def weights(self, length: int, text_start: int) -> Weights | None:
        """Factor on each observed probability, see :func:`vllm_acckv.scores.observed_attention`."""

    def select(
        self,
        scores: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompt: Prompt,
        ranks: Ranks,
    ) -> Selection:
        """Decide for one layer.

        Args:
            scores: fp32 ``[G, l]`` observed attention.
            key, value: ``[G, l, D]`` cached keys (after rotary embedding) and values.
            prompt: the layout of the ``l`` tokens.
            ranks: agreement with the other tensor-parallel ranks.
        """
