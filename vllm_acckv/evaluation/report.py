# SPDX-License-Identifier: Apache-2.0
"""Tables of what each arm got right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        tasks: mean of one metric by task.
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
    """Of an arm that has answered all samples.

    Args:
        metric: of the tasks; one that applies to every question.
    """
    given = answers.of(arm.name, [sample.id for sample in samples])
    scored = [scores(one.text, sample) for one, sample in zip(given, samples, strict=True)]
    common = [name for name in scored[0] if all(name in one for one in scored)]
    tasks: dict[str, list[float]] = {}
    for sample, found in zip(samples, scored, strict=True):
        tasks.setdefault(sample.task, []).append(found[metric])
    rejected = [one.rejected for one in given if one.rejected is not None]
    weights = [one.video_weight for one in given if one.video_weight]
    clips = [(sample.video, sample.audio) for sample in samples]
    return Line(
        arm.name,
        len(samples),
        {name: interval([one[name] for one in scored], clusters=clips) for name in common},
        {task: fmean(values) for task, values in tasks.items()},
        fmean(one.entries for one in given),
        fmean(one.tokens for one in given),
        fmean(rejected) if rejected else None,
        tuple(map(fmean, zip(*weights, strict=True))) if weights else (),
    )


def markdown(
    lines: Sequence[Line], metric: str = "exact", refused: Mapping[str, str] | None = None
) -> str:
    """A table of arms, W of each arm that has it, and what each of the others got for itself.

    Args:
        metric: the first of the table.
        refused: why an arm is not in the table, by name.
    """
    refused = refused or {}
    shown = [one for one in lines if one.arm not in refused]
    parts = [_table(shown, metric)] if shown else []
    if weights := [_weights(one) for one in lines if one.video_weight]:
        parts.append("\n".join(weights))
    if refused:
        parts.append("## Not compared")
    for reason in dict.fromkeys(refused.values()):
        alone = [_alone(one, metric) for one in lines if refused.get(one.arm) == reason]
        parts += [reason, "\n".join(alone)]
    return "\n\n".join(parts)


def _table(lines: Sequence[Line], metric: str) -> str:
    """A row for each arm, a column for each metric and, of the first one, for each task."""
    tasks = list(lines[0].tasks)
    others = [name for name in lines[0].metrics if name != metric]
    head = ["arm", "KV entries", "evicted by tau", metric, *others, *map(_short, tasks)]
    rows = [head, ["---"] * len(head)]
    rows += [
        [
            one.arm,
            _size(one),
            _rejected(one),
            _value(one, metric),
            *(f"{one.metrics[name].mean:.3f}" for name in others),
            *(f"{one.tasks[task]:.2f}" for task in tasks),
        ]
        for one in lines
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _alone(one: Line, metric: str) -> str:
    """What an arm got, where nobody reads it beside another."""
    others = [f"{name} {one.metrics[name].mean:.3f}" for name in one.metrics if name != metric]
    tasks = [f"{_short(task)} {value:.2f}" for task, value in one.tasks.items()]
    found = [f"{metric} {_value(one, metric)}", *others, *tasks]
    filtered = f", {_rejected(one)} evicted by tau" if one.rejected is not None else ""
    return f"* {one.arm}: {_size(one)} KV entries{filtered}; {', '.join(found)}"


def _weights(one: Line) -> str:
    values = " ".join(f"{weight:.2f}" for weight in one.video_weight)
    return f"* W of video by layer, {one.arm}: {values}"


def _short(task: str) -> str:
    return task.rpartition("/")[2]


def _size(one: Line) -> str:
    return f"{one.entries:.0f} of {one.tokens:.0f}"


def _rejected(one: Line) -> str:
    return "-" if one.rejected is None else f"{100 * one.rejected:.1f} %"


def _value(one: Line, metric: str) -> str:
    value = one.metrics[metric]
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"
