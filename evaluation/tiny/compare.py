# SPDX-License-Identifier: Apache-2.0
"""Compare policies on tiny models, by teacher forcing: minutes in place of hours.

    python evaluation/tiny/compare.py CHECKPOINT [CHECKPOINT ...] [--split dev] [--clips 72]

Prints Markdown. First, by policy and budget, the share of answers that are right in every word with
its 95 % interval, the share of each model, and of each task. Then, for every policy, how far others
are from it, on the same questions. ``oracle`` chooses by the attention that the right answer will
pay, which no policy can know. Every model is asked about clips of its own: the first about those of
``--seed``, the next about those of the next seed.

Policies are chosen on the clips of ``--split dev``; those of ``--split test`` are the clips of
``vllm-acckv eval``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forced import Question, Scores, alike, answered_rows, clip_rows, load, record, right
from rich.console import Console
from rich.progress import track

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.evaluation.arms import Arm
from vllm_acckv.evaluation.metrics import Interval, difference, interval

MERGE_ONLY = {"redistribution": "off", "tau": -1.0, "strict_budget": "entries"}


CORRECTED = {"preset": "corrected", "budget_scope": "av"}
TOLD = {"coverage": 0.0, "distinct": False}
"""What has the highest score stays, and nothing else."""
HALVES = {"focusing": False, "distinct": False}


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
    Row("AccKV, tau 0.3", "acckv", {"strict_budget": "entries", "tau": 0.3}),
    Row("AccKV, tau 0", "acckv", {"strict_budget": "entries", "tau": 0.0}),
    Row("AccKV, no filter", "acckv", {"strict_budget": "entries", "tau": -1.0}),
    Row("AccKV, corrected", "acckv", {**CORRECTED, "strict_budget": "entries"}),
    Row("AccKV, visible, no filter", "acckv", {**MERGE_ONLY, "redistribution": "visible"}),
    Row("AccKV, off, no filter", "acckv", MERGE_ONLY),
    Row("AccKV, off, tau 0.6", "acckv", {**MERGE_ONLY, "tau": 0.6}),
    Row("AccKV, off, tau 0", "acckv", {**MERGE_ONLY, "tau": 0.0}),
    Row("AccKV, off, no filter, no focusing", "acckv", {**MERGE_ONLY, "focusing": False}),
    Row("AccKV, off, no filter, by head", "acckv", {**MERGE_ONLY, "head_mode": "head"}),
    Row("what text attends to, by layer", "acckv_plus", {**TOLD, "head_mode": "layer"}),
    Row("what text attends to, by head", "acckv_plus", TOLD),
    Row("AccKV+", "acckv_plus"),
    Row("AccKV+, by layer", "acckv_plus", {"head_mode": "layer"}),
    Row("AccKV+, half of each modality", "acckv_plus", {"focusing": False}),
    Row("AccKV+, attention alone", "acckv_plus", {"distinct": False}),
    Row("AccKV+, neither", "acckv_plus", HALVES),
    Row("AccKV+, distances alone", "acckv_plus", {}, alike),
    Row("AccKV+, what the clip attends to", "acckv_plus", HALVES, clip_rows),
    Row("AccKV+, 32 rows of the clip", "acckv_plus", HALVES, partial(clip_rows, rows=32)),
    Row("AccKV+, coverage 0", "acckv_plus", {"coverage": 0.0}),
    Row("AccKV+, coverage 0.5", "acckv_plus", {"coverage": 0.5}),
    Row("oracle, by layer", "acckv_plus", {**TOLD, "head_mode": "layer"}, answered_rows),
    Row("oracle", "acckv_plus", TOLD, answered_rows),
    Row("oracle with coverage", "acckv_plus", {"distinct": False}, answered_rows),
]


REFERENCES = ("AccKV", "AccKV, off, no filter, by head", "AccKV+")
"""Policies that the others are compared with, question by question."""


@dataclass
class Found:
    """What a policy got right with one budget.

    Attributes:
        right: for each model, of each of its questions.
        entries: for each model, KV entries of a prompt in a layer.
    """

    row: Row
    budget: float | None
    right: list[list[bool]] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)

    @property
    def each(self) -> np.ndarray:
        """fp64 ``[questions]`` of all models."""
        return np.concatenate(self.right).astype(np.float64)


def measure(
    folder: Path, split: str, clips: int, seed: int, several: Sequence[Found]
) -> list[Question]:
    """Add what one model finds to each of ``several``; its questions."""
    maker, model = load(folder)
    questions = record(maker, model, clips, split, seed)
    # Not on stdout, which the tables go to.
    for one in track(several, folder.name, console=Console(stderr=True)):
        options = (
            one.row.options if one.budget is None else {"budget": one.budget, **one.row.options}
        )
        policy = Arm(one.row.policy, options).made()
        found, entries = right(model, questions, policy, one.row.scores)
        one.right.append(found)
        one.entries.append(entries)
    return questions


def table(several: Sequence[Found], asked: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """Cells of each row, the head first.

    Args:
        asked: of each question of all models, its task and its clip.
    """
    tasks, clips = np.array([task for task, _ in asked]), [clip for _, clip in asked]
    names = [name for name in tiny_av.TASKS if name in tasks]
    models = range(len(several[0].right))
    each = [f"model {number + 1}" for number in models] if len(models) > 1 else []
    yield ["policy", "budget", "KV entries", "exact match", *each, *names]
    yield ["---"] * (4 + len(each) + len(names))
    for one in several:
        alone = [f"{np.mean(found):.3f}" for found in one.right] if each else []
        yield [
            *_named(one),
            f"{np.mean(one.entries):.0f}",
            _told(interval(one.each, clusters=clips)),
            *alone,
            *(f"{one.each[tasks == name].mean():.2f}" for name in names),
        ]


def differences(several: Sequence[Found], asked: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """Of each reference minus each row: above 0, the reference is better."""
    clips = [clip for _, clip in asked]
    yield ["policy", "budget", *(f"{name} minus it" for name in REFERENCES)]
    yield ["---"] * (2 + len(REFERENCES))
    for one in several:
        cells = _named(one)
        for name in REFERENCES:
            found = [
                other
                for other in several
                if other.row.label == name and one.budget in (None, other.budget)
            ]
            cells.append(
                "; ".join(
                    _told(difference(other.each, one.each, clusters=clips), "+") for other in found
                )
            )
        yield cells


def _named(one: Found) -> list[str]:
    return [one.row.label, "" if one.budget is None else f"{one.budget:g}"]


def _told(value: Interval, sign: str = "") -> str:
    mean, low, high = (f"{number:{sign}.3f}" for number in value)
    return f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="checkpoint")
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--clips", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", default="0.2,0.1")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    budgets = [float(one) for one in arguments.budgets.split(",")]
    several = [Found(row, None) for row in CONTROLS]
    several += [Found(row, budget) for budget in budgets for row in ROWS]
    asked = []
    for number, folder in enumerate(arguments.checkpoints):
        questions = measure(
            folder, arguments.split, arguments.clips, arguments.seed + number, several
        )
        asked += [(one.task, f"{number} {one.clip}") for one in questions]
    print(f"{arguments.split}, {len(asked)} questions:")
    for number, folder in enumerate(arguments.checkpoints):
        print(f"* model {number + 1}: {folder.name}")
    for made in (table, differences):
        print()
        for cells in made(several, asked):
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
