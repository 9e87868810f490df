# SPDX-License-Identifier: Apache-2.0
"""What a KV policy costs and gains on this machine's GPU, each figure next to its bound.

    python benchmarks/gpu_bench.py [--minutes 8] [--output docs]

Needs nothing but vLLM and this checkout: no network, no weights. Decoders have the shapes of
Qwen2.5-Omni-7B and Vicuna-7B and random weights. Measures in the order of importance and skips what
no longer fits into the time. Prints tables, writes them to ``results-gpu.md`` and the numbers to
``results-gpu.json``, which gpu_check.py shares.

``--small`` runs all of it with a tiny model on CPU, to see that it works; the figures mean nothing
and are printed only. ``--blank`` writes the tables before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_kernels
from gpu_figures import FULL_SCALE, SMALL_SCALE, Result, Scale, figures
from gpu_report import COMMAND, OUT_OF_TIME, as_json, markdown, merge, rows

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
WITHOUT_PLUGIN = {"VLLM_PLUGINS": "acckv_cpu_media"}
# Seconds for processes to end and results to be written.
SPARE = 15


@dataclass(frozen=True)
class Model:
    """Fields of the recipe of a tiny model, and of the decoder's configuration."""

    recipe: dict[str, int]
    text: dict[str, int]


QWEN = Model(
    {"num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "head_dim": 128},
    {"intermediate_size": 18944, "vocab_size": 152064},
)
TINY, TINY_MHA = Model({}, {}), Model({"num_kv_heads": 4}, {})
VICUNA = Model(
    {"num_layers": 32, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128},
    {"intermediate_size": 11008, "vocab_size": 32000},
)


@dataclass(frozen=True)
class Job:
    """Work for a process of its own.

    Attributes:
        seconds: it is not worth a start where less is left.
        run: yields keys and what was found, see :func:`collect`.
    """

    seconds: float
    run: Callable[..., Iterator[tuple[str, Any]]]
    arguments: tuple[Any, ...]
    environment: dict[str, str]


def write_model(folder: Path, model: Model, scale: Scale) -> dict[str, Any]:
    """A checkpoint without weights; the decoder's configuration."""
    from vllm_acckv.tools import tiny_model

    pixels = 28 * 28 * scale.clip.height * scale.clip.width
    recipe = tiny_model.Recipe(**model.recipe, max_positions=65536, max_pixels=pixels)
    tiny_model.write_shape(folder, recipe, **model.text)
    config = json.loads((folder / "config.json").read_text())
    return config["thinker_config"]["text_config"]


def run_engine(
    model: Path, scale: Scale, deadline: float, what: str, options: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Time ``policies``, ``stock`` or ``vicuna`` on one engine."""
    import gpu_engine

    if what != "stock":
        policy = {"policy": "acckv", "budget": scale.budgets[0], "tau": -1}
        options = {**options, "additional_config": {"kv_policy": policy}}
    bench = gpu_engine.Bench(model, scale, deadline, options)
    arms = gpu_engine.arms(scale)
    few = tuple(batch for batch in scale.batches if batch <= scale.stock_batch)
    if what == "policies":
        others = tuple(length for length in scale.lengths if length != scale.main)
        yield from gpu_engine.measure(
            bench, arms, scale.batches, tight=True, ample=True, lengths=others
        )
    elif what == "stock":
        yield from gpu_engine.measure(bench, {"stock": {}}, few, ample=True)
    else:
        pair = {arm: arms[arm] for arm in ("full", f"{scale.budgets[0]:g}")}
        for key, value in gpu_engine.measure(bench, pair, few):
            yield f"vicuna/{key}", value
    bench.engine.engine_core.shutdown()


def jobs(folder: Path, scale: Scale, deadline: float, small: bool) -> Iterator[Job]:
    """In the order of importance."""
    options: dict[str, Any] = {"dtype": "bfloat16", "cudagraph_capture_sizes": capture_sizes(scale)}
    environment, interpreter = ENVIRONMENT, {}
    if small:
        options = {"dtype": "float32", "enforce_eager": True, "block_size": 32}
        environment, interpreter = ENVIRONMENT | ON_CPU, {"TRITON_INTERPRET": "1"}
    qwen, vicuna = folder / "qwen", folder / "vicuna"

    def engine(seconds: float, model: Path, what: str, extra: dict[str, str]) -> Job:
        arguments = (model, scale, deadline, what, options)
        return Job(seconds, run_engine, arguments, environment | extra)

    yield Job(30, gpu_kernels.measure, (small,), interpreter)
    yield engine(60, qwen, "policies", {})
    yield engine(60, qwen, "stock", WITHOUT_PLUGIN)
    yield engine(60, vicuna, "vicuna", {})


def capture_sizes(scale: Scale) -> list[int]:
    """Batches of a CUDA graph; few, because each takes time to capture."""
    most = max(scale.tight_requests, *scale.batches)
    return sorted({1, 2, 4, 8, 16, *range(32, most, 32), most, *scale.batches})


def collect(job: Job, end: float) -> Iterator[tuple[str, Any]]:
    """What a process finds until ``end``; an exception's text comes under ``error``."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, job))
    process.start()
    theirs.close()
    try:
        while mine.poll(max(0, end - time.monotonic())):
            yield mine.recv()
    except EOFError:
        process.join(min(SPARE, max(0, end - time.monotonic())))
        if process.exitcode:
            yield "error", f"the process ended with {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def work(pipe: Any, job: Job) -> None:
    os.environ.update(job.environment)
    try:
        for found in job.run(*job.arguments):
            pipe.send(found)
    except Exception:
        pipe.send(("error", traceback.format_exc()))
    pipe.close()


@dataclass
class Findings:
    """What all jobs together have found.

    Attributes:
        timed: see gpu_figures.py.
        results: by key of the row, with the reason where there is none.
        errors: tracebacks.
    """

    machine: str = ""
    timed: dict[str, float] = field(default_factory=dict)
    results: dict[str, Result | str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any) -> None:
        if key == "machine":
            self.machine = value
        elif key == "error":
            self.errors.append(value)
        elif isinstance(value, Result | str):
            self.results[key] = value
        else:
            self.timed[key] = value


def measure(scale: Scale, minutes: float, small: bool) -> Findings:
    end, findings = time.monotonic() + 60 * minutes, Findings()
    qwen, vicuna = (QWEN, VICUNA) if not small else (TINY, TINY_MHA)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        configs = (
            write_model(folder / "qwen", qwen, scale),
            write_model(folder / "vicuna", vicuna, scale),
        )
        for job in jobs(folder, scale, end - SPARE, small):
            if time.monotonic() + job.seconds < end - SPARE:
                for key, value in collect(job, end):
                    print(key, value, file=sys.stderr, flush=True)
                    findings.add(key, value)
    for key, figure in figures(findings.timed, scale, *configs):
        if figure is not None:
            findings.results[key] = figure
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="time for everything")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder to write to")
    parser.add_argument("--small", action="store_true", help="a tiny model on CPU, nothing written")
    parser.add_argument("--blank", action="store_true", help="write tables without measuring")
    args = parser.parse_args()
    scale = SMALL_SCALE if args.small else FULL_SCALE
    table = list(rows(scale, gpu_kernels.names(args.small)))
    if args.blank:
        (args.output / "results-gpu.md").write_text(markdown(None, table, {}))
        return
    if not args.small and not gpu_kernels.available():
        sys.exit(f"No GPU here. {COMMAND} needs one; --small tries everything on CPU.")
    found = measure(scale, args.minutes, args.small)
    for row in table:
        found.results.setdefault(row.key, "failed" if found.errors else OUT_OF_TIME)
    if args.small:
        table = [replace(row, target=None) for row in table]
        print("A small run on CPU with a tiny model: the figures mean nothing.\n")
        print(markdown(f"{found.machine}, small run", table, found.results))
    else:
        text = markdown(found.machine, table, found.results)
        print(text)
        (args.output / "results-gpu.md").write_text(text)
        lines = [as_json(row, found.results[row.key]) for row in table]
        content = {"machine": found.machine, "rows": lines, "timed": found.timed}
        merge(args.output / "results-gpu.json", "gpu-bench", content)
    sys.exit(1 if found.errors else 0)


if __name__ == "__main__":
    main()
