# SPDX-License-Identifier: Apache-2.0
"""Tables of what each arm got right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vllm_acckv.evaluation.arms import Answers, Arm
from vllm_acckv.evaluation.metrics import Interval, interval, scores
from vllm_acckv.evaluation.samples import Sample


@dataclass(frozen=True)
class Line:
    """One arm over all questions.

    Attributes:
        metrics: mean and 95 % interval of each metric that applies to every question.
        tasks: mean of the first metric by task.
        entries: KV entries of a prompt, per layer and head; tokens: of it uncompressed.
        rejected: share of the tokens looked at that AccKV's filter dropped.
        video_weight: mean W of each layer.
    """

    arm: str
    questions: int
    metrics: dict[str, Interval]
    tasks: dict[str, float]
    entries: float
    tokens: float
    rejected: float | None
    video_weight: tuple[float, ...]


def line(arm: Arm, samples: Sequence[Sample], answers: Answers, metric: str = "exact") -> Line:
    """Of an arm that has answered all samples."""
    given = answers.of(arm.name, [sample.id for sample in samples])
    scored = [scores(one.text, sample) for one, sample in zip(given, samples, strict=True)]
    common = [name for name in scored[0] if all(name in one for one in scored)]
    tasks: dict[str, list[float]] = {}
    for sample, found in zip(samples, scored, strict=True):
        tasks.setdefault(sample.task, []).append(found[metric])
    rejected = [one.rejected for one in given if one.rejected is not None]
    weights = [one.video_weight for one in given if one.video_weight]
    return Line(
        arm.name,
        len(samples),
        {name: interval([one[name] for one in scored]) for name in common},
        {task: fmean(values) for task, values in tasks.items()},
        fmean(one.entries for one in given),
        fmean(one.tokens for one in given),
        fmean(rejected) if rejected else None,
        tuple(map(fmean, zip(*weights, strict=True))) if weights else (),
    )


def markdown(lines: Sequence[Line], metric: str = "exact") -> str:
    """A table: a row for each arm, a column for each task."""
    tasks = list(lines[0].tasks)
    others = [name for name in lines[0].metrics if name != metric]
    head = ["arm", "KV entries", metric, *others, *(task.rpartition("/")[2] for task in tasks)]
    rows = [head, ["---"] * len(head)]
    for one in lines:
        value = one.metrics[metric]
        rows.append(
            [
                one.arm,
                f"{one.entries:.0f} of {one.tokens:.0f}",
                f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})",
                *(f"{one.metrics[name].mean:.3f}" for name in others),
                *(f"{one.tasks[task]:.2f}" for task in tasks),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
