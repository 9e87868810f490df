# SPDX-License-Identifier: Apache-2.0
"""The block manager's side: which blocks a compacted request gives back, and which may be shared.

Blocks ``[0, freed_blocks)`` of a compacted request hold the prompt as it was computed. They are
hashed and shared like any others and freed as soon as the compaction has run. Blocks from there
on are rewritten, so they are never hashed, and what a prefix-cache hit finds there is copied into
blocks of the request's own, as vLLM does for a hit that ends inside a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_acckv.engine import compat
from vllm_acckv.plan import Plan


class KVPolicyManager(FullAttentionManager):
    """Full attention whose requests may give up leading blocks once their prompt is compacted.

    Attributes:
        plans: the plan of every request of the scheduler, compressed or not.
        freed: blocks that each request with blocks has given back through compaction.
        uncomputed: ids of blocks that are hashed, but computed only in the step being scheduled.
    """

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.plans: dict[str, Plan] = {}
        self.freed: dict[str, int] = {}
        self.uncomputed: set[int] = set()

    def active_plan(self, request_id: str) -> Plan | None:
        """The plan of a request that will be or is compacted."""
        plan = self.plans.get(request_id)
        return plan if plan is not None and plan.active else None

    def num_copies(self, request_id: str, num_hits: int) -> int:
        """Blocks of a prefix-cache hit of ``num_hits`` blocks that the request will rewrite."""
        plan = self.active_plan(request_id)
        return max(num_hits - plan.freed_blocks, 0) if plan is not None else 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        number = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        return number + self.num_copies(request_id, len(new_computed_blocks))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        number = self.num_copies(request_id, len(new_computed_blocks))
        last = len(new_computed_blocks) - 1
        # vLLM's runners copy before they compute, and keep both ends until then. It frees the
        # sources in this order: the tail first, because a prefix is worth more than what follows.
        for behind, own in enumerate(self.block_pool.get_new_blocks(number)):
            self._apply_cow(request_id, last - behind, new_computed_blocks[last - behind], own)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        plan = self.active_plan(request_id)
        if plan is None or processed_computed_tokens < plan.end:
            return
        if request_id in self.req_to_blocks:
            self._remove_blocks_in_range(request_id, 0, plan.freed_blocks)
            self.freed[request_id] = plan.freed_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # A preempted request starts again with all its blocks.
        self.freed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        request_id = request.request_id
        first = self.num_cached_block.get(request_id, 0)
        self._cache_blocks(request, num_tokens, retention_interval, replay_boundaries)
        hashed = self.req_to_blocks[request_id][first : self.num_cached_block.get(request_id, 0)]
        self.uncomputed.update(block.block_id for block in hashed)

    def _cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None,
        replay_boundaries: Sequence[int],
    ) -> None:
        plan = self.active_plan(request.request_id)
        if plan is None:
            super().cache_blocks(
                request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
            )
            return
        # From the first chunk on: blocks are hashed when they are allocated, before they are
        # rewritten. The partial tail that FullAttentionManager adds lies in rewritten blocks.
        SingleTypeKVCacheManager.cache_blocks(
            self,
            request,
            min(num_tokens, plan.freed_blocks * self.block_size),
            retention_interval,
            replay_boundaries=replay_boundaries,
        )


@dataclass(frozen=True, kw_only=True)
class KVPolicySpec(FullAttentionSpec):
    """KV cache of a layer under a policy: stored like full attention, managed by our manager."""

    @classmethod
    def from_full_attention(cls, spec: FullAttentionSpec) -> KVPolicySpec:
        return cls(**{name: getattr(spec, name) for name in spec.__dataclass_fields__})


def _register_spec() -> None:
    # vLLM registers its own specs only while the registry is empty; this check makes it do so.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(
        KVPolicySpec, KVPolicyManager, uniform_type_base_spec=FullAttentionSpec
    )


# On import, because a scheduler process first meets the class when it unpickles a worker's spec.
_register_spec()


_RELIED_ON = (
    "truncate_computed_blocks",
    "_apply_cow",
    "_remove_blocks_in_range",
    "get_num_blocks_to_allocate",
    "add_local_computed_blocks",
    "remove_skipped_blocks",
    "pop_blocks_for_free",
    "cache_blocks",
    "get_new_blocks",
    "get_cached_block",
    "cache_full_blocks",
    "free_blocks",
)
"""What :class:`KVPolicyManager` overrides, and what it and ``PrefixCopies`` call."""


def install(use_v2_model_runner: bool) -> None:
    """Wrap the scheduler's functions that must know a request's plan, or keep its clips."""
    compat.check(*_RELIED_ON)
    compat.wrap("get_computed_blocks", _with_capped_hits)
    compat.wrap("_reserve_prefill_lookahead", _with_chunk_boundary)
    if not use_v2_model_runner:  # V2 is sent a resumed request like a new one
        compat.wrap("strip_covered_mm_data", _with_all_clips)


def managers(kv_cache_manager: Any) -> list[KVPolicyManager]:
    """Our managers inside a ``KVCacheManager``."""
    found = kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in found if isinstance(manager, KVPolicyManager)]


def _plan(kv_cache_manager: Any, request: Request) -> Plan | None:
    for manager in managers(kv_cache_manager):
        return manager.active_plan(request.request_id)
    return None


def _with_capped_hits(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_computed_blocks(self: Any, request: Request) -> Any:
        blocks, num_tokens, boundary = original(self, request)
        for manager in managers(self):
            if (plan := manager.active_plan(request.request_id)) is None:
                continue
            hit = blocks.blocks[0][: plan.reusable_blocks]
            limit = shared = min(plan.freed_blocks, plan.reusable_blocks)
            # Copied before the step computes it, a block would be a copy of nothing.
            while limit < len(hit) and hit[limit].block_id not in manager.uncomputed:
                limit += 1
            if not _copies_fit(self, manager, request, hit[:limit]):
                limit = shared
            limit *= plan.block_size
            if num_tokens > limit:
                blocks, num_tokens = self.truncate_computed_blocks(blocks, limit), limit
        return blocks, num_tokens, boundary

    return get_computed_blocks


def _copies_fit(
    kv_cache_manager: Any,
    manager: KVPolicyManager,
    request: Request,
    hit: Sequence[KVCacheBlock],
) -> bool:
    """Whether the request can be admitted now with its own copies of a hit's blocks.

    It could wait forever in a pool that holds the request, but not the copies beside it.
    """
    needed = manager.get_num_blocks_to_allocate(
        request.request_id,
        num_tokens=request.num_tokens,
        new_computed_blocks=hit,
        total_computed_tokens=len(hit) * manager.block_size,
        num_local_computed_tokens=len(hit) * manager.block_size,
        num_tokens_main_model=request.num_tokens,
    )
    free = manager.block_pool.get_num_free_blocks() - kv_cache_manager.watermark_blocks
    return needed <= free


def _with_all_clips(original: Callable[..., Any]) -> Callable[..., Any]:
    def strip_covered_mm_data(
        mm_features: Any, num_computed_tokens: int, uses_mrope: bool = False
    ) -> Any:
        return mm_features

    return strip_covered_mm_data


def _with_chunk_boundary(original: Callable[..., Any]) -> Callable[..., Any]:
    def _reserve_prefill_lookahead(
        self: Any, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = original(self, request, num_computed_tokens, num_new_tokens)
        plan = _plan(self.kv_cache_manager, request)
        if plan is None:
            return num_new_tokens
        return bounded_chunk(plan, num_computed_tokens, num_new_tokens)

    return _reserve_prefill_lookahead


def bounded_chunk(plan: Plan, num_computed_tokens: int, num_new_tokens: int) -> int:
    """Cut a prefill chunk so that one ends at the compaction point.

    A resumed request would otherwise compute its prompt and its answer in one chunk. The chunk
    that compacts has two tokens or more, because one token would run as a decode inside a CUDA
    graph, where nothing can be compacted.
    """
    remaining = plan.end - num_computed_tokens
    if remaining <= 0:
        return num_new_tokens
    num_new_tokens = min(num_new_tokens, remaining)
    if remaining - num_new_tokens == 1:
        num_new_tokens -= 1
    return num_new_tokens
