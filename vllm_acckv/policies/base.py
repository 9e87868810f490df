# SPDX-License-Identifier: Apache-2.0
"""The interface of a KV policy.

A policy answers two kinds of questions. From the prompt's layout alone, on the host: how many
entries will a layer keep at most, which query rows does it look at (:meth:`Policy.entries`,
:meth:`Policy.first_query`). From keys, values and observed attention, on the device and without
waiting for it: which tokens (:meth:`Policy.select`). vLLM and the Hugging Face runner call
:meth:`Policy.compact` with what they observed; :meth:`Policy.compress` does all of it for tensors
at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
import torch
from pydantic_core import PydanticCustomError

from vllm_acckv.movement import gather_kept
from vllm_acckv.selection import Kept, Ranks, Selection, SingleRank, align
from vllm_acckv.spans import Layout
from vllm_acckv.states import DenseStates, States

if TYPE_CHECKING:
    from vllm_acckv.policies.compression import Compressed
    from vllm_acckv.scores import Weights


def number_in(value: Any, allowed: str, valid: Callable[[float], bool]) -> float:
    """``value`` as a number; requests and command lines bring it as text.

    Raises:
        PydanticCustomError: unless it is finite and ``valid``; ``allowed`` says what would be.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and valid(number)):
        raise PydanticCustomError("number", f"Input should be {allowed}")
    return number


def _budget(value: Any) -> float:
    return number_in(
        value,
        "a ratio in (0, 1] or a whole number above 1",
        lambda number: number > 0 and (number <= 1 or number == int(number)),
    )


def _ratio(value: Any) -> float:
    return number_in(value, "a number in [0, 1]", lambda number: 0 <= number <= 1)


# Bounded, because a request's settings reach kernels that count in 32 bits.
Count = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
Positive = Annotated[int, pydantic.Field(ge=1, lt=2**31)]
Budget = Annotated[float, pydantic.BeforeValidator(_budget)]
Ratio = Annotated[float, pydantic.BeforeValidator(_ratio)]


@dataclass(frozen=True)
class Prompt:
    """The part of a prompt that is compressed, as a policy sees it.

    Attributes:
        layout: the modalities on the host.
        modality: the same on the device of the cache, int8 ``[l]``.
        angles: fp32 ``[l, R/2]`` rotary angle of every token and frequency, for policies that
            look at keys before rotary embedding (:attr:`Policy.needs_angles`).
    """

    layout: Layout
    modality: torch.Tensor
    angles: torch.Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, device: torch.device, angles: torch.Tensor | None = None) -> Prompt:
        modality = torch.from_numpy(layout.modalities)
        if device.type == "cuda":
            modality = modality.pin_memory()
        return cls(layout, modality.to(device, non_blocking=True), angles)


@dataclass(frozen=True)
class Layer:
    """Which layer of how many a decision is for.

    Attributes:
        index: 0 for the layer next to the embedding.
        count: decoder layers of the model.
        ranks: the tensor-parallel ranks that hold the layer's other heads.
    """

    index: int = 0
    count: int = 1
    ranks: Ranks = field(default_factory=SingleRank)


