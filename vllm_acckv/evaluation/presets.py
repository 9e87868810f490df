# SPDX-License-Identifier: Apache-2.0
"""The tables of the AccKV paper: which arms stand for their rows, and both side by side.

The paper's figures stand beside ours for comparison of orders, not of values: its models, data,
prompts and metric are others, or not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from vllm_acckv.evaluation import mvbench, paper
from vllm_acckv.evaluation.arms import Arm, unequal
from vllm_acckv.evaluation.report import Line

NEEDS = {
    "audio": ("sounds",),
    "video": ("colours", "shapes", "count"),
    "both": ("second", "see", "hear"),
}
"""Tasks of tiny-av by what they cannot be answered without."""
METRICS = {"exact": "exact match", "accuracy": "accuracy", "rouge_l": "ROUGE-L"}
# Options that follow from the number of layers, which an arm's name does not tell.
_BY_DEPTH = ("first_layer", "first_pruned_layer", "equalize")

ByDepth = Callable[[int], Mapping[str, Any]]
"""Options for a model of so many layers."""


def need(task: str) -> str:
    """What a question of a task needs: ``audio``, ``video`` or ``both`` for those of tiny-av, else
    the task itself."""
    data, _, name = task.rpartition("/")
    kinds = (kind for kind, names in NEEDS.items() if name in names)
    return next(kinds, task) if data == "tiny-av" else task


@dataclass(frozen=True)
class Row:
    """An arm, and the row of the paper that it stands for.

    Attributes:
        label: what the row shows, in the paper's words where it has it.
        policy, options: of the arm.
        figures: the paper's, by column.
        budget: what it may keep; rows of equal budget should have equal sizes.
        by_depth: further options, by the number of layers.
    """

    label: str
    policy: str
    options: Mapping[str, Any]
    figures: tuple[float, ...]
    budget: str = ""
    by_depth: ByDepth | None = None

    def arm(self, num_layers: int) -> Arm:
        more = self.by_depth(num_layers) if self.by_depth else {}
        return Arm(self.policy, {**self.options, **more})

    def is_of(self, line: Line) -> bool:
        """Whether the line is of this arm, on a model of any depth."""
        parts = line.arm.split()
        left = [part for part in parts if part.partition("=")[0] not in _BY_DEPTH]
        return " ".join(left) == Arm(self.policy, self.options).name


@dataclass(frozen=True)
class Preset:
    """A table of the paper.

    Attributes:
        name, title: such as ``table4``, and what the table is about.
        columns: of the paper.
        rows: in the order of the paper.
        notes: sentences on what was chosen.
        model: the paper's.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    model: str = "VideoLLaMA2"

    def arms(self, num_layers: int) -> list[Arm]:
        """
        Raises:
            KVPolicyError: for a model that has too few layers for one of them.
        """
        arms = [row.arm(num_layers) for row in self.rows]
        for arm in arms:
            arm.made().check(num_layers)
        return arms

    def render(self, lines: Sequence[Line], model: str, data: str, metric: str = "exact") -> str:
        """Markdown: a table of our rows beside the paper's, what ran, and what is unequal.

        A row that did not run stands there with the paper's figures; a line that stands for no row
        comes last, without.

        Args:
            lines: of some or all arms, over the same questions.
            model, data: names of them.
            metric: the one whose means by task the lines hold.

        Raises:
            ValueError: without lines.
        """
        if not lines:
            raise ValueError(f"There are no lines to render {self.name} with.")
        pairs = [
            (row, next((line for line in lines if row.is_of(line)), None)) for row in self.rows
        ]
        others = [line for line in lines if not any(line is mine for _, mine in pairs)]
        filters = any(line.rejected is not None for line in lines)
        table = [
            {
                "row": row.label if row else "-",
                **_measured(line, filters),
                **_found(line, lines[0]),
                **self._by_column(row, line, lines[0]),
            }
            for row, line in [*pairs, *((None, line) for line in others)]
        ]
        said = [
            f"Ours: {model} on {data}, {lines[0].questions} questions; means with 95 % intervals.",
            f"Paper: {self.model}, {', '.join(self.columns)}, a ROUGE that it does not name. "
            "Another model, and other data unless columns have the same name: compare the order of "
            "rows, not figures.",
            *self.notes,
            *_sizes(pairs),
        ]
        if self.columns == paper.BENCHMARKS and any(map(_short, lines[0].tasks)):
            ours = METRICS.get(metric, metric)
            said.append(f"Columns of MVBench's tasks: our {ours}, the paper's figure in brackets.")
        listed = "\n".join(f"* {sentence}" for sentence in said)
        return f"## {self.title}\n\n{_markdown(table)}\n\n{listed}\n"

    def _by_column(self, row: Row | None, line: Line | None, like: Line) -> dict[str, str]:
        """Our means by task where the paper has such columns, and the paper's figures."""
        figures = dict(zip(self.columns, row.figures, strict=True)) if row else {}
        tasks = line.tasks if line else {}
        if self.columns == paper.TASKS:
            cells = {
                f"needs {kind}": _mean(tasks[task] for task in tasks if need(task) == kind)
                for kind in NEEDS
                if kind in map(need, like.tasks)
            }
            return cells | {f"paper, {name}": _one(figures.get(name)) for name in self.columns}
        if self.columns == paper.BENCHMARKS:
            known = {short: task for task in like.tasks if (short := _short(task))}
            if known:
                return {
                    short: f"{_one(tasks.get(task))} ({_one(figures.get(short))})"
                    for short, task in known.items()
                }
            if "avsd" not in like.tasks:
                return {f"paper, mean of {len(self.columns)} columns": _mean(figures.values())}
        return {"paper, AVSD": _one(figures.get("AVSD"))}


