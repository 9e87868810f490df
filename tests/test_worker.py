# SPDX-License-Identifier: Apache-2.0
"""The worker's bookkeeping, without an engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from vllm_acckv.engine import runners
from vllm_acckv.engine.rows import Row, WorkerRequest
from vllm_acckv.engine.worker import PolicyWorker, set_current_worker
from vllm_acckv.kernels.paged import PagedCache, PagedLayers
from vllm_acckv.kernels.tables import LayerTables
from vllm_acckv.plan import Plan, make_plan
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.selection import Kept, SingleRank
from vllm_acckv.spans import TEXT, VIDEO

PROMPT = np.array([VIDEO] * 90 + [TEXT] * 10, dtype=np.int8)


def request(name: str, plan: Plan) -> WorkerRequest:
    return WorkerRequest(name, object(), plan, None, None, frozenset())


@pytest.fixture
def worker() -> PolicyWorker:
    policy, device = make_policy("acckv"), torch.device("cpu")
    made = PolicyWorker(policy, 16, 2, device, SingleRank(), None, has_angles=False)  # type: ignore[arg-type]
    made.requests = {
        "clip": request("clip", make_plan(PROMPT, policy, 16, 2)),
        "text": request("text", make_plan(PROMPT[90:], policy, 16, 2)),
    }
    return made


@pytest.mark.parametrize(
    ("computed", "scheduled", "work"),
    [
        ([0, 0], [90, 10], False),  # in front of the observed rows
        ([89, 0], [2, 10], True),
        ([90, 10], [1, 1], True),  # one token in the middle of them
        ([99, 10], [1, 1], True),  # the last one, alone in its chunk
        ([100, 10], [1, 1], False),
    ],
)
def test_hazard_4_steps_with_work_are_no_decodes(
    worker: PolicyWorker, computed: list[int], scheduled: list[int], work: bool
) -> None:
    """vLLM runs chunks of one token inside a FULL CUDA graph, which skips our code."""

    class State(NamedTuple):
        req_ids: list[str]
        num_scheduled_tokens: np.ndarray
        num_computed_prefill_tokens_np: np.ndarray
        has_prefill: bool
        decode_graph_eligible: bool

    state = State(["clip", "text"], np.array(scheduled), np.array(computed), True, True)
    gather = runners._with_whole_graphs_for_decodes(lambda *_: (state, 1))
    set_current_worker(worker)
    try:
        found, uniform_token_count = gather(None, None, False)
    finally:
        set_current_worker(None)
    assert (found.decode_graph_eligible, uniform_token_count) == (not work, None if work else 1)
    assert gather(None, None, False) == (state, 1)  # without a policy


def test_a_slot_starts_with_all_blocks(worker: PolicyWorker) -> None:
    tables = LayerTables(2, 3, 8, 16, torch.device("cpu"))
    tables.freed.fill_(4)
    worker.tables.append(tables)
    worker.take_slot(1, worker.requests["clip"])
    assert tables.freed.tolist() == [[4, 4], [0, 0], [4, 4]]
    assert worker.slots_in(np.array([1, 0])) == []  # a warm-up run
    worker.step_open = True
    assert worker.slots_in(np.array([1, 0])) == [1, 0]


def test_no_tables_before_there_is_a_policy_worker() -> None:
    """vLLM captures CUDA graphs to measure their memory before the KV connector exists."""
    from vllm_acckv.engine.gpu_attention import _BuilderMixin

    class Stock:
        def build(self, *_: object) -> str:
            return "stock metadata"

    class Builder(_BuilderMixin, Stock):
        def __init__(self) -> None:
            pass

    assert Builder().build(0, None) == "stock metadata"  # type: ignore[arg-type]


class Cache:
    """Of one KV head; nothing is ever read from it."""

    num_kv_heads = 1
    paged = PagedCache(torch.zeros(1, 1, 16, 8), torch.zeros(7, dtype=torch.int32))


@pytest.mark.parametrize(
    ("policy", "options", "room", "groups"),
    [
        ("recent", {}, 1 << 22, [[0, 1, 2, 3, 4, 5]]),
        ("recent", {}, 250, [[0, 1], [2, 3], [4, 5]]),  # scores of 100 tokens each
        ("drop_video", {"budget": 1.0, "first_layer": 2}, 1 << 22, [[0], [1], [2, 3, 4, 5]]),
        ("pyramidkv", {"window": 4}, 1 << 22, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_layers_wait_for_each_other(
    policy: str,
    options: dict[str, Any],
    room: int,
    groups: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers of equal size are decided together, as many as there is room for, and each once."""
    chosen, device = make_policy(policy, **options), torch.device("cpu")
    worker = PolicyWorker(chosen, 16, 6, device, SingleRank(), None, has_angles=False)  # type: ignore[arg-type]
    plan = make_plan(PROMPT, chosen, 16, 6)
    clip = WorkerRequest("clip", object(), plan, Prompt.of(plan.layout, device), None, frozenset())
    clip.scores = {index: torch.zeros(1, plan.end) for index in range(6)}
    decided = []

    def compact(
        policy: Policy,
        scores: torch.Tensor,
        layers: PagedLayers,
        prompt: Prompt,
        first: Layer,
        _: int,
    ) -> tuple[None, Kept]:
        entries = policy.entries(prompt.layout, first)
        decided.append(len(layers))
        assert scores.shape == (len(layers), 1, plan.end)
        return None, Kept((plan.end - entries) // 16, entries, torch.ones(1, plan.end) > 0, None)

    monkeypatch.setattr("vllm_acckv.kernels.compact.compact", compact)
    monkeypatch.setattr("vllm_acckv.engine.worker._MAX_SCORES", room)
    row = Row(0, clip, 0, plan.end, 0)
    finished = []
    for index in range(6):
        cache: Any = Cache()
        names = worker.after_attention(
            row, f"{index}", index, torch.zeros(plan.end, 1, 4), cache, 1.0, last=index == 5
        )
        finished += [([int(name) for name in group], freed) for group, freed in names]
    assert [group for group, _ in finished] == groups
    assert decided == [len(group) for group in groups if plan.compacts(group[0])]
    freed = [(plan.end - plan.entries[index]) // 16 for index in range(6)]
    assert [clip.freed[f"{index}"] for index in range(6)] == freed
    assert int(clip.total_freed) == sum(freed)
    assert clip.untouched == sum(not plan.compacts(index) for index in range(6))
