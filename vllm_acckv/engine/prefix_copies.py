# SPDX-License-Identifier: Apache-2.0
"""Prompt blocks that a compaction rewrites stay in the prefix cache, as copies in free blocks.

A compacted request rewrites its blocks from ``Plan.freed_blocks`` on. Just before a layer does, the
worker copies them into blocks that nobody uses, and when the step is done, the scheduler enters
those into the prefix cache and frees them, so that they are as any other cached block: found by the
next question about the clip, and the last to be evicted. What the cache holds already, or will when
the step is done, is not copied again, and only blocks that no running request needs are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from vllm_acckv.engine.blocks import KVPolicyManager

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class BlockCopies(KVConnectorMetadata):
    """What a worker copies in this step before it compacts.

    Attributes:
        blocks: per request id, the ids of the blocks to copy and of those to copy them to.
    """

    blocks: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pending:
    """Copies on their way: block ``first`` of ``request`` and those behind it."""

    request: Request
    first: int
    blocks: list[KVCacheBlock]

    @property
    def hashes(self) -> list[BlockHash]:
        return self.request.block_hashes[self.first : self.first + len(self.blocks)]


class PrefixCopies:
    """The scheduler's side. The worker's is ``PolicyWorker.after_attention``."""

    def __init__(self, manager: KVPolicyManager, reserved: int = 0) -> None:
        """
        Args:
            reserved: blocks to leave free because the next step is scheduled before this one is
                done and its copies are free again (pipeline parallelism, async scheduling).
        """
        self._manager = manager
        self._reserved = reserved
        self._pool = manager.block_pool
        self._requests: dict[str, Request] = {}
        self._pending: dict[str, _Pending] = {}

    def add(self, request: Request) -> None:
        if self._manager.active_plan(request.request_id) is not None:
            self._requests[request.request_id] = request

    def discard(self, request_id: str) -> None:
        """Forget a request that ended; its copies on their way are still waited for."""
        self._requests.pop(request_id, None)

    def schedule(self, output: SchedulerOutput) -> BlockCopies:
        """Choose what the step that ``output`` describes copies, and take blocks for it."""
        copies = BlockCopies()
        # The next token of every request may need a block.
        reserved = self._reserved + len(self._manager.req_to_blocks)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None:
                continue
            end = self._manager.plans[request_id].end
            if not request.num_computed_tokens < end <= request.num_computed_tokens + scheduled:
                continue
            first, blocks = self._uncached(request)
            blocks = blocks[: max(self._pool.get_num_free_blocks() - reserved, 0)]
            if not blocks or request_id in self._pending:
                continue
            targets = self._pool.get_new_blocks(len(blocks))
            self._pending[request_id] = _Pending(request, first, targets)
            copies.blocks[request_id] = (_ids(blocks), _ids(targets))
        return copies

    def _uncached(self, request: Request) -> tuple[int, list[KVCacheBlock]]:
        """The blocks of ``request`` that a later one could reuse, that will be rewritten, and
        that the prefix cache will not hold; and the index of the first of them."""
        plan = self._manager.plans[request.request_id]
        first = plan.freed_blocks
        # A plan may end before a block that its policy observes, but never frees that block.
        last = max(plan.reusable_blocks, first)
        group = [self._manager.kv_cache_group_id]
        coming = {block_hash for copies in self._pending.values() for block_hash in copies.hashes}
        for block_hash in request.block_hashes[first:last]:
            if block_hash not in coming and not self._pool.get_cached_block(block_hash, group):
                break
            first += 1
        return first, self._manager.req_to_blocks[request.request_id][first:last]

    def finish(self, request_ids: Iterable[str]) -> None:
        """The steps in which these requests were compacted are done."""
        for request_id in request_ids:
            if (copies := self._pending.pop(request_id, None)) is None:
                continue
            self._pool.cache_full_blocks(
                request=copies.request,
                blocks=[self._pool.null_block] * copies.first + copies.blocks,
                num_cached_blocks=copies.first,
                num_full_blocks=copies.first + len(copies.blocks),
                block_size=self._manager.block_size,
                kv_cache_group_id=self._manager.kv_cache_group_id,
            )
            # The tail first, because a prefix is worth more than what follows it.
            self._pool.free_blocks(reversed(copies.blocks))


def _ids(blocks: Iterable[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]
