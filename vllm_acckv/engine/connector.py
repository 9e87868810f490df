# SPDX-License-Identifier: Apache-2.0
"""The channel between scheduler, workers and metrics: a KV connector that transfers no KV.

vLLM's KV connector interface is the sanctioned way for an extension to hear of requests on the
scheduler, to send numbers from the workers to it, and from there to the log and to ``/metrics``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine import blocks, flags, runners
from vllm_acckv.engine.prefix_copies import BlockCopies, PrefixCopies
from vllm_acckv.engine.prometheus import KVPolicyPromMetrics, KVPolicyStats, Saved
from vllm_acckv.engine.ranks import TensorParallelRanks
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.engine.rotary import angles_available
from vllm_acckv.engine.supported import num_layers, refuse
from vllm_acckv.engine.verify import KV_CACHES, verify_layers
from vllm_acckv.engine.worker import PolicyWorker, set_current_worker, upload
from vllm_acckv.metrics import RequestReport
from vllm_acckv.plan import NO_CLIP, returns_memory

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.acckv")


@dataclass
class LayersVerified(KVConnectorHandshakeMetadata):
    """A worker's word that every one of its decoder layers runs under the policy.

    Attributes:
        layers: names of those layers.
        has_angles: whether the worker can tell the rotary angles of its keys.
    """

    layers: list[str]
    has_angles: bool


@dataclass
class WorkerReports(KVConnectorWorkerMetadata):
    """What a step has done.

    Attributes:
        compacted: ids of the requests that were compacted in it.
        reports: on them, or on those of earlier steps: counts come from the device when they do.
    """

    compacted: set[str]
    reports: dict[str, RequestReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReports:
        assert isinstance(other, WorkerReports)
        self.compacted |= other.compacted
        for request_id, report in other.reports.items():
            if request_id in self.reports:
                self.reports[request_id] += report
            else:
                self.reports[request_id] = report
        return self


class KVPolicyConnector(KVConnectorBase_V1, SupportsHMA):
    """Carries plans to the block manager, and counters from the workers to log and metrics."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        policy = flags.requested(vllm_config.additional_config)
        assert policy is not None
        self.policy = policy
        self._num_layers = num_layers(vllm_config)
        self._hf_config = vllm_config.model_config.hf_config
        self._managers: list[blocks.KVPolicyManager] = []
        self._reports: dict[str, RequestReport] = {}
        self._finished: dict[str, str] = {}
        self._stats = KVPolicyStats()
        self._saved = Saved()
        self._worker: PolicyWorker | None = None
        self._verified: list[str] = []
        self._has_angles = False
        self._copies: PrefixCopies | None = None
        if role == KVConnectorRole.SCHEDULER:
            blocks.install(vllm_config.use_v2_model_runner)
        else:
            self._worker = self._make_worker(vllm_config, kv_cache_config)

    def _make_worker(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> PolicyWorker:
        worker = PolicyWorker(
            self.policy,
            block_size=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
            num_layers=self._num_layers,
            device=torch.device(vllm_config.device_config.device),
            ranks=TensorParallelRanks(),
            hf_config=self._hf_config,
            has_angles=angles_available(vllm_config),
        )
        runners.install(vllm_config.use_v2_model_runner)
        runners.fix_audio_in_video()
        set_current_worker(worker)
        return worker

    # Worker side

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._worker is not None and isinstance(connector_metadata, BlockCopies)
        device = self._worker.device
        self._worker.copies = {
            request_id: (upload(sources, device), upload(targets, device))
            for request_id, (sources, targets) in connector_metadata.blocks.items()
        }

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._verified = verify_layers(self._vllm_config, self._kv_cache_config)
        worker, config = self._worker, self._vllm_config
        assert worker is not None
        if worker.device.type == "cuda":
            # What would otherwise be made while the first clip waits: kernels and, under tensor
            # parallelism, PyTorch's own communicator.
            from vllm_acckv.kernels.compact import warm_up

            heads = config.model_config.get_num_attention_heads(config.parallel_config)
            caches, dtype = list(kv_caches.values()), config.model_config.dtype
            warm_up(self.policy, caches, heads, dtype, worker.block_size)
            worker.ranks.mean(torch.zeros(1, device=worker.device))
            worker.ranks.max(torch.zeros(1, dtype=torch.int64, device=worker.device))

    def get_handshake_metadata(self) -> LayersVerified:
        assert self._worker is not None
        return LayersVerified(self._verified, self._worker.has_angles)

    def build_connector_worker_meta(self) -> WorkerReports | None:
        assert self._worker is not None
        if self._vllm_config.use_v2_model_runner and not self._worker.step_open:
            raise RuntimeError("The model runner ran a step that the KV policy did not see.")
        self._worker.step_open = False
        compacted, reports = self._worker.take_compacted()
        # Every tensor-parallel rank keeps as many tokens; which modality they are of can differ
        # with a selection per head, and then rank 0 speaks for all.
        if not (compacted or reports) or self._worker.ranks.rank > 0:
            return None
        return WorkerReports(compacted, reports)

    def shutdown(self) -> None:
        if self._worker is not None:
            set_current_worker(None)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return

    def wait_for_save(self) -> None:
        return

    # Scheduler side

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._managers = blocks.managers(kv_cache_manager)
        groups = kv_cache_manager.coordinator.single_type_managers
        refuse(KV_CACHES, self.policy.name, groups, self._managers)
        (manager,) = self._managers
        config = self._vllm_config
        if manager.enable_caching and config.additional_config.get(flags.COPIES_KEY, True):
            overlapping = (config.max_concurrent_batches - 1) * (
                config.scheduler_config.max_num_batched_tokens
            )
            self._copies = PrefixCopies(manager, -(-overlapping // manager.block_size))

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        workers = [word for word in metadata.values() if isinstance(word, LayersVerified)]
        layers = {name for word in workers for name in word.layers}
        self._has_angles = all(word.has_angles for word in workers)
        if not layers or len(workers) != self._vllm_config.parallel_config.world_size:
            raise KVPolicyError("Not every worker runs its layers under the KV policy.")
        if self.policy.needs_angles and not self._has_angles:
            raise KVPolicyError(
                "Settings that look at keys before rotary embedding (merge_space=pre_rope, "
                "tau_mode=absolute_pre_rope, distinct of acckv_plus) need a model with half-split "
                "rotary embedding and no pruning of multimodal tokens."
            )
        logger.info(
            "KV policy %s is active on %d decoder layers (%s).",
            self.policy.name,
            len(layers),
            ", ".join(f"{key}={value}" for key, value in self.policy.model_dump().items()),
        )
        (manager,) = self._managers
        returns = returns_memory(self.policy, manager.block_size, self._num_layers)
        if self.policy.name != "full" and not returns:
            logger.warning(
                "KV policy %s returns no memory with these settings: some layer keeps everything, "
                "and all layers share their blocks.",
                self.policy.name,
            )

    def on_new_request(self, request: Request) -> None:
        (manager,) = self._managers
        plan = plan_request(
            request,
            self.policy,
            manager.block_size,
            self._num_layers,
            self._hf_config,
            self._has_angles,
        )
        manager.plans[request.request_id] = plan
        if self._copies is not None:
            self._copies.add(request)
        if plan.skipped is not None:
            self._stats.skip(plan.skipped)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        worker_meta = connector_output.kv_connector_worker_meta
        if not isinstance(worker_meta, WorkerReports):
            return
        if self._copies is not None:
            self._copies.finish(worker_meta.compacted)
        for request_id, report in worker_meta.reports.items():
            if request_id not in self._reports:  # else compacted again after a preemption
                self._stats.compact(report)
            if request_id in self._finished:  # ended in the very step that compacted it
                logger.info("%s; %s", self._finished.pop(request_id), _describe(report))
            elif request_id in self._managers[0].plans:
                self._reports[request_id] = report

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        (manager,) = self._managers
        request_id = request.request_id
        plan = manager.plans.pop(request_id)
        freed = manager.freed.pop(request_id, 0)
        report = self._reports.pop(request_id, None)
        if self._copies is not None:
            self._copies.discard(request_id)
        if plan.skipped is not None:
            # Text is the daily bread of a server; say nothing unless somebody looks for it.
            level = logging.DEBUG if plan.skipped == NO_CLIP else logging.INFO
            logger.log(level, "KV policy: request %s kept all (%s).", request_id, plan.skipped)
            return False, None
        if request.num_computed_tokens <= plan.end:
            freed = 0  # by its end, not by compaction
        self._stats.free(freed)
        line = (
            f"KV policy: request {request_id}, {request.num_prompt_tokens} prompt tokens, freed "
            f"{freed} of {-(-request.num_tokens // manager.block_size)} blocks"
        )
        if report is not None:
            logger.info("%s; %s", line, _describe(report))
        elif request.num_computed_tokens >= plan.end:
            self._finished[request_id] = line
        else:
            logger.info("%s; ended before its prompt was computed", line)
        return False, None

    def get_kv_connector_stats(self) -> KVPolicyStats | None:
        if self._role != KVConnectorRole.SCHEDULER:
            return None
        stats, self._stats = self._stats, KVPolicyStats()
        (manager,) = self._managers
        stats.data |= self._saved.now(manager.freed, self._reports)
        return None if stats.is_empty() else stats

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        return

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        for manager in self._managers:  # the step that follows computes them
            manager.uncomputed.clear()
        # Plans are not sent: the workers derive the same themselves.
        if self._copies is None:
            return BlockCopies()
        return self._copies.schedule(scheduler_output)

    # Front end

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVPolicyStats:
        # A copy, because every logger adds to its own what vLLM hands to all of them.
        return KVPolicyStats().aggregate(KVPolicyStats(data or {}))

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> KVPolicyPromMetrics:
        return KVPolicyPromMetrics(*args)


def _describe(report: RequestReport) -> str:
    kept, merged, evicted = map(report.per_layer, (report.kept, report.merged, report.evicted))
    parts = [
        f"{name} kept {kept[name]:.1f} merged {merged[name]:.1f} evicted {evicted[name]:.1f}"
        for name in kept
        if name != "text" or merged[name] or evicted[name]
    ]
    entries = report.entries / report.layers
    return f"per layer: {entries:.1f} entries, {', '.join(parts)}; {report.seconds:.4f} s"
