# SPDX-License-Identifier: Apache-2.0
"""Compare policies on the tiny model, by teacher forcing: minutes in place of hours.

    python evaluation/tiny/compare.py CHECKPOINT [--split dev] [--clips 72] [--budgets 0.2,0.1]

Prints a Markdown table: exact match with its 95 % interval, and by task. ``oracle`` chooses by the
attention that the right answer will pay, which no policy can know. Policies are chosen on the clips
of ``--split dev``; those of ``--split test`` are the clips of ``vllm-acckv eval``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forced import Question, Scores, answered_rows, load, record, right
from model import Tiny
from rich.progress import track

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.evaluation.arms import Arm
from vllm_acckv.evaluation.metrics import interval

MERGE_ONLY = {"redistribution": "off", "tau": -1.0, "strict_budget": "entries"}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        scores: in place of what the policy observes.
    """

    label: str
    policy: str
    options: dict[str, Any] = field(default_factory=dict)
    scores: Scores | None = None


CONTROLS = [
    Row("full cache", "full"),
    Row("all video", "drop_audio", {"budget": 1.0}),
    Row("all audio", "drop_video", {"budget": 1.0}),
]
ROWS = [
    Row("random", "random"),
    Row("SnapKV", "snapkv"),
    Row("SnapKV, text protected", "snapkv", {"protect_text": True}),
    Row("SnapKV, text protected, no pooling", "snapkv", {"protect_text": True, "kernel": 1}),
    Row("H2O", "h2o"),
    Row("H2O, text protected", "h2o", {"protect_text": True}),
    Row("LOOK-M", "lookm"),
    Row("AccKV", "acckv", {"strict_budget": "entries"}),
    Row("AccKV, no filter", "acckv", {"strict_budget": "entries", "tau": -1.0}),
    Row("AccKV, visible, no filter", "acckv", {**MERGE_ONLY, "redistribution": "visible"}),
    Row("AccKV, off, no filter", "acckv", MERGE_ONLY),
    Row("AccKV, off, no filter, no focusing", "acckv", {**MERGE_ONLY, "focusing": False}),
    Row("AccKV, off, no filter, by head", "acckv", {**MERGE_ONLY, "head_mode": "head"}),
    Row("what text attends to, by layer", "acckv_plus", {"coverage": 0.0, "head_mode": "layer"}),
    Row("what text attends to, by head", "acckv_plus", {"coverage": 0.0}),
    Row("AccKV+", "acckv_plus"),
    Row("AccKV+, by layer", "acckv_plus", {"head_mode": "layer"}),
    Row("AccKV+, coverage 0.25", "acckv_plus", {"coverage": 0.25}),
    Row("AccKV+, coverage 0.5", "acckv_plus", {"coverage": 0.5}),
    Row("AccKV+, coverage 0.75", "acckv_plus", {"coverage": 0.75}),
    Row("oracle, by layer", "acckv_plus", {"coverage": 0.0, "head_mode": "layer"}, answered_rows),
    Row("oracle", "acckv_plus", {"coverage": 0.0}, answered_rows),
    Row("oracle with coverage", "acckv_plus", {}, answered_rows),
]


def table(model: Tiny, questions: list[Question], budgets: list[float]) -> Iterator[list[str]]:
    """Cells of each row, the head first."""
    tasks = [task for task in tiny_av.TASKS if any(one.task == task for one in questions)]
    yield ["policy", "budget", "KV entries", "exact match", *tasks]
    yield ["---"] * (4 + len(tasks))
    rows = [(row, None) for row in CONTROLS]
    rows += [(row, budget) for budget in budgets for row in ROWS]
    for row, budget in track(rows, "policies"):
        options = row.options if budget is None else {"budget": budget, **row.options}
        found, entries = right(model, questions, Arm(row.policy, options).made(), row.scores)
        mean, low, high = interval([float(one) for one in found])
        by_task = {task: list[bool]() for task in tasks}
        for one, answer in zip(questions, found, strict=True):
            by_task[one.task].append(answer)
        yield [
            row.label,
            "" if budget is None else f"{budget:g}",
            f"{entries:.0f}",
            f"{mean:.3f} ({low:.3f} to {high:.3f})",
            *(f"{sum(several) / len(several):.2f}" for several in by_task.values()),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--clips", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", default="0.2,0.1")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    maker, model = load(arguments.checkpoint)
    questions = record(maker, model, arguments.clips, arguments.split, arguments.seed)
    budgets = [float(one) for one in arguments.budgets.split(",")]
    print(f"{arguments.checkpoint}, {arguments.split}, {len(questions)} questions\n")
    for cells in table(model, questions, budgets):
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
