# SPDX-License-Identifier: Apache-2.0
"""The tables of the paper as arms, and our lines beside the paper's rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from vllm_acckv.evaluation import mvbench, paper, tiny_av
from vllm_acckv.evaluation.arms import Arm
from vllm_acckv.evaluation.metrics import Interval
from vllm_acckv.evaluation.presets import NEEDS, PRESETS, Preset, Row, need
from vllm_acckv.evaluation.report import Line
from vllm_acckv.policies.base import Layer
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout

TINY = [f"tiny-av/{task}" for task in tiny_av.TASKS]
# A prompt about a clip of tiny_av: 8 seconds of 9 pictures' tokens, and 25 of sound.
CLIP = Layout(np.repeat(np.array([TEXT, VIDEO, AUDIO, TEXT], np.int8), [16, 72, 200, 20]))
over_presets = pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda one: one.name)


def line(
    arm: Arm,
    entries: float = 100,
    tasks: Mapping[str, float] | None = None,
    value: float = 0.5,
    rejected: float | None = None,
) -> Line:
    around = Interval(value, value - 0.1, value + 0.1)
    if arm.policy == "full":
        entries = 300
    metrics = {"rouge_l": around, "rouge_1": around, "exact": around}
    shown = dict.fromkeys(TINY, value) if tasks is None else dict(tasks)
    return Line(arm.name, 70, metrics, shown, entries, 300, rejected, ())


def lines(preset: Preset, **options: Any) -> list[Line]:
    """Of all arms, each with other values."""
    return [
        line(arm, value=0.2 + number / 100, **options) for number, arm in enumerate(preset.arms(6))
    ]


def cells(text: str) -> list[dict[str, str]]:
    """Rows of the table in Markdown."""
    head, _, *rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in text.splitlines()
        if row.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


# Arms


@pytest.mark.parametrize("num_layers", [2, 4, 6, 28, 48])
@over_presets
def test_arms_are_policies_of_the_model(preset: Preset, num_layers: int) -> None:
    arms = preset.arms(num_layers)
    assert len({arm.name for arm in arms}) == len(arms) == len(preset.rows)
    for arm in arms:
        arm.made().check(num_layers)
    assert [preset.rows[number].is_of(line(arm)) for number, arm in enumerate(arms)] == (
        [True] * len(arms)
    )


@over_presets
def test_a_row_is_of_one_arm_only(preset: Preset) -> None:
    for one in lines(preset):
        assert sum(row.is_of(one) for row in preset.rows) == 1


def test_arms_of_the_first_tables() -> None:
    assert [arm.name for arm in PRESETS["table1"].arms(28)] == [
        "full",
        "drop_audio first_layer=14",
        "drop_video first_layer=14",
    ]
    assert [arm.name for arm in PRESETS["table2"].arms(28)] == [
        "full",
        *(f"cross_merge budget=0.2 unimportant={way}" for way in ("evict", "pooled", "nearest")),
    ]
    assert [arm.name for arm in PRESETS["table3"].arms(28)] == ["full", "drop_audio", "drop_video"]


def test_arms_of_the_comparisons() -> None:
    names = [arm.name for arm in PRESETS["table4"].arms(28)]
    assert names[1:7] == [
        "h2o budget=0.2",
        "snapkv budget=0.2",
        "lookm budget=0.2",
        "fastv budget=0.2 equalize=True first_pruned_layer=2",
        "acckv budget=0.2 strict_budget=entries tau=0.9",
        "acckv budget=0.2 strict_budget=entries tau=0.6",
    ]
    assert names[7:] == [name.replace("budget=0.2", "budget=0.1") for name in names[1:7]]
    scopes = [arm.options.get("budget_scope") for arm in PRESETS["table5"].arms(28)]
    assert scopes == [None, *["av"] * 12, *["total"] * 12]
    sizes = [arm.options["budget"] for arm in PRESETS["table5"].arms(28)[1:]]
    assert sizes == ([160] * 6 + [120] * 6) * 2


def test_arms_of_the_ablation() -> None:
    policies: list[Any] = [arm.made() for arm in PRESETS["table6"].arms(28)]
    switches = [(one.redistribution, one.focusing, one.calibration) for one in policies]
    assert switches == [
        ("paper", True, True),
        ("paper", True, False),
        ("paper", False, False),
        ("off", False, False),
    ]
    assert all(arm.options["budget"] == 0.2 for arm in PRESETS["table6"].arms(28))


@pytest.mark.parametrize("num_layers", [6, 28])
@pytest.mark.parametrize("name", ["table2", "table4", "table5", "table6"])
def test_sizes_of_one_budget_are_equal(name: str, num_layers: int) -> None:
    """As far as they are known from the prompt: behind that comes AccKV's filter."""
    preset = PRESETS[name]
    sizes: dict[str, list[float]] = {}
    for row, arm in zip(preset.rows, preset.arms(num_layers), strict=True):
        if arm.options.get("equalize") is False:
            # FastV's one full layer of six is more than 10 %.
            assert (name, num_layers, row.budget) == ("table4", 6, "10 %")
            continue
        policy = arm.made()
        layers = [policy.entries(CLIP, Layer(index, num_layers)) for index in range(num_layers)]
        sizes.setdefault(row.budget, []).append(fmean(layers))
    for budget, found in sizes.items():
        assert max(found) - min(found) <= 1, budget