@dataclass(frozen=True)
class Compacted:
    """A layer after compaction.

    Attributes:
        key, value: ``[G, L, D]`` entries in their new order.
        positions: int64 ``[G, L]``, position of each entry in the prompt, -1 for merged ones.
        kept: what stays, rounded up to whole blocks.
        selection: what the policy wanted.
    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    kept: Kept
    selection: Selection


class Policy(pydantic.BaseModel):
    """A KV policy that observes some query rows of a prompt and then decides once per layer.

    Attributes:
        budget: how much to keep: a ratio ``0 < r <= 1`` or a whole number of tokens ``> 1``.
        budget_scope: what ``budget`` counts. ``av``: audio-video tokens; text comes on top.
            ``total``: all entries of the prompt.
        image_as: treat image tokens as ``video``, or as ``text``.
        compress_before_last_token: compress before the last prompt token is computed, so that
            the first answer token already sees the compressed cache.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    # Whether layers with equal ``entries`` may be decided in one call of ``select``: it works on
    # shapes with a dimension for them and asks nothing else of ``layer``; there is no ``fold``.
    layers_alike: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    budget: Budget = 0.2
    budget_scope: Literal["av", "total"] = "av"
    image_as: Literal["video", "text"] = "video"
    compress_before_last_token: bool = False

    # Known from the layout, on the host

    def tokens(self, whole: int) -> int:
        """``budget`` of ``whole`` tokens, rounded half up; at most ``whole``."""
        budget = self.budget
        return min(math.floor(budget * whole + 0.5) if budget <= 1 else int(budget), whole)

    def capacity(self, layout: Layout) -> int:
        """KV entries a layer may keep: the same number for every policy with this budget."""
        if self.budget_scope == "av":
            return layout.text + self.tokens(layout.av)
        return self.tokens(layout.length)

    def entries(self, layout: Layout, layer: Layer) -> int:
        """Most entries the layer keeps.

        The block manager frees by this number: no decision of :meth:`select` may exceed it. vLLM
        leaves a layer alone that keeps ``layout.length`` entries.
        """
        raise NotImplementedError

    def first_query(self, layout: Layout) -> int:
        """First token whose query row is observed; all later ones are observed too.
        ``layout.length`` for a policy that observes none."""
        return layout.length

    def needs_trailing_text(self, layout: Layout) -> bool:
        """Whether nothing can be decided without text after the last clip."""
        return False

    def keeps_all(self, layout: Layout, layer: Layer) -> bool:
        """Whether the layer drops nothing, whatever the data."""
        return self.entries(layout, layer) >= layout.length

    def score_layer(self, layer: Layer) -> int:
        """Index of the layer whose observed attention decides ``layer``: this one or a lower."""
        return layer.index

    def check(self, num_layers: int) -> None:
        """Refuse a model this policy cannot serve.

        Raises:
            KVPolicyError: saying what to change.
        """

    @property
    def evicts_at_decode(self) -> bool:
        """Whether entries are dropped after prefill, too. vLLM refuses that; the Hugging Face
        runner knows H2O's way only."""
        return False

    @property
    def needs_angles(self) -> bool:
        """Whether :meth:`select` needs :attr:`Prompt.angles`."""
        return False

    # On the device, without waiting for it

    def weights(self, layout: Layout, device: torch.device | None = None) -> Weights | None:
        """Factor on each observed probability, see :func:`vllm_acckv.scores.observed_attention`."""
        return None

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        """Decide for one layer, or for several (:attr:`layers_alike`).

        Args:
            scores: fp32 ``[..., G, l]`` attention observed in layer :meth:`score_layer`.
            states: cached keys and values.
            prompt: the layout of the ``l`` tokens.
            layer: which layer, or the first of several, and the ranks that hold its other heads.
        """
        raise NotImplementedError

    def fold(
        self, kept: Kept, key: torch.Tensor, value: torch.Tensor, prompt: Prompt, layer: Layer
    ) -> tuple[Kept, torch.Tensor, torch.Tensor]:
        """Let kept entries absorb dropped ones.

        Args:
            kept: what stays, after rounding.
            key, value: ``[G, l, D]``.
            prompt, layer: as for :meth:`select`.

        Returns:
            ``kept`` with the tokens that were folded, and new keys and values ``[G, l, D]``.
        """
        return kept, key, value

    def compact(
        self,
        scores: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prompt: Prompt,
        layer: Layer,
        block_size: int,
        wait: bool = True,
    ) -> Compacted:
        """Decide and gather; ``key``, ``value`` ``[G, l, D]``, the rest as for :meth:`decide`."""
        states = DenseStates(key, value)
        selection, kept = self.decide(scores, states, prompt, layer, block_size, wait)
        kept, key, value = self.fold(kept, key, value, prompt, layer)
        return Compacted(*gather_kept(kept, key, value), kept, selection)

    def decide(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
        block_size: int,
        wait: bool = True,
    ) -> tuple[Selection, Kept]:
        """Select and round up to whole blocks; arguments as for :meth:`select`.

        Args:
            wait: read the number of entries from the device where it depends on the data. Without,
                there are as many as :meth:`entries` allows, of which the first
                ``kept.empty_blocks`` blocks hold nothing. Several layers cannot wait.
        """
        # A broken activation must not spread: NaN is no attention at all.
        selection = self.select(scores.nan_to_num(), states, prompt, layer)
        most = None if wait else self.entries(prompt.layout, layer)
        return selection, align(selection, scores.shape[:-2], block_size, layer.ranks, most)

    # Everything at once

    def compress(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        modality: torch.Tensor,
        **options: Any,
    ) -> Compressed:
        """Compress the cache of one layer of one prompt; see
        :func:`vllm_acckv.policies.compression.compress` for shapes, options and errors."""
        from vllm_acckv.policies.compression import compress

        return compress(self, queries, keys, values, modality, **options)
