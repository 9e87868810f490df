# SPDX-License-Identifier: Apache-2.0
"""The evaluation itself: is a right answer counted, a wrong one not, and nothing asked twice?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.run import evaluate
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.tools import tiny_model

ARMS = [Arm("full"), Arm("snapkv", {"budget": 0.2}), Arm("random", {"budget": 0.2})]


class Knowing:
    """Answers right under ``full``, half of the time under ``snapkv``, never under ``random``."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked = 0
        self.stop_after = stop_after

    def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
        for sample in samples:
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            number = int(sample.id.rpartition("-")[2])
            right = {"full": True, "snapkv": number % 2 == 0, "random": False}[arm.policy]
            text = sample.answers[0] if right else "it is nothing"
            entries = {"full": 300.0, "snapkv": 60.0, "random": 61.0}[arm.policy]
            yield Answer(sample.id, arm.name, text, entries, 300)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    folder = tmp_path_factory.mktemp("clips")
    return tiny_av.load(folder, 28).samples


def test_what_is_right_counts(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    lines = evaluate(Knowing(), ARMS, samples, tmp_path, Console(file=StringIO()))
    exact = [line.metrics["exact"].mean for line in lines]
    half = sum(int(one.id.rpartition("-")[2]) % 2 == 0 for one in samples) / len(samples)
    assert exact == [1.0, pytest.approx(half), 0.0]
    assert lines[0].metrics["rouge_l"].mean == pytest.approx(1.0)
    assert lines[2].metrics["rouge_l"].mean < 0.5
    assert set(lines[0].tasks) == {f"tiny-av/{task}" for task in tiny_av.TASKS}
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [one["arm"] for one in stored] == [arm.name for arm in ARMS]
    assert "Not comparable" not in (tmp_path / "results.md").read_text()


def test_stopped_it_goes_on(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    console = Console(file=StringIO())
    with pytest.raises(KeyboardInterrupt):
        evaluate(Knowing(stop_after=40), ARMS, samples, tmp_path, console)
    rest = Knowing()
    lines = evaluate(rest, ARMS, samples, tmp_path, console)
    assert rest.asked == len(ARMS) * len(samples) - 40
    assert lines == evaluate(Knowing(), ARMS, samples, tmp_path / "whole", console)


def test_unequal_sizes_are_said(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    class Greedy(Knowing):
        def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
            for one in super().answer(arm, samples):
                more = 30 if arm.policy == "random" else 0
                yield Answer(one.sample, one.arm, one.text, one.entries + more, one.tokens)

    evaluate(Greedy(), ARMS, samples, tmp_path, Console(file=StringIO()))
    told = (tmp_path / "results.md").read_text()
    assert "Not comparable: random budget=0.2 keeps 91.0 entries and snapkv budget=0.2 60.0" in told


def test_command_through_vllm(tmp_path: Path) -> None:
    """A model of random weights, so every answer is wrong; sizes and counts are real."""
    model = tiny_model.build(
        tmp_path / "model", min_pixels=tiny_av.SIZE**2, max_pixels=tiny_av.SIZE**2
    )
    code = "from vllm_acckv.tools.cli import main; main()"
    command = [sys.executable, "-c", code, "eval", str(model), "--output", str(tmp_path / "out")]
    command += ["--policies", "full,acckv,random", "--budgets", "0.2", "--questions", "14"]
    done = subprocess.run([*command, "--max-tokens", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    full, acckv, random = json.loads((tmp_path / "out" / "results.json").read_text())
    assert full["entries"] == full["tokens"] > 290
    assert random["entries"] < 0.5 * full["tokens"] and acckv["entries"] <= random["entries"] + 32
    assert len(acckv["video_weight"]) == 4 and 0 < acckv["rejected"] <= 1
    assert {one["questions"] for one in (full, acckv, random)} == {14}
