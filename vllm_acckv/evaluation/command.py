# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-acckv eval`` does with its options."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from vllm_acckv import cpu_media
from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation.arms import Arm, grid
from vllm_acckv.evaluation.run import Answerer, evaluate, refusals
from vllm_acckv.evaluation.samples import Dataset, Sample, read_json

if TYPE_CHECKING:
    from vllm_acckv.evaluation.in_server import InServer
    from vllm_acckv.evaluation.report import Line
    from vllm_acckv.tools.cli import Runner, Task

FIGURE = "figure1"
"""The preset that is no table."""
POLICIES, BUDGETS = "full,acckv,snapkv", "0.2,0.1"
REFUSED = 3
"""Exit code where arms were not compared because their sizes differ."""

_SETTINGS = "settings.json"
_ADVICE = """
Policies that keep unequal numbers of entries are not compared. Run the command again with
--allow-unequal to see them in one table; no question will be asked again."""
_METRICS = {"tiny-av": "exact", "mvbench": "accuracy", "avsd": "rouge_l"}
_NEEDS = {"tiny-av": (), "mvbench": ("annotations",), "avsd": ("annotations", "videos")}
_TAKES = {
    "tiny-av": (),
    "mvbench": ("annotations", "skip_missing"),
    "avsd": ("annotations", "videos", "references", "skip_missing"),
}


@dataclass(frozen=True)
class Options:
    """As on the command line; ``None`` for what was not given."""

    output: Path
    model: str | None = None
    task: Task = "tiny-av"
    annotations: Path | None = None
    videos: Path | None = None
    references: Path | None = None
    skip_missing: bool = False
    runner: Runner = "vllm"
    url: str | None = None
    api_key: str | None = None
    preset: str | None = None
    policies: str | None = None
    budgets: str | None = None
    taus: str | None = None
    questions: int = 500
    seed: int = 0
    max_tokens: int = 64
    block_size: int | None = None
    allow_unequal: bool = False


def run(options: Options, console: Console) -> tuple[str, int]:
    """The report, in Markdown, and the exit code.

    Args:
        console: for progress.

    Raises:
        typer.BadParameter: for options that are missing or at odds.
        KVPolicyError: for a value that cannot be honoured.
        DatasetError: for files of the data set that are missing or malformed.
    """
    check(options)
    _packages(options)
    server = _server(options) if options.runner == "server" else None
    model, checkpoint = (server.model, server.checkpoint) if server else [str(options.model)] * 2
    if options.preset == FIGURE:
        return _figure(options, console), 0
    arms = _arms(options, checkpoint)
    data = questions(options, console)
    now = same_as_before(options, model, checkpoint)
    answerer = server or _local(options, data.samples)
    # Not before the model is there: a name mistyped once must not claim the folder.
    (options.output / _SETTINGS).write_text(json.dumps(now, indent=1) + "\n", "utf-8")
    metric, unequal = _METRICS[options.task], options.allow_unequal
    lines = evaluate(answerer, arms, data.samples, options.output, console, metric, unequal)
    # A preset says itself which sizes are unequal, some by design.
    unlike = {} if unequal or options.preset is not None else refusals(lines)
    _draw([one for one in lines if one.arm not in unlike], options.output, metric)
    report = (options.output / "results.md").read_text("utf-8")
    if options.preset is not None:
        report = _preset(options.preset).render(lines, model, options.task, metric)
        (options.output / f"{options.preset}.md").write_text(report, "utf-8")
    elif unlike:
        return report + _ADVICE, REFUSED
    return report, 0


def same_as_before(options: Options, model: str, checkpoint: str) -> dict[str, Any]:
    """What answers in the folder depend on, so that those of two models are never mixed.

    Raises:
        KVPolicyError: if it holds answers to other questions or of another model.
    """
    files = options.annotations, options.videos, options.references
    now = {
        "model": model,
        "checkpoint": checkpoint,
        "task": options.task,
        "files": [None if one is None else str(one.resolve()) for one in files],
        "runner": options.runner,
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "block_size": options.block_size,
    }
    path = options.output / _SETTINGS
    if not path.exists():
        return now
    before = read_json(path)
    if not isinstance(before, dict):
        raise KVPolicyError(f"{path} was not written by this command; choose another folder.")
    for name, value in now.items():
        if before.get(name) != value:
            raise KVPolicyError(
                f"{options.output} holds answers with {name} {before.get(name)}, not {value}; "
                "choose another folder."
            )
    return now


