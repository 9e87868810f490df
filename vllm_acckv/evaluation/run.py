# SPDX-License-Identifier: Apache-2.0
"""Ask every arm every question, write down what it says, and say how right it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_acckv.evaluation.arms import Answer, Answers, Arm, unequal
from vllm_acckv.evaluation.report import Line, line, markdown
from vllm_acckv.evaluation.samples import Sample


class Answerer(Protocol):
    """Whoever runs the model."""

    def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
        """In the order of ``samples``."""


def evaluate(
    answerer: Answerer,
    arms: Sequence[Arm],
    samples: Sequence[Sample],
    output: Path,
    console: Console,
    metric: str = "exact",
    allow_unequal: bool = False,
) -> list[Line]:
    """Ask what ``answers.jsonl`` in ``output`` does not hold yet, and write ``results.json`` and
    ``results.md`` beside it.

    Args:
        metric: the first in the table, and that of its tasks.
        allow_unequal: put arms of unequal size into one table; otherwise each stands for itself.

    Raises:
        KVPolicyError: for a line in that file that is no answer.
    """
    output.mkdir(parents=True, exist_ok=True)
    answers = Answers(output / "answers.jsonl")
    of_id = {sample.id: sample for sample in samples}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        for arm in arms:
            left = [of_id[name] for name in answers.missing(arm.name, of_id)]
            task = bar.add_task(arm.name, total=len(of_id), completed=len(of_id) - len(left))

            def told(given: Iterable[Answer], task: int = task) -> Iterator[Answer]:
                for one in given:
                    yield one
                    bar.advance(task)  # type: ignore[arg-type]

            answers.add(told(answerer.answer(arm, left)))
    lines = [line(arm, samples, answers, metric) for arm in arms]
    refused = refusals(lines)
    if allow_unequal:
        warnings = [f"Not comparable: {reason}" for reason in dict.fromkeys(refused.values())]
        table = "\n\n".join([markdown(lines, metric), *warnings])
    else:
        table = markdown(lines, metric, refused)
    (output / "results.json").write_text(json.dumps([asdict(one) for one in lines], indent=1))
    (output / "results.md").write_text(table + "\n", "utf-8")
    return lines


def refusals(lines: Sequence[Line]) -> dict[str, str]:
    """Arms that must not be compared, with the reason: all of a budget of which two differ too much
    in size, be it because AccKV's filter dropped tokens."""
    by_budget: dict[str, dict[str, float]] = {}
    for one in lines:
        words = [part for part in one.arm.split() if part.startswith(("budget=", "budget_scope="))]
        by_budget.setdefault(" ".join(words), {})[one.arm] = one.entries
    return {
        arm: reason
        for sizes in by_budget.values()
        if (reason := unequal(sizes, lines[0].tokens))
        for arm in sizes
        if arm.split()[0] != "full"
    }