def test_needs_are_those_of_the_questions() -> None:
    rng = np.random.default_rng(0)
    clip = tiny_av.make_clip(rng)
    for task in tiny_av.TASKS:
        needs = tiny_av.ask(clip, rng, task).needs
        kind = "both" if len(needs) == 2 else min(needs)
        assert need(f"tiny-av/{task}") == kind
    assert {task for tasks in NEEDS.values() for task in tasks} == set(tiny_av.TASKS)
    assert need("mvbench/count") == "mvbench/count" and need("avsd") == "avsd"


# The paper's figures


def test_figures_are_complete() -> None:
    for table in (paper.TABLE_1, paper.TABLE_2, paper.TABLE_3):
        assert all(len(row) == len(paper.TASKS) for row in table.values())
    policies = ["H2O", "SnapKV", "LOOK-M", "FastV", "AccKV, τ = 0.9", "AccKV, τ = 0.6"]
    for groups in (paper.TABLE_4, paper.TABLE_5):
        full, *others = groups.values()
        assert list(full) == ["Full Cache"] and [list(one) for one in others] == [policies] * 2
        rows = [row for group in groups.values() for row in group.values()]
        assert all(len(row) == 11 and all(0 <= one < 1 for one in row) for row in rows)
    shorts = [task.short for task in mvbench.TASKS.values()]
    assert [*shorts, "AVSD"] == [*paper.BENCHMARKS]
    # The ablation's first row is that of Table 4.
    assert paper.TABLE_6["111"] == paper.TABLE_4["20 %"]["AccKV, τ = 0.9"][-1]


# Rendering


@over_presets
def test_every_row_is_there(preset: Preset) -> None:
    given = lines(preset)
    text = preset.render(given, "a model", "tiny-av")
    table = cells(text)
    assert [row["row"] for row in table] == [row.label for row in preset.rows]
    assert [row["arm"] for row in table] == [one.arm for one in given]
    for row, one, shown in zip(preset.rows, given, table, strict=True):
        assert shown["KV entries"] == f"{one.entries:.1f} of 300.0"
        assert shown["saved"] == ("0.0 %" if one.arm == "full" else "66.7 %")
        mean, low, high = one.metrics["exact"]
        assert shown["exact match"] == f"{mean:.3f} ({low:.3f} to {high:.3f})" == shown["ROUGE-L"]
        assert_figures(preset, row, shown)
    assert "a model on tiny-av, 70 questions" in text
    assert preset.model in text and "compare the order of rows, not figures" in text
    assert all(note in text for note in preset.notes)
    assert "Unequal" not in text


def assert_figures(preset: Preset, row: Row, shown: Mapping[str, str]) -> None:
    if preset.columns == paper.BENCHMARKS:
        assert shown["paper, mean of 11 columns"] == f"{fmean(row.figures):.3f}"
        return
    for column, figure in zip(preset.columns, row.figures, strict=True):
        assert shown[f"paper, {column}"] == f"{figure:.3f}"


