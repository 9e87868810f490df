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

from vllm_acckv.config import KVPolicyConfig
from vllm_acckv.engine.ranks import TensorParallelRanks
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.metrics import RequestReport
from vllm_acckv.movement import gather_kept
from vllm_acckv.plan import Plan
from vllm_acckv.policies import Policy, make_policy
from vllm_acckv.policies.base import Prompt
from vllm_acckv.scores import observed_attention
from vllm_acckv.selection import Kept, Selection, align


class PagedKV(Protocol):
    """One request's keys and values of one layer in the paged cache, in logical slots."""

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[G, length, D]`` of slots ``0 .. length-1``, copied."""

    def write(self, first_slot: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store ``[G, n, D]`` into slots ``first_slot .. first_slot+n-1``."""


@dataclass(eq=False)
class WorkerRequest:
    """What a worker knows of a request.

    Attributes:
        request_id: vLLM's id.
        source: the runner's own object for the request; a new object means a new request.
        plan: the plan, equal to the scheduler's by construction.
        policy: the policy of the request, ``None`` if it keeps everything.
        prompt: the compressed part of the prompt on the device, ``None`` if nothing is.
        scores: per layer, fp32 ``[G, end]`` attention observed so far.
        freed: per layer, leading blocks it left empty.
        report: sums over the layers compacted so far.
    """

    request_id: str
    source: Any
    plan: Plan
    policy: Policy | None
    prompt: Prompt | None
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    freed: dict[str, int] = field(default_factory=dict)
    report: RequestReport = field(default_factory=RequestReport)

    @property
    def first_query(self) -> int:
        """First token whose query the policy observes."""
        assert self.policy is not None
        return self.policy.first_query(self.plan.text_start)

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

    def observed(self) -> tuple[int, int]:
        """Tokens ``[first, last)`` of this chunk whose queries the policy observes."""
        last = min(self.computed + self.scheduled, self.request.plan.end)
        return max(self.computed, self.request.first_query), last


class PolicyWorker:
    """KV policy state of one worker process."""

    def __init__(
        self,
        config: KVPolicyConfig,
        block_size: int,
        device: torch.device,
        ranks: TensorParallelRanks,
        hf_config: Any,
        has_angles: bool,
    ) -> None:
        self.config = config
        self.block_size = block_size
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
        plan = plan_request(source, self.config, self.block_size, self.hf_config, self.has_angles)
        policy = make_policy(plan.config) if plan.active else None
        prompt = None
        if policy is not None:
            modality = torch.from_numpy(plan.modalities).to(self.device)
            prompt = Prompt(
                modality,
                plan.text_start,
                plan.keep,
                angles(plan.end) if policy.needs_angles else None,
            )
        known = WorkerRequest(request_id, source, plan, policy, prompt)
        self.requests[request_id] = known
        return known

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
            if row.compacted or first < last:
                rows.append(row)
        return rows

    def after_attention(
        self, row: Row, layer_name: str, query: torch.Tensor, cache: PagedKV, scale: float
    ) -> None:
        """Observe this chunk's queries; compact the layer if the chunk reaches the end.

        Args:
            query: ``[tokens, H, D]`` queries of the whole batch.
            cache: the request's cache in this layer, holding this chunk already.
            scale: softmax scale.
        """
        started = time.perf_counter()
        request, plan = row.request, row.request.plan
        assert request.policy is not None
        first, last = row.observed()
        key, value = cache.read(last)
        offset = row.query_start - row.computed
        scores = observed_attention(
            query[offset + first : offset + last],
            key,
            first,
            scale,
            request.policy.weights(plan.end, plan.text_start),
        )
        scores = torch.nn.functional.pad(scores, (0, plan.end - last))
        if first > request.first_query:
            scores += request.scores[layer_name]
        request.scores[layer_name] = scores
        if last == plan.end:
            self._compact(request, layer_name, key, value, cache)
        request.report.seconds += time.perf_counter() - started

    def _compact(
        self,
        request: WorkerRequest,
        layer_name: str,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: PagedKV,
    ) -> None:
        assert request.policy is not None and request.prompt is not None
        if layer_name in request.freed:  # computed again after a preemption
            request.freed.clear()
            request.report = RequestReport()
        scores = request.scores.pop(layer_name)
        selection = request.policy.select(scores, key, value, request.prompt, self.ranks)
        kept = align(selection, self.block_size, self.ranks)
        if kept.freed_blocks < request.plan.freed_blocks:
            raise RuntimeError(
                f"{layer_name} keeps more entries of request {request.request_id} than planned."
            )
        cache.write(kept.freed_blocks * self.block_size, *gather_kept(kept, key, value))
        request.freed[layer_name] = kept.freed_blocks
        if self.records is not None:
            record = _record(kept, selection)
            self.records.setdefault(request.request_id, {})[layer_name] = record
        if not request.report.layers:
            self._reported.append(request)
        request.report.add_layer(request.prompt.modality, kept)

    def take_reports(self) -> dict[str, RequestReport]:
        """Reports of the requests compacted since the last call."""
        reports = {request.request_id: request.report for request in self._reported}
        self._reported = []
        return reports


def _record(kept: Kept, selection: Selection) -> dict[str, Any]:
    """JSON-able form of what a layer kept: per KV head, token indices and merged modalities."""
    merged: list[list[int]] = [[] for _ in kept.tokens]
    if kept.merged is not None:
        merged = [kept.merged.modality[valid].tolist() for valid in kept.merged.valid]
    return {
        "freed_blocks": kept.freed_blocks,
        "video_weight": selection.video_weight.tolist(),
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
