# SPDX-License-Identifier: Apache-2.0
"""Copies of prompt blocks on the scheduler's side, with vLLM's own block manager and pool."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_acckv.engine import blocks
from vllm_acckv.engine.prefix_copies import BlockCopies, PrefixCopies
from vllm_acckv.plan import make_plan
from vllm_acckv.policies import make_policy
from vllm_acckv.spans import TEXT, VIDEO

BLOCK = 16
PROMPT = np.array([VIDEO] * 150 + [TEXT] * 10, dtype=np.int8)
BLOCKS = len(PROMPT) // BLOCK


class Scheduler:
    """What vLLM's scheduler does with the block manager, one step at a time."""

    def __init__(self, num_blocks: int, reserved: int = 0) -> None:
        blocks.install(use_v2_model_runner=True)
        init_none_hash(sha256)
        spec = blocks.KVPolicySpec(
            block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        group = KVCacheGroupSpec(["layer"], spec)
        config = KVCacheConfig(num_blocks, [], [group], hash_block_size=BLOCK)
        self.manager = KVCacheManager(config, 1024, BLOCK, BLOCK)
        (self.ours,) = blocks.managers(self.manager)
        self.pool = self.manager.block_pool
        self.copies = PrefixCopies(self.ours, reserved)
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def request(self, name: str, budget: float = 0.2, first_token: int = 0) -> Request:
        tokens = list(range(first_token, first_token + len(PROMPT)))
        made = Request(name, tokens, SamplingParams(), None, block_hasher=self._hasher)
        self.ours.plans[name] = make_plan(PROMPT, make_policy("acckv", budget=budget), BLOCK)
        self.copies.add(made)
        return made

    def prefill(self, *requests: Request) -> tuple[BlockCopies, list[int]]:
        """One step that computes whole prompts; its copies, and cached tokens per request."""
        hits = []
        for request in requests:
            found, hit, _ = self.manager.get_computed_blocks(request)
            allocated = self.manager.allocate_slots(request, len(PROMPT) - hit, hit, found)
            assert allocated is not None
            request.num_computed_tokens = hit
            hits.append(hit)
        _, retained = self.manager.take_kv_cache_block_copies()
        self.pool.free_blocks(retained)
        self.ours.uncomputed.clear()
        scheduled = {
            request.request_id: len(PROMPT) - request.num_computed_tokens for request in requests
        }
        copies = self.copies.schedule(SimpleNamespace(num_scheduled_tokens=scheduled))
        for request in requests:
            request.num_computed_tokens = len(PROMPT)
        return copies, hits

    def finish(self, *requests: Request) -> None:
        self.copies.finish(request.request_id for request in requests)

    def end(self, request: Request) -> None:
        self.manager.free(request)
        self.copies.discard(request.request_id)

    def cached(self, request: Request, index: int) -> KVCacheBlock:
        (block,) = self.pool.get_cached_block(request.block_hashes[index], [0])
        return block


def test_requests_of_one_step_copy_their_clip_once() -> None:
    scheduler = Scheduler(num_blocks=200)
    requests = [scheduler.request(str(number)) for number in range(4)]
    plan = scheduler.ours.plans["0"]
    copies, hits = scheduler.prefill(*requests)
    assert hits[0] == 0
    assert list(copies.blocks) == ["0"]
    sources, targets = copies.blocks["0"]
    assert len(sources) == len(targets) == plan.reusable_blocks - plan.freed_blocks > 0
    scheduler.finish(*requests)
    later = scheduler.request("later")
    copies, hits = scheduler.prefill(later)
    assert hits == [plan.reusable_blocks * BLOCK]
    assert not copies.blocks


def test_budgets_of_one_step_share_their_copies() -> None:
    """What the request that frees more has left hashed is not copied for the other one."""
    scheduler = Scheduler(num_blocks=200)
    half, fifth = scheduler.request("half", 0.5), scheduler.request("fifth", 0.2)
    freed = {name: plan.freed_blocks for name, plan in scheduler.ours.plans.items()}
    assert freed["half"] < freed["fifth"]
    copies, _ = scheduler.prefill(half, fifth)
    last = scheduler.ours.plans["half"].reusable_blocks
    assert {name: len(ids) for name, (ids, _) in copies.blocks.items()} == {
        "half": last - freed["fifth"]
    }


def test_the_tail_of_a_clip_is_evicted_first() -> None:
    """Also after a hit that copied its blocks: a prefix is worth more than what follows it."""
    scheduler = Scheduler(num_blocks=200)
    first = scheduler.request("first")
    plan = scheduler.ours.plans["first"]
    scheduler.prefill(first)
    scheduler.finish(first)
    scheduler.end(first)
    second = scheduler.request("second")
    scheduler.prefill(second)
    order = [block.block_id for block in scheduler.pool.free_block_queue.get_all_free_blocks()]
    places = [
        order.index(scheduler.cached(first, index).block_id)
        for index in range(plan.freed_blocks, plan.reusable_blocks)
    ]
    assert len(places) > 1
    assert places == sorted(places, reverse=True)


@pytest.mark.parametrize(("reserved", "copied"), [(0, 1), (1, 0), (9, 0)])
def test_copies_leave_room_for_every_request(reserved: int, copied: int) -> None:
    """One block for the next token of each, scheduled or not, and what the next step may need
    before the copies are free again."""
    scheduler = Scheduler(num_blocks=1 + 2 * BLOCKS + 3, reserved=reserved)
    resident, other = scheduler.request("resident", 1), scheduler.request("other", first_token=1)
    scheduler.prefill(resident)
    copies, _ = scheduler.prefill(other)
    assert sum(len(targets) for _, targets in copies.blocks.values()) == copied
    assert scheduler.pool.get_num_free_blocks() == 3 - copied
    for request in (resident, other):
        scheduler.finish(request)
        scheduler.end(request)
    assert scheduler.pool.get_num_free_blocks() == 2 * BLOCKS + 3


def test_a_decode_step_looks_at_new_blocks_only() -> None:
    """vLLM's own bookkeeping of a running request does not grow with its blocks."""
    scheduler = Scheduler(num_blocks=200)
    request = scheduler.request("request")
    scheduler.prefill(request)
    assert not scheduler.ours.uncomputed
    request.append_output_token_ids(0)
    assert scheduler.manager.allocate_slots(request, 1) is not None
    assert not scheduler.ours.uncomputed