def _short(task: str) -> str | None:
    """The paper's name for a task of MVBench, ``None`` for any other."""
    data, _, name = task.rpartition("/")
    return mvbench.TASKS[name].short if data == "mvbench" and name in mvbench.TASKS else None


def _sizes(pairs: Sequence[tuple[Row, Line | None]]) -> Iterator[str]:
    """A sentence for every budget whose arms differ in size too much to be compared."""
    for budget in dict.fromkeys(row.budget for row, _ in pairs):
        ran = [line for row, line in pairs if line is not None and row.budget == budget]
        if ran and (reason := unequal({one.arm: one.entries for one in ran}, ran[0].tokens)):
            yield f"Unequal sizes{f' at {budget}' if budget else ''}: {reason}"


# Cells


def _one(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Iterable[float]) -> str:
    found = [*values]
    return _one(fmean(found) if found else None)


def _measured(line: Line | None, filters: bool) -> dict[str, str]:
    """What was kept, with a cell for what AccKV's filter evicted if it ran in any arm."""
    cells = {"arm": "did not run", "KV entries": "-", "saved": "-"}
    if line is not None:
        cells = {
            "arm": line.arm,
            "KV entries": f"{line.entries:.1f} of {line.tokens:.1f}",
            "saved": f"{100 - 100 * line.entries / line.tokens:.1f} %",
        }
    if filters:
        evicted = None if line is None else line.rejected
        cells["evicted by tau"] = "-" if evicted is None else f"{100 * evicted:.1f} %"
    return cells


def _found(line: Line | None, like: Line) -> dict[str, str]:
    """Metrics over all questions, with intervals."""
    cells = {}
    for key, name in METRICS.items():
        if key in like.metrics:
            cells[name] = "-"
            if line is not None:
                mean, low, high = line.metrics[key]
                cells[name] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
    return cells


