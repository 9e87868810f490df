# SPDX-License-Identifier: Apache-2.0
"""Control: random tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vllm_acckv.policies.base import Count, Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import TEXT, Layout
from vllm_acckv.states import States

_MASK = (1 << 32) - 1
_MAX_LAYERS = 1 << 10


class Random(Policy):
    """Keep random tokens, other ones in every layer, the same for prompts of equal length.

    Attributes:
        protect_text: choose among audio-video tokens and keep all text.
        seed: of the choice.
    """

    name: ClassVar[str] = "random"

    protect_text: bool = True
    seed: Count = 0

    def entries(self, layout: Layout, layer: Layer) -> int:
        return max(self.capacity(layout), layout.text if self.protect_text else 0)

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        position = torch.arange(prompt.layout.length, device=scores.device)
        drawn = _mixed(position ^ _mixed(self.seed * _MAX_LAYERS + layer.index))
        protected = prompt.modality == TEXT if self.protect_text else None
        size = self.entries(prompt.layout, layer)
        return select_best((drawn >> 8).float()[None], size, protected)


def _mixed(number: Any) -> Any:
    """MurmurHash3's finalizer: scrambled bits of an ``int`` or int64 tensor, in [0, 2**32).

    Unlike a generator's, its numbers are the same on every device and rank, and nothing has to be
    uploaded.
    """
    number = number & _MASK
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & _MASK
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & _MASK
    return number ^ (number >> 16)
