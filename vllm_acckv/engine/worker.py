# SPDX-License-Identifier: Apache-2.0
"""The worker's side: which batch row is which request, and compaction after a layer's attention.

A row is compacted in the step whose chunk reaches the plan's ``end``; from then on, each layer
sees a block table without its leading empty blocks. A preempted request starts again at its
first token and overwrites everything kept here, so there is nothing to undo.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_acckv.engine.ranks import TensorParallelRanks
from vllm_acckv.engine.readback import Readback, record
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.engine.rows import Finished, PagedKV, Row, WorkerRequest
from vllm_acckv.metrics import RequestReport
from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.selection import Kept, Selection

if TYPE_CHECKING:
    from vllm_acckv.kernels.tables import LayerTables

# Scores of layers that are decided together (fp32, so 16 MiB): all layers of one prompt of 32k
# tokens with 4 KV heads. Deciding takes several times as much memory for a moment.
_MAX_SCORES = 1 << 22


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
        # True from the start of a real step of runner V2 to its end: the batches of idle runs name
        # slots too, but hold no requests. (That of vLLM's own warm-up is not closed; its requests
        # have no clips.)
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
        prompt = weights = None
        observed = frozenset[int]()
        if plan.active:
            needed = angles(plan.end) if plan.policy.needs_angles else None
            prompt = Prompt.of(plan.layout, self.device, needed)
            weights = plan.policy.weights(plan.layout, self.device)
            deciding = filter(plan.compacts, range(self.num_layers))
            observed = frozenset(plan.policy.score_layer(self._layer(index)) for index in deciding)
        known = WorkerRequest(request_id, source, plan, prompt, weights, observed)
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
        last: bool,
    ) -> Finished:
        """Observe this chunk's queries; compact the layer if the chunk reaches the end.

        Where kernels can read the cache, layers wait for each other and are compacted together.

        Args:
            layer_name, index: vLLM's name of the layer and its place in the model.
            query: ``[tokens, H, D]`` queries of the whole batch.
            cache: the request's cache in this layer, holding this chunk already.
            scale: softmax scale.
            last: whether no layer of this group follows.
        """
        started = time.perf_counter()
        request = row.request
        first, until = row.observed()
        if row.compacts and layer_name in request.freed:  # once more, after a preemption
            request.start_again()
        if row.compacts and request.request_id in self.copies:
            cache.copy(*self.copies[request.request_id])
        if index in request.observed and first < until:
            offset = row.query_start - row.computed
            rows = query[offset + first : offset + until]
            self._observe(request, index, rows, cache, first, scale)
        finished: Finished = []
        if row.compacts:
            finished = self._compact(request, layer_name, index, cache, last)
            if last:  # runner V2 makes a preempted request anew, with these
                request.prompt = request.weights = None
        request.seconds += time.perf_counter() - started
        return finished

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
        cache.observe(request.scores[index], rows, first, scale, request.weights)

    def _compact(
        self, request: WorkerRequest, layer_name: str, index: int, cache: PagedKV, last: bool
    ) -> Finished:
        plan, paged, finished = request.plan, cache.paged, []
        together = plan.compacts(index) and plan.policy.layers_alike
        if together and paged is not None:
            if request.waiting and plan.entries[request.waiting[0][1]] != plan.entries[index]:
                finished += self._compact_waiting(request)
            request.waiting.append((layer_name, index, paged))
            scores = len(request.waiting) * paged.num_kv_heads * plan.end
            if last or scores + scores // len(request.waiting) > _MAX_SCORES:
                finished += self._compact_waiting(request)
            return finished
        if request.waiting:
            finished += self._compact_waiting(request)
        freed: int | torch.Tensor = 0
        if plan.compacts(index):
            freed = self._compact_layer(request, layer_name, index, cache)
        else:
            request.untouched += 1
        self._count(request, [layer_name], freed)
        return [*finished, ([layer_name], freed)]

    def _compact_waiting(self, request: WorkerRequest) -> Finished:
        """Decide for all layers that wait, and move their entries in one launch."""
        # Not at the top: Triton is not needed where there is no GPU.
        from vllm_acckv.kernels.compact import compact
        from vllm_acckv.kernels.paged import PagedLayers

        assert request.prompt is not None
        plan, (names, indices, caches) = request.plan, zip(*request.waiting, strict=True)
        request.waiting.clear()
        layers = PagedLayers([cache.blocks for cache in caches], caches[0].table)
        if plan.first_query < plan.end:
            scores = torch.stack([request.scores.pop(index) for index in indices])
        else:
            shape = len(layers), layers.num_kv_heads, plan.end
            scores = torch.zeros(shape, device=self.device)
        first = self._layer(indices[0])
        selection, kept = compact(
            plan.policy, scores, layers, request.prompt, first, self.block_size
        )
        self._check(request, names[0], indices[0], kept)
        request.fates = request.fates + kept.fates(request.prompt.modality)
        for place, name in enumerate(names):
            self._record(request, name, selection, kept, layers.num_kv_heads, place)
        self._count(request, names, kept.all_freed)
        return [(names, kept.all_freed)]

    def _compact_layer(
        self, request: WorkerRequest, layer_name: str, index: int, cache: PagedKV
    ) -> int | torch.Tensor:
        """Decide for one layer and write its entries; the leading blocks it leaves empty."""
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
        self._check(request, layer_name, index, done.kept)
        cache.write(done.kept.freed_blocks * self.block_size, done.key, done.value)
        self._record(request, layer_name, done.selection, done.kept, len(key))
        request.fates = request.fates + done.kept.fates(request.prompt.modality)
        return done.kept.all_freed

    def _check(self, request: WorkerRequest, layer_name: str, index: int, kept: Kept) -> None:
        plan = request.plan
        if kept.freed_blocks < (plan.end - plan.entries[index]) // self.block_size:
            raise RuntimeError(
                f"{layer_name} keeps more entries of request {request.request_id} than planned."
            )

    def _count(
        self, request: WorkerRequest, names: Sequence[str], freed: int | torch.Tensor
    ) -> None:
        of_layers = torch.as_tensor(freed).expand(len(names))
        several = isinstance(freed, torch.Tensor)
        for name, of_layer in zip(names, of_layers, strict=True):
            request.freed[name] = of_layer if several else freed
        total = of_layers.sum() if isinstance(freed, torch.Tensor) else freed * len(names)
        request.total_freed = request.total_freed + total
        self._compacted[request.request_id] = request

    def _record(
        self,
        request: WorkerRequest,
        layer_name: str,
        selection: Selection,
        kept: Kept,
        num_heads: int,
        place: int | None = None,
    ) -> None:
        """Note what the layer kept, the ``place``-th of those decided together."""
        if self.records is not None:
            of_request = self.records.setdefault(request.request_id, {})
            of_request[layer_name] = record(selection, kept, num_heads, place)

    def take_compacted(self) -> tuple[set[str], dict[str, RequestReport]]:
        """Ids of the requests compacted since the last call, and the reports that have arrived
        from the device, of these and of earlier ones."""
        for request in self._compacted.values():
            self._readbacks.append(Readback(request, self.block_size, self.device))
        compacted, self._compacted = {*self._compacted}, {}
        arrived = [readback for readback in self._readbacks if readback.arrived]
        self._readbacks = [one for one in self._readbacks if one not in arrived]
        return compacted, {readback.request_id: readback.report() for readback in arrived}


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
