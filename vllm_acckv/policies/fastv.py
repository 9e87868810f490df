# SPDX-License-Identifier: Apache-2.0
"""FastV: one set of audio-video tokens for all layers above the K-th (arXiv 2403.06764)."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_acckv.config import KVPolicyError
from vllm_acckv.policies.base import Layer, Policy, Positive, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import TEXT, Layout
from vllm_acckv.states import States


class FastV(Policy):
    """FastV as a KV policy: layers below K keep everything, all others keep the text and the
    audio-video tokens that the last prompt token attends to most in layer K - 1.

    The authors drop hidden states inside prefill; here the prompt is computed in full and only its
    cache shrinks, so the first answer token is that of the full model. vLLM's layers share their
    block tables, so there FastV makes decoding faster but returns no memory.

    Attributes:
        first_pruned_layer: K (the authors' 2).
        equalize: ``budget`` is the mean over all layers, so that layers from K on keep
            (budget * L - K) / (L - K); else it is what layers from K on keep (1 - R).
    """

    name: ClassVar[str] = "fastv"

    first_pruned_layer: Positive = 2
    equalize: bool = True

    def check(self, num_layers: int) -> None:
        below = self.first_pruned_layer
        if below >= num_layers:
            raise KVPolicyError(
                f"--kv-policy-config first_pruned_layer is {below}; it must be below the model's "
                f"{num_layers} layers."
            )
        if self.equalize and self.budget <= below / num_layers:
            raise KVPolicyError(
                f"--kv-budget is {self.budget:g}; it must be above {below / num_layers:.2f}, what "
                f"fastv's {below} full layers of {num_layers} keep alone, or equalize must be "
                "false."
            )

    def entries(self, layout: Layout, layer: Layer) -> int:
        below, count = self.first_pruned_layer, layer.count
        if layer.index < below:
            return layout.length
        size = self.capacity(layout)
        if self.equalize:
            size = int((size * count - below * layout.length) / (count - below) + 0.5)
        return max(size, layout.text)

    def first_query(self, layout: Layout) -> int:
        return layout.length - 1

    def score_layer(self, layer: Layer) -> int:
        return min(layer.index, self.first_pruned_layer - 1)

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        mean = layer.ranks.mean(scores.mean(0, keepdim=True))
        size = self.entries(prompt.layout, layer)
        return select_best(mean, size, protected=prompt.modality == TEXT)
