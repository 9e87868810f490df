# SPDX-License-Identifier: Apache-2.0
"""No policy makes the host wait for the device.

On the device ``meta`` tensors have no data: ``.item()``, ``.tolist()``, ``.cpu()``, ``bool()`` and
boolean indexing raise. Copies to the device do not, but wait on CUDA unless they are
``non_blocking``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_policy_invariants import CASES, LAYER, LAYOUTS, Case, Sample, made, over_cases
from vllm_acckv.policies.base import Policy, Prompt
from vllm_acckv.policies.recent import Recent
from vllm_acckv.selection import Selection

BLOCK_SIZES = (1, 4, 16)


def samples() -> list[Sample]:
    names = ("contiguous", "interleaved", "video_only", "audio_only")
    return [Sample(LAYOUTS[name](20, 15, 5), dtype=torch.bfloat16) for name in names]


def on_meta(sample: Sample) -> Sample:
    for name in ("queries", "keys", "values"):
        setattr(sample, name, getattr(sample, name).to("meta"))
    sample.prompt = Prompt(sample.layout, sample.modality.to("meta"), sample.angles.to("meta"))
    return sample


def reads_a_count(policy: Policy) -> bool:
    """AccKV's filter decides how many entries there are; who needs exactly those must wait."""
    return bool(getattr(policy, "calibration", False))


class Reads(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars = 0
        self.shapes: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.scalars += 1
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or name in ("nonzero", "masked_select", "_unique2", "repeat_interleave", "equal"):
            self.shapes.append(name)
        return func(*args, **(kwargs or {}))


class Uploads(TorchFunctionMode):
    """Collects what copies to the device ``meta`` and waits for the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        from_host = func in (torch.tensor, torch.as_tensor) or (
            func is torch.Tensor.to and not args[0].is_meta
        )
        waits = not (kwargs or {}).get("non_blocking", False)
        if from_host and out.is_meta and waits:
            self.functions.append(func.__name__)
        return out


@over_cases
def test_nothing_is_read_from_the_device(case: Case) -> None:
    policy = made(case)
    for sample in map(on_meta, samples()):
        scores = sample.scores(policy)
        assert scores.is_meta
        for block_size in BLOCK_SIZES:
            done = sample.compact(policy, scores, block_size, wait=False)
            entries = policy.entries(sample.layout, LAYER)
            freed = (sample.layout.length - entries) // block_size * block_size
            assert done.key.is_meta and done.positions.is_meta
            assert done.key.shape[1] == sample.layout.length - freed
            on_device = isinstance(done.kept.empty_blocks, torch.Tensor)
            assert on_device == (reads_a_count(policy) and bool(freed or block_size == 1))


@over_cases
def test_nothing_is_uploaded(case: Case) -> None:
    policy = made(case)
    for sample in map(on_meta, samples()):
        scores = sample.scores(policy)
        with Uploads() as uploads:
            sample.select(policy, scores)
        assert uploads.functions == []


@pytest.mark.parametrize(
    "case", [case for case in CASES if reads_a_count(made(case))], ids=lambda case: case[0]
)
def test_acckv_reads_one_number_of_entries(case: Case) -> None:
    policy = made(case)
    for sample in samples():
        for block_size in BLOCK_SIZES:
            with Reads() as reads:
                sample.compact(policy, sample.scores(policy), block_size)
            assert (reads.scalars, reads.shapes) == (1, [])


@over_cases
def test_the_same_is_kept_without_waiting(case: Case) -> None:
    policy = made(case)
    for sample in samples():
        scores = sample.scores(policy)
        for block_size in BLOCK_SIZES[1:]:
            waited = sample.compact(policy, scores, block_size)
            done = sample.compact(policy, scores, block_size, wait=False)
            if done.kept.freed_blocks == 0:
                continue  # vLLM leaves a layer alone that is planned to free nothing
            assert int(done.kept.all_freed) == waited.kept.freed_blocks
            empty = int(done.kept.empty_blocks) * block_size
            assert (done.positions[:, :empty] == -1).all()
            for ours, expected in (
                (done.positions, waited.positions),
                (done.key, waited.key),
                (done.value, waited.value),
            ):
                assert torch.equal(ours[:, empty:], expected)
            assert torch.equal(done.kept.tokens, waited.kept.tokens)


def test_these_tests_notice_a_read() -> None:
    class Reading(Recent):
        def select(self, scores: torch.Tensor, *args: Any) -> Selection:
            assert scores.sum().item() >= 0
            return super().select(scores, *args)

    class Indexing(Recent):
        def select(self, scores: torch.Tensor, *args: Any) -> Selection:
            assert scores[scores > 0].dim() == 1
            return super().select(scores, *args)

    for policy, scalars, shapes in ((Reading(), 1, []), (Indexing(), 0, ["index"])):
        sample = samples()[0]
        with Reads() as reads:
            sample.compact(policy, torch.ones(2, sample.layout.length))
        assert (reads.scalars, reads.shapes[:1]) == (scalars, shapes)
        meta = torch.ones(2, sample.layout.length, device="meta")
        with pytest.raises((RuntimeError, NotImplementedError)):
            on_meta(sample).compact(policy, meta)