def _draw(lines: Sequence[Line], output: Path, metric: str) -> None:
    """Plots of what there is to see, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    from vllm_acckv.evaluation import plots

    for name, draw in (
        ("quality", partial(plots.quality, metric=metric)),
        ("weights", plots.weights),
        ("rejected", plots.rejected),
    ):
        path = output / f"{name}.svg"
        path.unlink(missing_ok=True)  # of other arms
        with suppress(KVPolicyError):  # nothing of this kind in these arms
            draw(lines, path)


def _figure(options: Options, console: Console) -> str:
    """The paper's figure 1, through transformers."""
    from vllm_acckv.evaluation import figure1
    from vllm_acckv.evaluation.in_hf import InHF

    runner = InHF(str(options.model), options.max_tokens)
    samples = questions(options, console).samples
    prompts = (
        (sample.task, runner.prepare(sample))
        for sample in track(samples, "prompts", console=console)
    )
    groups = figure1.measure(runner.model, prompts, options.output)
    return figure1.markdown(groups, str(options.model), options.task)


# Options


def _packages(options: Options) -> None:
    """Before hours of work whose results could not be written.

    Raises:
        KVPolicyError: for one that is not installed.
    """
    needed = ["rouge_score", "av", "soundfile"]
    if options.runner == "hf":
        needed.append("transformers")
    if options.preset == FIGURE:
        needed.append("matplotlib")
    for name in needed:
        if find_spec(name) is None:
            raise KVPolicyError(
                f"The package {name.replace('_', '-')} is missing: pip install 'vllm-acckv[eval]'."
            )


def check(options: Options) -> None:
    """
    Raises:
        typer.BadParameter: for options that are missing or at odds, naming one.
    """
    task, server = options.task, options.runner == "server"
    for name in ("annotations", "videos", "references", "skip_missing"):
        given, flag = bool(getattr(options, name)), f"--{name.replace('_', '-')}"
        if name in _NEEDS[task] and not given:
            raise typer.BadParameter(f"--task {task} needs it.", param_hint=flag)
        if given and name not in _TAKES[task]:
            raise typer.BadParameter(f"--task {task} has no use for it.", param_hint=flag)
    if server and options.url is None:
        raise typer.BadParameter("--runner server needs it.", param_hint="--url")
    if not server and options.url is not None:
        raise typer.BadParameter("only --runner server asks one.", param_hint="--url")
    if not server and options.model is None:
        raise typer.BadParameter(f"--runner {options.runner} needs one.", param_hint="MODEL")
    if options.preset is not None:
        for name in ("policies", "budgets", "taus"):
            if getattr(options, name) is not None:
                raise typer.BadParameter("--preset chooses them itself.", param_hint=f"--{name}")
        if options.preset == FIGURE and options.runner != "hf":
            raise typer.BadParameter("figure1 looks into --runner hf only.", param_hint="--runner")
        if options.preset != FIGURE:
            _preset(options.preset)
    if options.block_size is not None and options.runner != "hf":
        raise typer.BadParameter("only --runner hf has none of its own.", param_hint="--block-size")


def _arms(options: Options, checkpoint: str) -> list[Arm]:
    if options.preset is not None:
        return list(_preset(options.preset).arms(num_layers(checkpoint)))
    arms = grid(
        (options.policies or POLICIES).split(","),
        _numbers(options.budgets or BUDGETS, "--budgets"),
        _numbers(options.taus or "", "--taus"),
    )
    if options.runner != "server":  # whose checkpoint may be elsewhere
        layers = num_layers(checkpoint)
        for arm in arms:
            arm.made().check(layers)
    return arms


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise typer.BadParameter(
            f"{text} must be numbers separated by commas.", param_hint=flag
        ) from None


