# SPDX-License-Identifier: Apache-2.0
"""What a worker knows of a request, its rows in batches, and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_acckv.plan import Plan
from vllm_acckv.policies.base import Prompt
from vllm_acckv.scores import Weights

if TYPE_CHECKING:
    from vllm_acckv.kernels.paged import PagedCache


class PagedKV(Protocol):
    """One request's keys and values of one layer in the paged cache, in logical slots."""

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def paged(self) -> PagedCache | None:
        """The cache as kernels read it, ``None`` where there are no kernels."""

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[G, length, D]`` of slots ``0 .. length-1``, copied."""

    def write(self, first_slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store ``[G, n, D]`` into slots ``first_slot .. first_slot+n-1``."""

    def observe(
        self,
        scores: torch.Tensor,
        query: torch.Tensor,
        first_row: int,
        scale: float,
        weights: Weights | None,
    ) -> None:
        """Add to fp32 ``[G, l]`` what rows ``[n, H, D]`` from token ``first_row`` on pay to each
        token, see :func:`vllm_acckv.scores.observed_attention`."""

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy whole blocks of the layer, by vLLM's block ids, int64 on the device."""


Finished = list[tuple[Sequence[str], int | torch.Tensor]]
"""Names of successive layers that were compacted, and the leading blocks that each of them left
empty: int, or int64 ``[layers]`` on the device."""


@dataclass(eq=False)
class WorkerRequest:
    """What a worker knows of a request.

    Attributes:
        request_id: vLLM's id.
        source: the runner's own object for the request; a new object means a new request.
        plan: the plan, equal to the scheduler's by construction.
        prompt: the compressed part of the prompt on the device, ``None`` if nothing is.
        weights: the policy's factors on observed attention.
        observed: indices of the layers whose attention some layer's decision needs.
        scores: per layer index, fp32 ``[G, end]`` attention observed so far.
        waiting: names, indices and caches of successive layers to be decided together.
        freed: per layer name, leading blocks it left empty; on the device if that depends on data.
        total_freed: their sum.
        fates: token counts of the layers compacted so far, fp32 ``[3, 3]`` on the device.
        untouched: layers left alone.
        seconds: spent so far, on the host.
    """

    request_id: str
    source: Any
    plan: Plan
    prompt: Prompt | None
    weights: Weights | None
    observed: frozenset[int]
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    waiting: list[tuple[str, int, PagedCache]] = field(default_factory=list)
    freed: dict[str, int | torch.Tensor] = field(default_factory=dict)
    total_freed: int | torch.Tensor = 0
    fates: torch.Tensor | float = 0.0
    untouched: int = 0
    seconds: float = 0.0

    def start_again(self) -> None:
        """Forget a compaction that a preemption has undone."""
        self.waiting, self.freed, self.total_freed = [], {}, 0
        self.fates, self.untouched, self.seconds = 0.0, 0, 0.0

    def freed_blocks(self, layer_name: str) -> int:
        """Leading blocks the layer left empty.

        Raises:
            RuntimeError: if the layer was never compacted; its blocks may already be reused.
        """
        if layer_name not in self.freed:
            raise RuntimeError(
                f"{layer_name} was not compacted for request {self.request_id}, whose leading "
                "blocks are no longer its own."
            )
        return int(self.freed[layer_name])


@dataclass(frozen=True)
class Row:
    """One row of a batch: ``scheduled`` tokens of a request after ``computed`` ones, whose
    queries start at ``query_start``."""

    index: int
    request: WorkerRequest
    computed: int
    scheduled: int
    query_start: int

    @property
    def compacted(self) -> bool:
        return self.computed >= self.request.plan.end

    @property
    def compacts(self) -> bool:
        """Whether this chunk ends the part of the prompt that is compressed."""
        return self.computed < self.request.plan.end <= self.computed + self.scheduled

    def observed(self) -> tuple[int, int]:
        """Tokens ``[first, last)`` of this chunk whose queries the policy observes."""
        last = min(self.computed + self.scheduled, self.request.plan.end)
        return max(self.computed, self.request.plan.first_query), last

    @property
    def worked_on(self) -> bool:
        """Whether the policy observes or compacts in this chunk."""
        first, last = self.observed()
        return self.compacts or first < last