def test_tasks_are_grouped_by_what_they_need() -> None:
    preset = PRESETS["table3"]
    tasks = {"sounds": 0.1, "colours": 0.2, "shapes": 0.3, "count": 0.7, "see": 0.4, "second": 0.6}
    given = lines(preset, tasks={f"tiny-av/{task}": value for task, value in tasks.items()})
    for shown in cells(preset.render(given, "m", "tiny-av")):
        needs = shown["needs audio"], shown["needs video"], shown["needs both"]
        assert needs == ("0.100", "0.400", "0.500")


@pytest.mark.parametrize("name", ["table4", "table5"])
def test_columns_of_mvbench(name: str) -> None:
    preset = PRESETS[name]
    tasks = {f"mvbench/{task}": number / 100 for number, task in enumerate(mvbench.TASKS)}
    text = preset.render(lines(preset, tasks=tasks), "m", "mvbench", metric="rouge_l")
    for row, shown in zip(preset.rows, cells(text), strict=True):
        for number, column in enumerate(paper.BENCHMARKS[:-1]):
            assert shown[column] == f"{number / 100:.3f} ({row.figures[number]:.3f})"
        assert not any("paper" in column for column in shown)
    assert "Columns of MVBench's tasks: our ROUGE-L, the paper's figure in brackets." in text


@pytest.mark.parametrize("name", ["table4", "table5", "table6"])
def test_column_of_avsd(name: str) -> None:
    preset = PRESETS[name]
    text = preset.render(lines(preset, tasks={"avsd": 0.4}), "m", "avsd")
    for row, shown in zip(preset.rows, cells(text), strict=True):
        assert shown["paper, AVSD"] == f"{row.figures[-1]:.3f}"
        assert "paper, mean of 11 columns" not in shown


def test_the_filter_has_a_column_where_it_ran() -> None:
    preset = PRESETS["table4"]
    given = [line(arm, rejected=0.25 if arm.policy == "acckv" else None) for arm in preset.arms(6)]
    for shown in cells(preset.render(given, "m", "tiny-av")):
        assert shown["evicted by tau"] == ("25.0 %" if shown["arm"].startswith("acckv") else "-")
    assert "evicted by tau" not in PRESETS["table1"].render(lines(PRESETS["table1"]), "m", "d")


def test_unequal_sizes_are_said_by_budget() -> None:
    preset = PRESETS["table4"]
    given = [
        line(arm, entries=150 if arm.policy == "fastv" and arm.options["budget"] == 0.1 else 100)
        for arm in preset.arms(6)
    ]
    found = re.findall(r"Unequal sizes at (.*?): (.*) keeps", preset.render(given, "m", "d"))
    assert found == [("10 %", "fastv budget=0.1 equalize=False first_pruned_layer=1")]
    first = PRESETS["table1"]
    whole = [line(arm, entries=120.0 + 60 * n) for n, arm in enumerate(first.arms(6))]
    assert "Unequal sizes: drop_video first_layer=3 keeps 240.0" in first.render(whole, "m", "d")


def test_what_did_not_run_and_what_stands_for_no_row() -> None:
    preset = PRESETS["table2"]
    some = [lines(preset)[2], line(Arm("random", {"budget": 0.2}))]
    table = cells(preset.render(some, "m", "tiny-av"))
    assert [row["arm"] for row in table] == [
        "did not run",
        "did not run",
        some[0].arm,
        "did not run",
        some[1].arm,
    ]
    assert table[0]["paper, Audio Task"] == "0.700" and table[0]["needs audio"] == "-"
    assert table[-1]["row"] == table[-1]["paper, Audio Task"] == "-"
    with pytest.raises(ValueError, match="no lines to render table2"):
        preset.render([], "m", "d")


def test_figures_of_another_depth_are_found() -> None:
    preset = PRESETS["table1"]
    given = [line(arm) for arm in preset.arms(28)]
    assert "did not run" not in preset.render(given, "m", "d")
