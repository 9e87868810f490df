# SPDX-License-Identifier: Apache-2.0
"""Does the evaluation measure what it claims to? On the trained model of ``make demo``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic
import pytest
import torch
from rich.console import Console

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.in_hf import InHF
from vllm_acckv.evaluation.metrics import difference, exact
from vllm_acckv.evaluation.presets import need
from vllm_acckv.evaluation.run import evaluate
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.policies.acckv_plus import AccKVPlus
from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout
from vllm_acckv.states import States
from vllm_acckv.tools.demo import MODEL

CLIPS = 10
FULL = Arm("full")


@dataclass(frozen=True)
class Planned(Arm):
    """An arm of a policy that is not for users."""

    given: Policy | None = None

    def made(self) -> Policy:
        assert self.given is not None
        return self.given


def planned(policy: Policy) -> Planned:
    return Planned(policy.name, policy.model_dump(), policy)


class Needed(Policy):
    """Keeps all text, and of the clip what the right answer is about."""

    name: ClassVar[str] = "needed"
    kinds: tuple[int, ...] = (VIDEO, AUDIO)
    second: int | None = None

    def entries(self, layout: Layout, layer: Layer) -> int:
        return int(self._needed(layout).sum())

    def _needed(self, layout: Layout) -> np.ndarray:
        keep: np.ndarray = layout.modalities == TEXT
        for kind in self.kinds:
            (places,) = np.nonzero(layout.modalities == kind)
            each = len(places) // tiny_av.SECONDS
            if self.second is not None:
                places = places[each * self.second : each * (self.second + 1)]
            keep[places] = True
        return keep

    def select(
        self, scores: torch.Tensor, states: States, prompt: Prompt, layer: Layer
    ) -> Selection:
        keep = torch.from_numpy(self._needed(prompt.layout))
        return select_best(keep.float()[None], int(keep.sum()))


class WrongLayer(AccKVPlus):
    """A planted bug: the indices that one layer chose, shifted by one layer's length."""

    name: ClassVar[str] = "wrong_layer"
    _last: list[Selection] = pydantic.PrivateAttr(default_factory=list)

    def select(
        self, scores: torch.Tensor, states: States, prompt: Prompt, layer: Layer
    ) -> Selection:
        self._last.append(super().select(scores, states, prompt, layer))
        return self._last[-1] if layer.index == 0 else self._last[-2]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder = tmp_path_factory.mktemp("clips")
    return tiny_av.load(folder, CLIPS * len(tiny_av.TASKS)).samples


@pytest.fixture(scope="module")
def runner() -> InHF:
    return InHF(str(MODEL), 40)


class Said:
    """Answers of arms, each asked once."""

    def __init__(self, runner: Any, samples: Sequence[Sample]) -> None:
        self.runner, self.samples = runner, samples
        self._known: dict[str, list[Answer]] = {}

    def __call__(self, arm: Arm) -> list[Answer]:
        if arm.name not in self._known:
            self._known[arm.name] = list(self.runner.answer(arm, self.samples))
        return self._known[arm.name]

    def right(self, arm: Arm, task: str | None = None) -> float:
        """Share of right answers, to the questions of one task or to all."""
        return float(np.mean(self.each(arm, task)))

    def each(self, arm: Arm, task: str | None = None) -> list[float]:
        return [
            exact(answer.text, sample.answers)
            for sample, answer in zip(self.samples, self(arm), strict=True)
            if task is None or sample.task == f"tiny-av/{task}"
        ]


@pytest.fixture(scope="module")
def said(runner: InHF, samples: tuple[Sample, ...]) -> Said:
    return Said(runner, samples)


def test_the_model_answers(said: Said) -> None:
    assert said.right(FULL) >= 0.95


def test_what_is_needed_is_enough(said: Said) -> None:
    """An oracle scores like the full cache. (Not in "count": the model seems to count by how
    much attention goes to a colour, which changes without the rest.)"""
    for dropped, tasks in (("drop_video", ("sounds",)), ("drop_audio", ("colours", "shapes"))):
        for task in tasks:
            assert said.right(Arm(dropped), task) >= said.right(FULL, task) - 0.1
    found = []
    for sample in said.samples:
        if need(sample.task) == "both":
            words = f"{sample.question} {sample.answers[0]}".split()
            (number,) = [tiny_av.NUMBERS.index(word) for word in words if word in tiny_av.NUMBERS]
            (answer,) = said.runner.answer(planned(Needed(second=number - 1)), [sample])
            found.append(exact(answer.text, sample.answers))
    assert np.mean(found) >= 0.9


def test_without_it_answers_are_chance(said: Said) -> None:
    assert said.right(Arm("drop_audio"), "sounds") == 0
    for task in ("colours", "shapes", "second"):
        assert said.right(Arm("drop_video"), task) <= 0.1
    for task in ("colours", "shapes", "sounds"):
        assert said.right(Arm("random", {"budget": 0.1}), task) <= 0.2


def test_a_planted_bug_shows(said: Said) -> None:
    honest = Arm("acckv_plus", {"budget": 0.5, "coverage": 0.0})
    wrong = planned(WrongLayer(budget=0.5, coverage=0.0))
    gap = difference(said.each(honest), said.each(wrong))
    assert gap.low > 0, gap


def test_a_rerun_is_the_same(runner: InHF, samples: tuple[Sample, ...], tmp_path: Path) -> None:
    arms = [FULL, Arm("acckv", {"budget": 0.2}), Arm("snapkv", {"budget": 0.1})]
    for name in ("one", "two"):
        evaluate(runner, arms, samples[:14], tmp_path / name, Console(file=StringIO()))
    for file in ("answers.jsonl", "results.json", "results.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_preset_from_a_shell(tmp_path: Path) -> None:
    """In a process that has imported nothing before."""
    script = Path(sys.executable).with_name("vllm-acckv")
    command = [script, "eval", MODEL, "--output", tmp_path, "--preset", "table3", "--runner", "hf"]
    done = subprocess.run([*command, "--questions", "2"], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for said in ("Table 3", "| drop_audio |", "2 questions"):
        assert said in done.stdout
