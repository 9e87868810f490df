# SPDX-License-Identifier: Apache-2.0
"""The worker's side: which batch row is which request, and compaction after a layer's attention.

A row is compacted in the step whose chunk reaches the plan's ``end``; from then on, each layer
sees a block table without its leading empty blocks. A preempted request starts again at its
first token and overwrites everything kept here, so there is nothing to undo.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_acckv.engine.ranks import TensorParallelRanks
from vllm_acckv.engine.readback import Readback
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.metrics import RequestReport
from vllm_acckv.plan import Plan
from vllm_acckv.policies.base import Compacted, Layer, Policy, Prompt
from vllm_acckv.scores import Weights

if TYPE_CHECKING:
    from vllm_acckv.kernels.tables import LayerTables


class PagedKV(Protocol):
    """One request's keys and values of one layer in the paged cache, in logical slots."""

    @property
    def num_kv_heads(self) -> int: ...

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


@dataclass(eq=False)
class WorkerRequest:
    """What a worker knows of a request.

    Attributes:
        request_id: vLLM's id.
        source: the runner's own object for the request; a new object means a new request.
        plan: the plan, equal to the scheduler's by construction.
        prompt: the compressed part of the prompt on the device, ``None`` if nothing is.
        observed: indices of the layers whose attention some layer's decision needs.
        scores: per layer index, fp32 ``[G, end]`` attention observed so far.
        freed: per layer name, leading blocks it left empty; on the device if that depends on data.
        fates: token counts of the layers compacted so far, fp32 ``[3, 3]`` on the device.
        untouched: layers left alone.
        seconds: spent so far, on the host.
    """

    request_id: str
    source: Any
    plan: Plan
    prompt: Prompt | None
    observed: frozenset[int]
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    freed: dict[str, int | torch.Tensor] = field(default_factory=dict)
    fates: torch.Tensor | float = 0.0
    untouched: int = 0
    seconds: float = 0.0

    def start_again(self) -> None:
        """Forget a compaction that a preemption has undone."""
        self.freed, self.fates, self.untouched, self.seconds = {}, 0.0, 0, 0.0

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


