# SPDX-License-Identifier: Apache-2.0
"""Is a KV policy right on this GPU? Kernels against float64, CUDA graphs against none.

    python benchmarks/gpu_check.py [--output docs/results-gpu.json]

Needs nothing but vLLM and this checkout: no network, no weights. Kernels run at the shapes of
Qwen2.5-Omni-7B and of a Vicuna-7B decoder; engines serve the tiny model with each attention
backend, and must not wait for the device more often than stock vLLM does. Prints a table and ends
with status 1 if something is wrong. Without a GPU, small kernels run in Triton's interpreter and no
engine is started.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_report import merge

if TYPE_CHECKING:
    from tests.engines import Trace
    from vllm_acckv.kernels.paged import PagedCache

ROOT = Path(__file__).parent.parent
BLOCK = 16

# By kind of step, for each step: where in the code the host waited for the device.
Waits = dict[str, list[list[str]]]


@dataclass(frozen=True)
class Shape:
    """Attention: query heads, KV heads, head size; how many layers there are."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    layers: int


SHAPES = (Shape("Qwen2.5-Omni-7B", 28, 4, 128, 28), Shape("Vicuna-7B", 32, 32, 128, 32))
SMALL = (Shape("small", 6, 2, 24, 2),)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        error: largest relative error of a number, or the share of answers that differ.
        bound: what ``error`` may be.
    """

    what: str
    shape: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def paged(shape: Shape, length: int, dtype: torch.dtype, device: str) -> PagedCache:
    """A cache with the request's blocks in random order."""
    from vllm_acckv.kernels.paged import PagedCache

    needed = -(-length // BLOCK)
    size = (needed + 5, shape.kv_heads, BLOCK, 2 * shape.head_size)
    table = torch.randperm(needed + 5, device=device)[:needed].int()
    return PagedCache(torch.randn(size, device=device).to(dtype), table)


def exact_scores(
    query: torch.Tensor, key: torch.Tensor, first_row: int, scale: float
) -> torch.Tensor:
    """fp64 ``[G, l]``: sum over rows of the mean over a group's heads of softmax attention."""
    rows = torch.arange(first_row, first_row + len(query), device=query.device)
    unseen = torch.arange(key.shape[1], device=query.device) > rows[:, None]
    total = torch.zeros(key.shape[:2], dtype=torch.float64, device=query.device)
    group = query.shape[1] // len(key)
    for head in range(query.shape[1]):
        logits = query[:, head].double() @ key[head // group].double().T * scale
        total[head // group] += logits.masked_fill(unseen, -torch.inf).softmax(-1).sum(0) / group
    return total


def kernel_checks(device: str) -> Iterator[Check]:
    from vllm_acckv.kernels.move import move, move_reference
    from vllm_acckv.kernels.paged import PagedLayers
    from vllm_acckv.kernels.score import observe

    shapes, lengths = (SHAPES, (1000, 16384)) if device == "cuda" else (SMALL, (100,))
    rows = 48 if device == "cuda" else 10
    for shape in shapes:
        for length in lengths:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                cache = paged(shape, length, dtype, device)
                query = torch.randn(rows, shape.heads, shape.head_size, device=device).to(dtype)
                where = f"{shape.name}, {length} tokens, {str(dtype).removeprefix('torch.')}"
                first, scale = length - rows, shape.head_size**-0.5
                scores = torch.zeros(shape.kv_heads, length, device=device)
                observe(scores, query, cache, first, scale)
                exact = exact_scores(query, cache.read(length)[0], first, scale)
                error = ((scores - exact).abs() / exact.clamp(min=1e-12))[:, :first].max()
                yield Check("observed attention", where, float(error), 1e-3)

                order = torch.rand(1, shape.kv_heads, length, device=device).argsort(-1)
                sources = order[..., : length // 5].sort(-1).values.int()
                expected = cache.blocks.clone()
                move_reference(PagedLayers([expected], cache.table), sources, length)
                move(PagedLayers([cache.blocks], cache.table), sources, length)
                differ = (cache.blocks != expected).any(-1).float().mean()
                yield Check("entries moved in place", where, float(differ), 0.0)


def differing(one: Trace, other: Trace) -> float:
    """Share of the answers, and of what layers kept, that is not the same."""
    pairs = list(zip(one.answers, other.answers, strict=True))
    different = [ours.tokens != theirs.tokens for ours, theirs in pairs]
    if one.kept and other.kept:
        different += [one.kept[name] != other.kept.get(name) for name in one.kept]
    return sum(different) / len(different)


def engine_checks(folder: Path) -> Iterator[Check]:
    """The tiny model: CUDA graphs on and off, and policy ``full`` against stock vLLM."""
    from tests.engines import WITHOUT_PLUGIN, Ask, Engine
    from vllm_acckv.tools import clips, tiny_model

    model = tiny_model.build(folder / "model")
    video = clips.make_clip(folder / "clip.mp4", seconds=6, sound=False)
    sound = clips.make_wav(folder / "clip.wav", seconds=6)
    parts = [
        {"type": "video_url", "video_url": {"url": video.as_uri()}},
        {"type": "audio_url", "audio_url": {"url": sound.as_uri()}},
    ]

    def ask(question: str, **xargs: Any) -> Ask:
        content = [*parts, {"type": "text", "text": question}]
        return Ask([{"role": "user", "content": content}], xargs=xargs, max_tokens=24)

    asks = [
        ask("What happens?", kv_tau=0.9, kv_budget=0.5),
        ask("Which colours are seen, and which sound is heard last?"),
        ask("And then?", kv_policy="snapkv"),
        ask("What else?", kv_policy="full"),
    ]
    plain = [Ask(one.messages, max_tokens=24) for one in asks]

    def run(asks: list[Ask], policy: str | None, **options: Any) -> tuple[Trace, Waits]:
        config = {"additional_config": {"kv_policy": policy}} if policy else {}
        environment = {**({} if policy else WITHOUT_PLUGIN), "VLLM_GPU_SYNC_CHECK": "warn"}
        with Engine(model, environment, **config, **options, max_num_batched_tokens=128) as engine:
            return engine.run(*asks, arrive=[0, 0, 2, 5]), engine.call("waits", asks)

    for backend, dtype in (("TRITON_ATTN", "float32"), ("FLASH_ATTN", "bfloat16")):
        options = {"attention_backend": backend, "dtype": dtype, "enforce_eager": False}
        graphs, ours = run(asks, "acckv", **options)
        freed = graphs.counters.get("freed_blocks", 0) > 0
        yield Check("blocks came back", backend, float(not freed), 0.0)
        eager, _ = run(asks, "acckv", **{**options, "enforce_eager": True})
        yield Check("CUDA graphs", backend, differing(graphs, eager), 0.0)
        stock, stocks = run(plain, None, **options)
        full, fulls = run(plain, "full", **options)
        yield Check("full is stock", backend, differing(full, stock), 0.0)
        for kind, others, name in (("decode", stocks, "stock"), ("prefill", fulls, "full")):
            what = f"waits per {kind} step beyond those of {name}"
            yield Check(what, backend, more_waits(ours[kind], others[kind]), 0.0)


def more_waits(ours: list[list[str]], theirs: list[list[str]]) -> float:
    """By how many a step's waits exceed those of the other engine, on average; says where."""
    one, other = (sum(map(len, steps)) / len(steps) for steps in (ours, theirs))
    if one > other:
        places = Counter(place for step in ours for place in step)
        print("waits for the device:", dict(places), file=sys.stderr)
    return max(0.0, one - other)


def table(machine: str, checks: list[Check]) -> str:
    lines = [f"{machine}", "", "| check | where | error | allowed | |", "|---|---|---|---|---|"]
    for check in checks:
        verdict = "ok" if check.passed else "**wrong**"
        numbers = f"{check.error:.1e} | {check.bound:.0e}"
        lines.append(f"| {check.what} | {check.shape} | {numbers} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file to add the results to")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cuda" if cuda else "cpu"
    machine = torch.cuda.get_device_name() if cuda else "no GPU, Triton's interpreter"
    torch.manual_seed(0)
    checks = list(kernel_checks(device))
    if cuda:
        with tempfile.TemporaryDirectory() as folder:
            checks += engine_checks(Path(folder))
    print(table(machine, checks))
    if arguments.output is not None:
        results = [{**asdict(check), "passed": check.passed} for check in checks]
        merge(arguments.output, "gpu-check", {"machine": machine, "checks": results})
    sys.exit(0 if all(check.passed for check in checks) else 1)


if __name__ == "__main__":
    main()