def _markdown(table: Sequence[Mapping[str, str]]) -> str:
    head = [*table[0]]
    rows = [head, ["---"] * len(head), *([row[name] for name in head] for row in table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Rows


def _full(figures: tuple[float, ...]) -> Row:
    return Row("Full Cache", "full", {}, figures, "the full cache")


def _drops(
    table: Mapping[str, tuple[float, ...]], by_depth: ByDepth | None = None
) -> tuple[Row, ...]:
    """Rows of Tables 1 and 3."""
    (_, full), (evict_audio, audio), (evict_video, video) = table.items()
    return (
        _full(full),
        Row(evict_audio, "drop_audio", {}, audio, by_depth=by_depth),
        Row(evict_video, "drop_video", {}, video, by_depth=by_depth),
    )


def _high_layers(num_layers: int) -> dict[str, Any]:
    return {"first_layer": num_layers // 2}


def _cross_merge(label: str, figures: tuple[float, ...], unimportant: str) -> Row:
    options = {"budget": 0.2, "unimportant": unimportant}
    return Row(label, "cross_merge", options, figures, "20 %")


def _policies(
    figures: Mapping[str, tuple[float, ...]], budget: float, label: str, **options: Any
) -> list[Row]:
    """The six policies of Tables 4 and 5, which have the same number of entries if they can."""
    size = {"budget": budget, **options}
    # Merged entries and a lifted token count, so that only the filter makes a difference.
    acckv = {**size, "strict_budget": "entries"}
    arms: dict[str, tuple[str, dict[str, Any], ByDepth | None]] = {
        "H2O": ("h2o", size, None),
        "SnapKV": ("snapkv", size, None),
        "LOOK-M": ("lookm", size, None),
        "FastV": ("fastv", size, partial(_fastv, budget)),
        "AccKV, τ = 0.9": ("acckv", {**acckv, "tau": 0.9}, None),
        "AccKV, τ = 0.6": ("acckv", {**acckv, "tau": 0.6}, None),
    }
    return [
        Row(f"{name}, {label}", policy, given, figures[name], label, by_depth)
        for name, (policy, given, by_depth) in arms.items()
    ]


def _tokens(size: int, scope: str, words: str) -> list[Row]:
    name = f"{size} tokens"
    return _policies(paper.TABLE_5[name], size, f"{name} {words}", budget_scope=scope)


def _fastv(budget: float, num_layers: int) -> dict[str, Any]:
    """K = 2 as by its authors where two full layers leave room in 10 %, else 1; where even that
    exceeds the budget alone, the authors' own 1 - R, which keeps more than the others."""
    first = 2 if 2 / num_layers < 0.1 else 1
    return {"first_pruned_layer": first, "equalize": budget > first / num_layers}


def _ablation(key: str, label: str) -> Row:
    redistribution, focusing, calibration = (switch == "1" for switch in key)
    options: dict[str, Any] = {
        "budget": 0.2,
        "redistribution": "paper" if redistribution else "off",
        "focusing": focusing,
        "calibration": calibration,
    }
    if calibration:
        options |= {"tau": 0.9, "strict_budget": "entries"}
    return Row(label, "acckv", options, (paper.TABLE_6[key],), "20 %")


_TASKS = (
    "The paper does not say which questions its tasks have; ours are those that need sound, "
    "pictures or both, where the data tell."
)
_SIZES = "Each arm keeps all that the other modality has, so sizes differ by design."
_FILTER = (
    "AccKV's merged entries count in its budget here (strict_budget=entries), the paper's come on "
    "top. Its filter drops tokens behind the budget, so that its arms may keep fewer entries than "
    "the others; that cannot be made equal beforehand."
)
_FASTV = (
    "FastV's layers below K keep everything. Its budget is the mean over layers where they leave "
    "room for it, else what the layers from K on keep (equalize=False): then it keeps more in all."
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "table1",
            "Table 1: one modality evicted in the higher layers",
            paper.TASKS,
            _drops(paper.TABLE_1, _high_layers),
            ("Higher layers: the upper half. The paper does not say.", _TASKS, _SIZES),
        ),
        Preset(
            "table2",
            "Table 2: unimportant audio and video evicted, or merged across modalities",
            paper.TASKS,
            (
                _full(paper.TABLE_2["Full Cache"]),
                _cross_merge("Evict", paper.TABLE_2["Evict"], "evict"),
                _cross_merge("Merge, all in one entry", paper.TABLE_2["Merge"], "pooled"),
                _cross_merge("Merge, audio into video", paper.TABLE_2["Merge"], "nearest"),
            ),
            ("The paper names neither budget nor way of merging: both are ours.", _TASKS),
        ),
        Preset(
            "table3",
            "Table 3: one modality evicted in all layers",
            paper.TASKS,
            _drops(paper.TABLE_3),
            (_TASKS, _SIZES),
        ),
        Preset(
            "table4",
            "Table 4: policies at 20 % and 10 % of audio and video",
            paper.BENCHMARKS,
            (
                _full(paper.TABLE_4[""]["Full Cache"]),
                *_policies(paper.TABLE_4["20 %"], 0.2, "20 %"),
                *_policies(paper.TABLE_4["10 %"], 0.1, "10 %"),
            ),
            (_FILTER, _FASTV),
        ),
        Preset(
            "table5",
            "Table 5: policies at 160 and 120 tokens",
            paper.BENCHMARKS,
            (
                _full(paper.TABLE_5[""]["Full Cache"]),
                *_tokens(160, "av", "of audio and video, text on top"),
                *_tokens(120, "av", "of audio and video, text on top"),
                *_tokens(160, "total", "in all, text included"),
                *_tokens(120, "total", "in all, text included"),
            ),
            ("The paper does not say which tokens count: both readings.", _FILTER, _FASTV),
            "AVicuna",
        ),
        Preset(
            "table6",
            "Table 6: AccKV without its modules, 20 %",
            ("AVSD",),
            (
                _ablation("111", "A-R, A-F, C-C"),
                _ablation("110", "A-R, A-F"),
                _ablation("100", "A-R"),
                _ablation("000", "none"),
            ),
            ("A-R: redistribution; A-F: focusing; C-C: calibration, τ = 0.9.", _FILTER),
        ),
    )
}
"""By name, ``table1`` to ``table6``."""