class PolicyWorker:
    """KV policy state of one worker process."""

    def __init__(
        self,
        policy: Policy,
        block_size: int,
        num_layers: int,
        device: torch.device,
        ranks: TensorParallelRanks,
        hf_config: Any,
        has_angles: bool,
    ) -> None:
        self.policy = policy
        self.block_size = block_size
        self.num_layers = num_layers
        self.device = device
        self.ranks = ranks
        self.hf_config = hf_config
        self.has_angles = has_angles
        self.requests: dict[str, WorkerRequest] = {}
        # Runner V1 announces each batch row by row. Runner V2 says which slot holds which
        # request, and names the slots of a batch itself.
        self.batch: list[WorkerRequest | None] | None = None
        self.slots: dict[int, WorkerRequest] = {}
        # True from the start of a real step of runner V2 to its end: the batches of warm-up and
        # idle runs name slots too, but hold no requests.
        self.step_open = False
        # On GPUs, what the layers of each attention group attend to.
        self.tables: list[LayerTables] = []
        # Per request and layer what was kept, for inspection; None unless somebody asked.
        self.records: dict[str, dict[str, Any]] | None = None
        # Per request, blocks to copy where before they are rewritten in this step.
        self.copies: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._compacted: dict[str, WorkerRequest] = {}
        self._readbacks: list[Readback] = []

    def request(
        self, request_id: str, source: Any, angles: Callable[[int], torch.Tensor]
    ) -> WorkerRequest:
        """The state of a request, made from the runner's ``source`` when it is new.

        Args:
            angles: gives the rotary angles ``[n, R/2]`` of the first n prompt tokens.
        """
        known = self.requests.get(request_id)
        if known is not None and known.source is source:
            return known
        plan = plan_request(
            source, self.policy, self.block_size, self.num_layers, self.hf_config, self.has_angles
        )
        prompt, observed = None, frozenset[int]()
        if plan.active:
            needed = angles(plan.end) if plan.policy.needs_angles else None
            prompt = Prompt.of(plan.layout, self.device, needed)
            deciding = filter(plan.compacts, range(self.num_layers))
            observed = frozenset(plan.policy.score_layer(self._layer(index)) for index in deciding)
        known = WorkerRequest(request_id, source, plan, prompt, observed)
        self.requests[request_id] = known
        return known

    def _layer(self, index: int) -> Layer:
        return Layer(index, self.num_layers, self.ranks)

    def forget_all_but(self, request_ids: Iterable[str]) -> None:
        """Drop requests the runner no longer has."""
        self.requests = {
            request_id: self.requests[request_id]
            for request_id in request_ids
            if request_id in self.requests
        }

    def take_slot(self, slot: int, request: WorkerRequest) -> None:
        """A new or resumed request in ``slot`` of model runner V2; it has all its blocks."""
        self.slots[slot] = request
        for tables in self.tables:
            tables.freed[slot].zero_()

    def slots_in(self, req_idx: Sequence[int] | None) -> list[int]:
        """Slots of the rows of a batch of model runner V2; none in a warm-up run."""
        return [int(slot) for slot in req_idx] if self.step_open and req_idx is not None else []

    def rows(
        self, req_idx: Sequence[int] | None, query_start: list[int], seq_lens: list[int]
    ) -> list[Row]:
        """Rows of the batch that a policy has to do with in this step.

        Args:
            req_idx: ``[rows]`` slots of the requests where the runner gives them (V2).
            query_start: ``[rows + 1]`` first query of each row.
            seq_lens: ``[rows]`` tokens of each request after this step.
        """
        batch = self.batch
        if req_idx is not None:
            batch = [self.slots.get(int(slot)) for slot in req_idx] if self.step_open else []
        if batch is None:
            raise RuntimeError(
                "The model runner did not announce its batch to the KV policy; the policy would "
                "silently do nothing."
            )
        rows = []
        for index, request in enumerate(batch):
            if request is None or not request.plan.active:
                continue
            scheduled = query_start[index + 1] - query_start[index]
            row = Row(index, request, seq_lens[index] - scheduled, scheduled, query_start[index])
            if row.compacted or row.worked_on:
                rows.append(row)
        return rows

    def works_on(
        self, request_ids: Sequence[str], computed: Sequence[int], scheduled: Sequence[int]
    ) -> bool:
        """Whether some row of a batch is observed or compacted: ``scheduled`` tokens of each
        request after ``computed`` ones."""
        for request_id, before, tokens in zip(request_ids, computed, scheduled, strict=True):
            request = self.requests.get(request_id)
            if request is None or not request.plan.active:
                continue
            if Row(0, request, before, tokens, 0).worked_on:
                return True
        return False

    def after_attention(
        self,
        row: Row,
        layer_name: str,
        index: int,
        query: torch.Tensor,
        cache: PagedKV,
        scale: float,
    ) -> None:
        """Observe this chunk's queries; compact the layer if the chunk reaches the end.

        Args:
            layer_name, index: vLLM's name of the layer and its place in the model.
            query: ``[tokens, H, D]`` queries of the whole batch.
            cache: the request's cache in this layer, holding this chunk already.
            scale: softmax scale.
        """
        started = time.perf_counter()
        request, plan = row.request, row.request.plan
        first, last = row.observed()
        observes = index in request.observed and first < last
        compacts = row.compacts and plan.compacts(index)
        if row.compacts and layer_name in request.freed:  # once more, after a preemption
            request.start_again()
        if row.compacts and request.request_id in self.copies:
            cache.copy(*self.copies[request.request_id])
        if observes:
            offset = row.query_start - row.computed
            rows = query[offset + first : offset + last]
            self._observe(request, index, rows, cache, first, scale)
        if compacts:
            self._compact(request, layer_name, index, cache)
        elif row.compacts:
            self._leave_alone(request, layer_name)
        request.seconds += time.perf_counter() - started

    def _observe(
        self,
        request: WorkerRequest,
        index: int,
        rows: torch.Tensor,
        cache: PagedKV,
        first: int,
        scale: float,
    ) -> None:
        """Add the attention of ``rows`` ``[n, H, D]``, which start at token ``first``."""
        plan = request.plan
        if first == plan.first_query:
            heads = cache.num_kv_heads, plan.end
            request.scores[index] = torch.zeros(heads, device=self.device)
        weights = plan.policy.weights(plan.layout)
        cache.observe(request.scores[index], rows, first, scale, weights)

    def _compact(
        self,
        request: WorkerRequest,
        layer_name: str,
        index: int,
        cache: PagedKV,
    ) -> None:
        assert request.prompt is not None
        plan, layer = request.plan, self._layer(index)
        key, value = cache.read(plan.end)
        source = plan.policy.score_layer(layer)
        # A layer of FastV needs the scores of a lower one, and leaves them to the next.
        take = request.scores.pop if source == index else request.scores.__getitem__
        if plan.first_query < plan.end:
            scores = take(source)
        else:
            scores = key.new_zeros(key.shape[:2], dtype=torch.float32)
        if index == self.num_layers - 1:
            request.scores.clear()
        done = plan.policy.compact(
            scores, key, value, request.prompt, layer, self.block_size, wait=False
        )
        if done.kept.freed_blocks < (plan.end - plan.entries[index]) // self.block_size:
            raise RuntimeError(
                f"{layer_name} keeps more entries of request {request.request_id} than planned."
            )
        cache.write(done.kept.freed_blocks * self.block_size, done.key, done.value)
        if self.records is not None:
            record = _record(done)
            self.records.setdefault(request.request_id, {})[layer_name] = record
        request.fates = request.fates + done.kept.fates(request.prompt.modality)
        self._count(request, layer_name, done.kept.all_freed)

    def _leave_alone(self, request: WorkerRequest, layer_name: str) -> None:
        """Count a layer that keeps everything."""
        request.untouched += 1
        self._count(request, layer_name, 0)

    def _count(
        self, request: WorkerRequest, layer_name: str, freed_blocks: int | torch.Tensor
    ) -> None:
        request.freed[layer_name] = freed_blocks
        self._compacted[request.request_id] = request

    def take_compacted(self) -> tuple[set[str], dict[str, RequestReport]]:
        """Ids of the requests compacted since the last call, and the reports that have arrived
        from the device, of these and of earlier ones."""
        for request in self._compacted.values():
            self._readbacks.append(Readback(request, self.block_size, self.device))
        compacted, self._compacted = {*self._compacted}, {}
        arrived = [readback for readback in self._readbacks if readback.arrived]
        self._readbacks = [one for one in self._readbacks if one not in arrived]
        return compacted, {readback.request_id: readback.report() for readback in arrived}


def _record(done: Compacted) -> dict[str, Any]:
    """JSON-able form of what a layer kept: per KV head, token indices and merged modalities."""
    kept, weight = done.kept, done.selection.video_weight
    merged: list[list[int]] = [[] for _ in kept.tokens]
    if kept.merged is not None:
        merged = [kept.merged.modality[valid].tolist() for valid in kept.merged.valid]
    return {
        "freed_blocks": int(kept.all_freed),
        "video_weight": [] if weight is None else weight.tolist(),
        "tokens": [head.nonzero().flatten().tolist() for head in kept.tokens],
        "merged": merged,
    }


def upload(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """``numbers`` as int64 on the device, without waiting for it."""
    made = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


_current: PolicyWorker | None = None


def current_worker() -> PolicyWorker | None:
    """The policy worker of this process, ``None`` where no policy is in use."""
    return _current


def set_current_worker(worker: PolicyWorker | None) -> None:
    global _current
    _current = worker
