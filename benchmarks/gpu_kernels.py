# SPDX-License-Identifier: Apache-2.0
"""The half of gpu_bench.py that times kernels: bytes per second next to a large copy.

To add a kernel, write a function of a :class:`Case` that returns the bytes it has to move and a
call that launches it, or why it cannot run here, and name it in ``KERNELS``.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from gpu_common import BLOCK, SHAPES, SMALL, Shape, paged
from gpu_figures import Result

if TYPE_CHECKING:
    from vllm_acckv.kernels.paged import PagedLayers

ROWS = 48
BUDGET = 0.2


@dataclass(frozen=True)
class Case:
    """One request: the caches of all layers, and queries ``[ROWS, H, D]`` of its last tokens."""

    shape: Shape
    length: int
    layers: PagedLayers
    query: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def token_bytes(self) -> int:
        """Of keys and values of one token in one layer."""
        return 2 * self.shape.kv_heads * self.shape.head_size * self.query.element_size()


def make_case(shape: Shape, length: int, device: str) -> Case:
    from vllm_acckv.kernels.paged import PagedLayers

    first = paged(shape, length, torch.bfloat16, device)
    others = [first.blocks.clone() for _ in range(shape.layers - 1)]
    query = torch.randn(ROWS, shape.heads, shape.head_size, device=device).bfloat16()
    return Case(shape, length, PagedLayers([first.blocks, *others], first.table), query)


Work = tuple[int, Callable[[], Any]]


def observed(first_pass: Literal["triton", "xformers"], case: Case) -> Work | str:
    """Of one layer: the keys are read once in each of the two passes."""
    from vllm_acckv.kernels.score import observe

    if first_pass == "xformers" and importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    cache = case.layers.layer(0)
    scores = torch.zeros(case.shape.kv_heads, case.length, device=case.device)
    scale, first = case.shape.head_size**-0.5, case.length - ROWS

    def call() -> None:
        observe(scores, case.query, cache, first, scale, first_pass=first_pass)

    return case.length * case.token_bytes, call


def moved(case: Case) -> Work:
    """Of all layers: every kept entry is read once and written once."""
    from vllm_acckv.kernels.move import move

    size = (case.shape.layers, case.shape.kv_heads, case.length)
    order = torch.rand(size, device=case.device).argsort(-1)
    sources = order[..., : int(BUDGET * case.length)].sort(-1).values.int()
    moved_bytes = 2 * case.shape.layers * sources.shape[-1] * case.token_bytes
    return moved_bytes, partial(move, case.layers, sources, case.length)


def compacted(case: Case) -> Work:
    """Of all layers: merged tokens are read once; of heavy hitters the keys, for their direction or
    similarity, and then everything, which is written as well. Sorting is not counted."""
    from vllm_acckv.kernels.compact import compact
    from vllm_acckv.policies.acckv import AccKV
    from vllm_acckv.policies.base import Layer, Prompt
    from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout

    clip = case.length - ROWS
    modality = np.repeat(
        np.array([VIDEO, AUDIO, TEXT], np.int8), [clip - clip // 4, clip // 4, ROWS]
    )
    prompt = Prompt.of(Layout(modality), case.device)
    policy = AccKV(budget=BUDGET, tau=-1.0)
    scores = torch.rand(case.shape.layers, case.shape.kv_heads, case.length, device=case.device)
    kept = policy.entries(prompt.layout, Layer())
    moved_bytes = case.shape.layers * case.token_bytes * (case.length + round(1.5 * kept))
    arguments = (policy, scores, case.layers, prompt, Layer(), BLOCK)
    return moved_bytes, partial(compact, *arguments)


KERNELS: dict[str, Callable[[Case], Work | str]] = {
    "attention of one layer, first pass in Triton": partial(observed, "triton"),
    "attention of one layer, first pass of xformers": partial(observed, "xformers"),
    "entries of all layers moved in place": moved,
    "all layers compacted by AccKV": compacted,
}


def available() -> bool:
    return torch.cuda.is_available()


def shapes(small: bool) -> tuple[tuple[Shape, ...], int]:
    """Shapes and the length of the prompt."""
    return (SMALL, 256) if small else (SHAPES, 16384)


def names(small: bool) -> dict[str, str]:
    """Of each row, by its key."""
    found, length = shapes(small)
    return {
        f"kernel/{shape.name}/{name}": f"{name}: {shape.name}, {length} tokens"
        for shape in found
        for name in KERNELS
    }


def copy_rate(size: int, device: str) -> float:
    """Bytes per second of a copy, those read and those written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Median time of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, return_mode="median")) / 1000
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(small: bool) -> Iterator[tuple[str, Result | str]]:
    """Results by key, and under ``machine`` what they were measured on."""
    device = "cpu" if small else "cuda"
    machine = "CPU" if small else torch.cuda.get_device_name()
    yield "machine", f"{machine}, PyTorch {torch.__version__}"
    copied = copy_rate(2**20 if small else 2**30, device)
    found, length = shapes(small)
    for shape in found:
        case = make_case(shape, length, device)
        for name, make in KERNELS.items():
            key = f"kernel/{shape.name}/{name}"
            try:
                yield key, result(make(case), copied, device)
            except Exception as error:  # the others are worth knowing
                yield key, f"failed: {type(error).__name__}"
                yield "error", traceback.format_exc()


def result(work: Work | str, copied: float, device: str) -> Result | str:
    """``copied``: bytes per second of a copy."""
    if isinstance(work, str):
        return work
    moved_bytes, call = work
    taken = seconds(call, device)
    details = f"{moved_bytes / 2**20:.1f} MiB in {taken * 1e6:.0f} µs"
    return Result(moved_bytes / taken / 1e9, copied / 1e9, details)
