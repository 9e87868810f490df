# SPDX-License-Identifier: Apache-2.0
"""The prompt on its way through the layers: observe, decide, compact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_acckv.hf.cache import CompressedLayer, Eviction
from vllm_acckv.plan import Plan
from vllm_acckv.policies.base import Layer, Policy
from vllm_acckv.policies.compression import Stats, untouched
from vllm_acckv.policies.h2o import H2O
from vllm_acckv.scores import observed_attention

Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class LayerRun:
    """What happened to one layer of the latest prompt.

    Attributes:
        length: entries that every KV head keeps of the prompt.
        positions: int64 ``[1, length]`` if all heads keep the same tokens, else ``[G, length]``;
            index of each entry in the prompt, left padding counted, -1 for merged ones.
        stats: counts of tokens.
    """

    length: int
    positions: torch.Tensor
    stats: Stats


@dataclass
class Run:
    """What a policy did to the latest prompt.

    Attributes:
        policy: the policy.
        skipped: why the prompt stayed uncompressed; ``None`` if it was compressed, or there was
            none yet.
        layers: one per decoder layer, empty for a skipped prompt.
    """

    policy: Policy
    skipped: str | None = None
    layers: list[LayerRun] = field(default_factory=list)

    @property
    def stats(self) -> list[Stats]:
        """Counts of tokens, one per decoder layer."""
        return [layer.stats for layer in self.layers]


@dataclass(frozen=True)
class Call:
    """One call of an attention function.

    Attributes:
        module: the attention module.
        query: ``[1, H, n, d]`` after rotary embedding.
        key, value: ``[1, G, l, d]`` of the cache with the ``n`` new tokens.
        scale: softmax scale.
        attend: the model's own implementation, of query, key, value and mask.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    attend: Callable[..., Output]


class Prefill:
    """A prompt that is being computed and compressed layer by layer.

    Args:
        plan: what will happen to it.
        padding: tokens at the left that are dropped in front of what the plan covers.
        angles: fp32 ``[end, R/2]`` where the policy needs them.
        block_size: as in :func:`vllm_acckv.hf.kv_policy`.

    Raises:
        ValueError: for a policy that decides a layer by the attention of a later one.
    """

    def __init__(
        self, plan: Plan, padding: int, angles: torch.Tensor | None, block_size: int | None
    ) -> None:
        self.plan, self.padding, self.angles, self.block_size = plan, padding, angles, block_size
        # For each layer to compact, the layer whose attention decides it.
        self._sources: dict[int, int] = {}
        self._scores: dict[int, torch.Tensor] = {}
        count = len(plan.entries)
        for index in range(count):
            if plan.active and self._compacts(index):
                self._sources[index] = plan.policy.score_layer(Layer(index, count))
                if self._sources[index] > index:
                    raise ValueError(
                        f"{plan.policy.name} decides layer {index} by layer "
                        f"{self._sources[index]}, which is not computed yet."
                    )

    @property
    def stop(self) -> int:
        """Tokens that are compressed, padding included."""
        return self.padding + self.plan.end

    def compact(self, call: Call) -> tuple[CompressedLayer, LayerRun]:
        """The layer's cache after the policy's decision, and what happened to it."""
        plan, index = self.plan, call.module.layer_idx
        key = call.key[0, :, self.padding : self.stop]
        value = call.value[0, :, self.padding : self.stop]
        if index in self._sources.values():
            self._scores[index] = self._observed(call, key)
        if not self._compacts(index):
            done = untouched(key, value, plan.layout, self.padding)
            layer = CompressedLayer(key[None], value[None], self.stop)
            return layer, LayerRun(plan.end, done.positions, done.stats)
        scores = self._scores[self._sources.pop(index)].to(key.device)
        self._scores = {
            source: kept for source, kept in self._scores.items() if source in self._needed
        }
        done = plan.policy.compress(
            None,
            key,
            value,
            torch.from_numpy(plan.layout.modalities),
            scores=scores,
            layer=index,
            num_layers=len(plan.entries),
            angles=None if self.angles is None else self.angles.to(key.device),
            block_size=self.block_size,
        )
        eviction = None
        if isinstance(plan.policy, H2O) and plan.policy.decode == "evict":
            eviction = Eviction.after_prompt(plan.policy, plan.layout, scores, done.positions)
        layer = CompressedLayer(done.keys[None], done.values[None], self.stop, eviction)
        positions = torch.where(done.positions < 0, -1, done.positions + self.padding)
        return layer, LayerRun(done.keys.shape[1], positions, done.stats)

    def _compacts(self, index: int) -> bool:
        policy, count = self.plan.policy, len(self.plan.entries)
        if policy.evicts_at_decode:  # what is left alone now may be full later
            return True
        if self.block_size is not None:
            return self.plan.compacts(index)
        return not policy.keeps_all(self.plan.layout, Layer(index, count))

    @property
    def _needed(self) -> set[int]:
        """Layers whose scores decide layers to come."""
        return set(self._sources.values())

    def _observed(self, call: Call, key: torch.Tensor) -> torch.Tensor:
        """Attention of the rows the policy observes, fp32 ``[G, end]``."""
        first = self.plan.first_query
        rows = call.query[0, :, self.padding + first : self.stop].transpose(0, 1)
        weights = self.plan.policy.weights(self.plan.layout, key.device)
        return observed_attention(rows, key, first, call.scale, weights)