def _preset(name: str) -> Any:
    from vllm_acckv.evaluation.presets import PRESETS

    if name not in PRESETS:
        raise typer.BadParameter(
            f"{name} is none of {', '.join([*PRESETS, FIGURE])}.", param_hint="--preset"
        )
    return PRESETS[name]


def num_layers(checkpoint: str) -> int:
    """Decoder layers of a checkpoint, by its configuration.

    Raises:
        KVPolicyError: for one whose configuration transformers cannot read.
    """
    cpu_media.fix()  # in front of the first import of transformers
    from transformers import AutoConfig

    from vllm_acckv.models import register_configs

    register_configs()
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise KVPolicyError(
            f"The number of the model's layers is needed, but {checkpoint} has no configuration "
            f"that can be read: {first}"
        ) from None
    # Of models that speak, the part that understands and writes.
    config = getattr(config, "thinker_config", config)
    return int(config.get_text_config().num_hidden_layers)


# Questions


def questions(options: Options, console: Console) -> Dataset:
    """Those that will be asked, about files that runners can take as they are.

    Raises:
        DatasetError: for files that are missing or malformed.
    """
    from vllm_acckv.evaluation import avsd, media, mvbench, tiny_av
    from vllm_acckv.models import hears_clips

    folder = options.output / "clips"
    if options.task == "tiny-av":
        return tiny_av.load(folder, options.questions, options.seed)
    assert options.annotations is not None
    if options.task == "mvbench":
        data = mvbench.load(options.annotations, skip_missing=options.skip_missing)
    else:
        assert options.videos is not None
        data = avsd.load(
            options.annotations,
            options.videos,
            options.references,
            skip_missing=options.skip_missing,
        )
    if data.skipped:
        console.print(f"{data.skipped} questions are left out because their video is missing.")
    chosen = spread(data.samples, options.questions, options.seed)
    samples = [media.cut(sample, folder) for sample in track(chosen, "clips", console=console)]
    if options.model is None or not hears_clips(options.model):
        samples = [media.own_sound(sample, folder) for sample in samples]
    return Dataset(tuple(samples), data.skipped)


def spread(samples: Sequence[Sample], number: int, seed: int) -> list[Sample]:
    """As many of each task, as far as there are so many, in the order of ``samples``.

    Args:
        number: how many in all; those of a smaller number are among those of a larger one.
        seed: another one, other questions.
    """
    tasks = defaultdict(list)
    for sample in samples:
        tasks[sample.task].append(sample)
    rng = np.random.default_rng(seed)
    shuffled = [[group[i] for i in rng.permutation(len(group))] for group in tasks.values()]
    turns = (one for one in chain(*zip_longest(*shuffled)) if one is not None)
    chosen = {one.id for one in islice(turns, number)}
    return [sample for sample in samples if sample.id in chosen]


# Runners


def _server(options: Options) -> InServer:
    from vllm_acckv.evaluation.in_server import InServer

    assert options.url is not None
    return InServer(options.url, options.model, options.max_tokens, options.api_key)


def _local(options: Options, samples: Sequence[Sample]) -> Answerer:
    """A model in this process."""
    assert options.model is not None
    if options.runner == "hf":
        from vllm_acckv.evaluation.in_hf import InHF

        return InHF(options.model, options.max_tokens, options.block_size)
    from vllm_acckv.evaluation.in_vllm import InVLLM

    return InVLLM(
        options.model,
        _common(samples),
        options.max_tokens,
        # -1: as long as the memory has room for.
        max_model_len=4096 if options.task == "tiny-av" else -1,
        limit_mm_per_prompt={"video": 1, "audio": 1},
    )


def _common(samples: Sequence[Sample]) -> Path:
    """The folder under which all files lie."""
    files = [path for one in samples for path in (one.video, one.audio) if path is not None]
    return Path(os.path.commonpath([path.resolve().parent for path in files]))
