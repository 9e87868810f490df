# SPDX-License-Identifier: Apache-2.0
"""Pictures: what they say, that they are the same each time, and what cannot be drawn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation import plots
from vllm_acckv.evaluation.arms import Arm, grid
from vllm_acckv.evaluation.metrics import Interval
from vllm_acckv.evaluation.report import Line


def line(arm: Arm, mean: float = 0.5) -> Line:
    acckv = arm.policy == "acckv"
    return Line(
        arm.name,
        70,
        {"exact": Interval(mean, mean - 0.1, mean + 0.05)},
        {},
        80,
        300,
        arm.options["budget"] if acckv else None,
        (0.2, mean, 0.6) if acckv else (),
    )


def lines() -> list[Line]:
    arms = grid(["full", "acckv", "snapkv", "h2o"], [0.1, 0.2, 0.4], [0.6, 0.9])
    return [line(arm, 0.4 + number / 50) for number, arm in enumerate(arms)]


def groups() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1, 1, 1], 4).T.tolist()
    return {
        name: {
            "samples": 3,
            "shares": dict(zip(("text", "video", "audio"), shares, strict=True)),
            "tokens": {"video": rng.uniform(size=(4, 9)).tolist(), "audio": audio},
        }
        for name, audio in (("see", rng.uniform(size=(4, 5)).tolist()), ("look", []))
    }


DRAWN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "quality": (
        lambda path: plots.quality(lines(), path),
        [
            "budget, share of tokens",
            "exact match, 95 % interval",
            "full",
            "acckv tau=0.6",
            "acckv tau=0.9",
            "snapkv",
            "h2o",
        ],
    ),
    "weights": (
        lambda path: plots.weights(lines(), path),
        ["layer", "W of video, 1 - W of audio", "acckv budget=0.1 tau=0.6"],
    ),
    "rejected": (
        lambda path: plots.rejected(lines(), path),
        ["threshold τ", "share evicted by the filter", "acckv budget=0.1", "acckv budget=0.4"],
    ),
    "attention": (
        lambda path: plots.attention(groups(), path),
        ["share of attention", "see, 3 prompts", "look, 3 prompts", "video", "audio", "text"],
    ),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_equal_lines_make_equal_bytes(tmp_path: Path, name: str, suffix: str) -> None:
    draw, labels = DRAWN[name]
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"
    draw(first)
    draw(second)
    content = first.read_bytes()
    assert content == second.read_bytes() and len(content) > 5000
    if suffix == "svg":
        text = content.decode()
        assert all(f">{label}<" in text for label in labels)
        assert "<dc:date>" not in text and "matplotlib.org" not in text
    else:
        assert content.startswith(b"\x89PNG")


def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    """Python's hashes of text differ between processes."""
    here, there = tmp_path / "here.svg", tmp_path / "there.svg"
    DRAWN["quality"][0](here)
    code = "import sys; from pathlib import Path; from tests.test_evaluation_plots import DRAWN; "
    code += "DRAWN['quality'][0](Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(there)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    assert here.read_bytes() == there.read_bytes()


def test_equal_weights_are_one_line(tmp_path: Path) -> None:
    """Budget and threshold do not change W."""
    same = [line(arm) for arm in grid(["acckv"], [0.1, 0.2], [0.6, 0.9])]
    plots.weights(same, tmp_path / "weights.svg")
    text = (tmp_path / "weights.svg").read_text()
    assert ">acckv budget=0.1 tau=0.6 and 3 more<" in text


def test_numbers_of_tokens(tmp_path: Path) -> None:
    counted = [line(arm) for arm in grid(["snapkv"], [120, 160])]
    plots.quality(counted, tmp_path / "quality.svg")
    text = (tmp_path / "quality.svg").read_text()
    assert ">budget, tokens<" in text and ">120<" in text and ">160<" in text
    with pytest.raises(KVPolicyError, match="ratios and some numbers of tokens"):
        plots.quality([*counted, *lines()], tmp_path / "mixed.svg")


def test_one_budget_is_enough(tmp_path: Path) -> None:
    plots.quality([line(arm) for arm in grid(["h2o"], [0.2])], tmp_path / "quality.png")
    assert (tmp_path / "quality.png").exists()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (plots.quality, "No arm to be drawn says its budget"),
        (plots.weights, "No arm weighs modalities"),
        (plots.rejected, "No arm to be drawn says its tau"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, draw: Any, message: str) -> None:
    with pytest.raises(KVPolicyError, match=message):
        draw([line(Arm("full"))], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vllm-acckv\[eval\]'"):
        plots.quality(lines(), tmp_path / "quality.svg")
