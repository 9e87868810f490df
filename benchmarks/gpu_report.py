# SPDX-License-Identifier: Apache-2.0
"""The rows of gpu_bench.py with their targets, and how they are written down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpu_figures import Result, Scale

COMMAND = "make gpu-bench"
NOT_MEASURED = "not measured yet"
OUT_OF_TIME = "skipped: out of time"


@dataclass(frozen=True)
class Target:
    """A limit for the value, or for its share of the bound."""

    kind: Literal["at most", "at least", "of the bound"]
    limit: float

    def __str__(self) -> str:
        sign = "≤" if self.kind == "at most" else "≥"
        return f"{sign} {self.limit:.0%}" + (" of the bound" if self.kind == "of the bound" else "")

    def met(self, value: float, bound: float | None) -> bool:
        if self.kind == "at most":
            return value <= self.limit
        if self.kind == "at least":
            return value >= self.limit
        assert bound is not None
        return value >= self.limit * bound


@dataclass(frozen=True)
class Row:
    """One figure; ``unit`` is ``%`` of a share, ``x`` of a ratio, or printed as it is."""

    key: str
    section: str
    what: str
    unit: str
    target: Target | None = None


COMPACTION = "Time of compaction, as a share of prefill"
DECODE = "Decode: time per output token, speed-up over `full`"
TIGHT = "Tight KV space: {} uncompressed requests fit, {} are sent"
AMPLE = "Ample KV space: {} requests, all fit"
STOCK = "Policy `full` against stock vLLM"
VICUNA = "The same with Vicuna-7B's decoder, which has 32 KV heads"
KERNELS = "Kernels next to the device's copy bandwidth"


def tokens(count: int) -> str:
    return f"{count // 1024}k tokens" if count >= 1024 else f"{count} tokens"


def rows(scale: Scale, kernels: Mapping[str, str]) -> Iterator[Row]:
    """Every row of the tables; ``kernels`` are keys and names of theirs."""
    cheap = Target("at most", 0.01)
    near = Target("of the bound", 0.9)
    for length in scale.lengths:
        for budget in scale.budgets:
            what = f"{tokens(length)}, budget {budget:g}"
            target = cheap if length == scale.main else None
            yield Row(f"compaction/{length}/{budget:g}", COMPACTION, what, "%", target)
    for batch in scale.batches:
        for budget in scale.budgets:
            what = f"{batch} x {tokens(scale.main)}, budget {budget:g}"
            yield Row(f"decode/{batch}/{budget:g}", DECODE, what, "x", near)
    section = TIGHT.format(scale.tight, scale.tight_requests)
    for budget in scale.budgets:
        what = f"{tokens(scale.crowd)}, budget {budget:g}: "
        yield Row(f"residents/{budget:g}", section, what + "decoding at once, peak", "", near)
        yield Row(f"tight/{budget:g}", section, what + "output tokens/s over `full`", "x")
    section = AMPLE.format(scale.ample_requests)
    for budget in scale.budgets:
        what = f"{tokens(scale.crowd)}, budget {budget:g}: output tokens/s over `full`"
        yield Row(f"ample/{budget:g}", section, what, "x", Target("at least", 0.99))
    for key, what in {
        "prefill": f"prefill of {tokens(scale.main)}: slower by",
        "decode": f"time per output token, {scale.stock_batch} x {tokens(scale.main)}: slower by",
        "ample": f"{scale.ample_requests} x {tokens(scale.crowd)}, answered: slower by",
    }.items():
        yield Row(f"stock/{key}", STOCK, what, "%", cheap)
    batch, budget = scale.stock_batch, scale.budgets[0]
    what = f"compaction of {tokens(scale.main)}, budget {budget:g}, as a share of prefill"
    yield Row(f"vicuna/compaction/{scale.main}/{budget:g}", VICUNA, what, "%", cheap)
    what = f"decode of {batch} x {tokens(scale.main)}, budget {budget:g}, speed-up over `full`"
    yield Row(f"vicuna/decode/{batch}/{budget:g}", VICUNA, what, "x", near)
    for key, name in kernels.items():
        yield Row(key, KERNELS, name, "GB/s")


def verdict(row: Row, result: Result | str | None) -> str:
    """A result that is a text says why there is none."""
    if not isinstance(result, Result):
        return NOT_MEASURED
    if row.target is None:
        return "-"
    return "met" if row.target.met(result.value, result.bound) else "**missed**"


def number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.2%}"
    return f"{value:.2f}x" if unit == "x" else f"{value:.0f} {unit}".rstrip()


def table(rows: list[Row], results: Mapping[str, Result | str]) -> str:
    """Markdown, a table for each section."""
    lines, section = [], None
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"## {section}", ""]
            lines += ["| | measured | bound | of it | target | | from |", "|---" * 7 + "|"]
        result = results.get(row.key)
        measured = limit = share = ""
        details = result if isinstance(result, str) else ""
        if isinstance(result, Result):
            measured, details = number(result.value, row.unit), result.details
            if result.bound is not None:
                limit, share = number(result.bound, row.unit), f"{result.value / result.bound:.0%}"
        cells = [row.what, measured, limit, share, str(row.target or "-"), verdict(row, result)]
        lines.append("| " + " | ".join([*cells, details]) + " |")
    return "\n".join(lines)


ABOUT = f"""\
Written by `{COMMAND}` (`benchmarks/gpu_bench.py`); the numbers are in `results-gpu.json`, too.

The decoder of Qwen2.5-Omni-7B unless another is named: its shape, random bf16 weights, CUDA graphs,
no prefix caching, chunks of 8192 tokens. τ is -1, so that the filter drops nothing and exactly the
budget stays. Lengths are audio-video tokens. Prompts repeat one clip, whose embeddings vLLM keeps:
no figure contains the encoders. `full` and AccKV take turns on one engine, by request; stock vLLM
has an engine of its own, without this package. Compaction is what AccKV adds to the time to the
first token of one request, so it counts everything.

Bounds: if only bytes took time, and a step read the weights and every cached token once, a decode
step would be (W + n·κ·(P+t)) / (W + n·κ·(r·P+t)) times as fast; W are bytes of weights, n requests,
κ bytes of a token's keys and values, P audio-video tokens, t others, r the budget. Of requests that
decode at once, (P+t) / (r·P+t) times as many fit. Kernels are next to a large copy; what L2 still
holds may be faster."""


def markdown(machine: str | None, rows: list[Row], results: Mapping[str, Result | str]) -> str:
    """docs/results-gpu.md; without a ``machine``, before anything was measured."""
    state = f"**Not measured yet**: run `{COMMAND}` on a machine with one NVIDIA GPU."
    if machine is not None:
        state = f"Measured on **{machine}**."
    return f"# Results on a GPU\n\n{state}\n\n{ABOUT}\n{table(rows, results)}\n"


def as_json(row: Row, result: Result | str | None) -> dict[str, Any]:
    measured = asdict(result) if isinstance(result, Result) else {"details": result or ""}
    target = str(row.target) if row.target else None
    about = {"key": row.key, "section": row.section, "what": row.what, "unit": row.unit}
    return {**about, "target": target, "verdict": verdict(row, result).strip("*"), **measured}


def merge(path: Path, name: str, results: dict[str, Any]) -> None:
    """Write ``results`` under ``name`` into a JSON file, and leave what else it holds."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content[name] = results
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
