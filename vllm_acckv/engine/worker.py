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
from typing import Any, Protocol

import torch

from vllm_acckv.engine.ranks import TensorParallelRanks
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.metrics import RequestReport
from vllm_acckv.plan import Plan
from vllm_acckv.policies.base import Compacted, Layer, Policy, Prompt
from vllm_acckv.scores import observed_attention


class PagedKV(Protocol):
    """One request's keys and values of one layer in the paged cache, in logical slots."""

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[G, length, D]`` of slots ``0 .. length-1``, copied."""

    def write(self, first_slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store ``[G, n, D]`` into slots ``first_slot .. first_slot+n-1``."""

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole blocks of the layer, by vLLM's block ids."""


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
        freed: per layer name, leading blocks it left empty.
        fates: token counts of the layers compacted so far, fp32 ``[3, 3]`` on the device.
        report: the other sums over those layers.
    """

    request_id: str
    source: Any
    plan: Plan
    prompt: Prompt | None
    observed: frozenset[int]
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    freed: dict[str, int] = field(default_factory=dict)
    fates: torch.Tensor | float = 0.0
    report: RequestReport = field(default_factory=RequestReport)

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
        return self.freed[layer_name]


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
        # Per request and layer what was kept, for inspection; None unless somebody asked.
        self.records: dict[str, dict[str, Any]] | None = None
        # Per request, blocks to copy where before they are rewritten in this step.
        self.copies: dict[str, tuple[list[int], list[int]]] = {}
        self._reported: list[WorkerRequest] = []

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
            first, last = row.observed()
            if row.compacted or row.compacts or first < last:
                rows.append(row)
        return rows

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
            request.freed.clear()
            request.report, request.fates = RequestReport(), 0.0
        if row.compacts and request.request_id in self.copies:
            cache.copy(*self.copies[request.request_id])
        if observes or compacts:
            key, value = cache.read(last)
            if observes:
                offset = row.query_start - row.computed
                rows = query[offset + first : offset + last]
                self._observe(request, index, rows, key, first, scale)
            if compacts:
                self._compact(request, layer_name, index, key, value, cache)
        if row.compacts and not compacts:
            self._leave_alone(request, layer_name)
        request.report.seconds += time.perf_counter() - started

    def _observe(
        self,
        request: WorkerRequest,
        index: int,
        rows: torch.Tensor,
        key: torch.Tensor,
        first: int,
        scale: float,
    ) -> None:
        """Add the attention of ``rows`` ``[n, H, D]``, which start at token ``first``."""
        plan = request.plan
        scores = observed_attention(rows, key, first, scale, plan.policy.weights(plan.layout))
        scores = torch.nn.functional.pad(scores, (0, plan.end - key.shape[1]))
        if first > plan.first_query:
            scores += request.scores[index]
        request.scores[index] = scores

    def _compact(
        self,
        request: WorkerRequest,
        layer_name: str,
        index: int,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: PagedKV,
    ) -> None:
        assert request.prompt is not None
        plan, layer = request.plan, self._layer(index)
        source = plan.policy.score_layer(layer)
        # A layer of FastV needs the scores of a lower one, and leaves them to the next.
        take = request.scores.pop if source == index else request.scores.__getitem__
        if plan.first_query < plan.end:
            scores = take(source)
        else:
            scores = key.new_zeros(key.shape[:2], dtype=torch.float32)
        if index == self.num_layers - 1:
            request.scores.clear()
        done = plan.policy.compact(scores, key, value, request.prompt, layer, self.block_size)
        if done.kept.freed_blocks < (plan.end - plan.entries[index]) // self.block_size:
            raise RuntimeError(
                f"{layer_name} keeps more entries of request {request.request_id} than planned."
            )
        cache.write(done.kept.freed_blocks * self.block_size, done.key, done.value)
        if self.records is not None:
            record = _record(done)
            self.records.setdefault(request.request_id, {})[layer_name] = record
        request.fates = request.fates + done.kept.fates(request.prompt.modality)
        self._count(request, layer_name, done.kept.freed_blocks)

    def _leave_alone(self, request: WorkerRequest, layer_name: str) -> None:
        """Count a layer that keeps everything."""
        request.report.count([[*request.plan.layout.counts], [0] * 3, [0] * 3])
        self._count(request, layer_name, 0)

    def _count(self, request: WorkerRequest, layer_name: str, freed_blocks: int) -> None:
        request.freed[layer_name] = freed_blocks
        if not request.report.layers:
            self._reported.append(request)
        request.report.layers += 1
        request.report.entries += request.plan.end - freed_blocks * self.block_size

    def take_reports(self) -> dict[str, RequestReport]:
        """Reports of the requests compacted since the last call; reads their counts from the
        device, once per request."""
        for request in self._reported:
            if isinstance(request.fates, torch.Tensor):
                request.report.count(request.fates.tolist())
        reports = {request.request_id: request.report for request in self._reported}
        self._reported = []
        return reports


def _record(done: Compacted) -> dict[str, Any]:
    """JSON-able form of what a layer kept: per KV head, token indices and merged modalities."""
    kept, weight = done.kept, done.selection.video_weight
    merged: list[list[int]] = [[] for _ in kept.tokens]
    if kept.merged is not None:
        merged = [kept.merged.modality[valid].tolist() for valid in kept.merged.valid]
    return {
        "freed_blocks": kept.freed_blocks,
        "video_weight": [] if weight is None else weight.tolist(),
        "tokens": [head.nonzero().flatten().tolist() for head in kept.tokens],
        "merged": merged,
    }


_current: PolicyWorker | None = None


def current_worker() -> PolicyWorker | None:
    """The policy worker of this process, ``None`` where no policy is in use."""
    return _current


def set_current_worker(worker: PolicyWorker | None) -> None:
    global _current
    _current = worker
