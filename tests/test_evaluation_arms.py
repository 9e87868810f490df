# SPDX-License-Identifier: Apache-2.0
"""What an evaluation compares, and the file of its answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation.arms import Answer, Answers, Arm, grid, unequal


def test_grid() -> None:
    arms = grid(["full", "acckv", "snapkv"], [0.2, 0.1], [0.6, 0.9])
    assert [arm.name for arm in arms] == [
        "full",
        "acckv budget=0.2 tau=0.6",
        "acckv budget=0.2 tau=0.9",
        "acckv budget=0.1 tau=0.6",
        "acckv budget=0.1 tau=0.9",
        "snapkv budget=0.2",
        "snapkv budget=0.1",
    ]
    assert [arm.name for arm in grid(["acckv"], [0.5])] == ["acckv budget=0.5"]
    with pytest.raises(KVPolicyError):
        grid(["acckv"], [0.2], [7.0])


def test_a_request_means_the_same_policy() -> None:
    arm = Arm("acckv", {"budget": 0.3, "head_mode": "head", "tau": 0.5, "redistribution": "off"})
    request = arm.request()
    assert request.pop("kv_policy") == "acckv"
    options = json.loads(request.pop("kv_policy_config"))
    options |= {key.removeprefix("kv_"): value for key, value in request.items()}
    assert Arm("acckv", options).made() == arm.made()
    assert Arm("full").request() == {"kv_policy": "full"}


def test_answers_are_kept(tmp_path: Path) -> None:
    """And a crash in the middle of one costs that one."""
    path = tmp_path / "answers.jsonl"
    given = [Answer(f"s{n}", "full", f"text {n}\n", 9.5, 12, None, (0.25, 0.5)) for n in range(3)]
    Answers(path).add(given)
    with path.open("a") as file:
        file.write('{"sample": "s3", "arm')
    again = Answers(path)
    assert list(again) == given and len(again) == 3
    assert again.missing("full", ["s0", "s3", "s2"]) == ["s3"]
    assert again.missing("acckv", ["s0"]) == ["s0"]
    again.add([Answer("s3", "full", "", 1.0, 2)])
    assert Answers(path).of("full", ["s3", "s0"]) == [Answer("s3", "full", "", 1.0, 2), given[0]]


@pytest.mark.parametrize("line", ["{}", "[1]", "nonsense", '{"sample": "a"}'])
def test_a_line_that_is_no_answer(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path).add([Answer("s0", "full", "", 1.0, 2)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(KVPolicyError) as raised:
        Answers(path)
    assert str(raised.value) == (
        f"{path}, line 2 is no answer of vllm-acckv eval; remove the line or choose another folder."
    )


def test_unequal_sizes_are_not_compared() -> None:
    assert unequal({"full": 300.0, "a": 60.0, "b": 65.0}, 300.0) is None
    assert unequal({"full": 300.0, "a": 60.0}, 300.0) is None
    assert unequal({"a b=1": 60.0, "c": 90.0, "d": 70.0}, 300.0) == (
        "c keeps 90.0 entries and a b=1 60.0 of 300.0: compare them at budgets that make equal "
        "sizes, or each with itself."
    )
