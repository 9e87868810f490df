# SPDX-License-Identifier: Apache-2.0
"""The evaluation itself: is a right answer counted, a wrong one not, and nothing asked twice?"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation import command, mvbench, tiny_av
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.command import REFUSED, spread
from vllm_acckv.evaluation.media import frames
from vllm_acckv.evaluation.metrics import Interval
from vllm_acckv.evaluation.presets import PRESETS
from vllm_acckv.evaluation.report import Line, markdown
from vllm_acckv.evaluation.run import evaluate, refusals
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.tools import clips, tiny_model
from vllm_acckv.tools.cli import main

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
    assert "Not compar" not in (tmp_path / "results.md").read_text()


def test_stopped_it_goes_on(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    console = Console(file=StringIO())
    with pytest.raises(KeyboardInterrupt):
        evaluate(Knowing(stop_after=40), ARMS, samples, tmp_path, console)
    rest = Knowing()
    lines = evaluate(rest, ARMS, samples, tmp_path, console)
    assert rest.asked == len(ARMS) * len(samples) - 40
    assert lines == evaluate(Knowing(), ARMS, samples, tmp_path / "whole", console)


class Greedy(Knowing):
    """Keeps half as much again under ``random``."""

    def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
        for one in super().answer(arm, samples):
            more = 30 if arm.policy == "random" else 0
            yield replace(one, entries=one.entries + more)


UNEQUAL = (
    "random budget=0.2 keeps 91.0 entries and snapkv budget=0.2 60.0 of 300.0: compare them at "
    "budgets that make equal sizes, or each with itself."
)


def test_unequal_sizes_are_not_in_one_table(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    lines = evaluate(Greedy(), ARMS, samples, tmp_path, Console(file=StringIO()))
    assert refusals(lines) == dict.fromkeys(["snapkv budget=0.2", "random budget=0.2"], UNEQUAL)
    told = (tmp_path / "results.md").read_text()
    table, apart = told.split("## Not compared")
    assert "| full | 300 of 300 | - | 1.000 (1.000 to 1.000) |" in table
    assert "snapkv" not in table and "random" not in table
    assert apart.count(UNEQUAL) == 1
    assert "\n* random budget=0.2: 91 of 300 KV entries; exact 0.000 (0.000 to 0.000), " in apart
    assert "\n* snapkv budget=0.2: 60 of 300 KV entries; exact 0." in apart
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(ARMS)


def test_unequal_sizes_on_demand(samples: tuple[Sample, ...], tmp_path: Path) -> None:
    console = Console(file=StringIO())
    evaluate(Greedy(), ARMS, samples, tmp_path, console, allow_unequal=True)
    told = (tmp_path / "results.md").read_text()
    assert [row.split("|")[1].strip() for row in told.splitlines()[2:5]] == [a.name for a in ARMS]
    assert told.endswith(f"\n\nNot comparable: {UNEQUAL}\n")


def of_size(arm: str, entries: float, rejected: float | None = None) -> Line:
    metrics = {"exact": Interval(0.5, 0.25, 0.75)}
    weights = () if rejected is None else (0.126, 0.5)
    return Line(arm, 4, metrics, {"tiny-av/see": 0.5}, entries, 300.0, rejected, weights)


def test_what_is_unequal() -> None:
    """Within a budget; be it by AccKV's filter."""
    filtered = of_size("acckv budget=0.2 tau=0.9", 40.0, 0.5)
    few = [of_size("full", 300.0), of_size("acckv budget=0.1", 30.0), filtered]
    assert refusals(few) == {}
    other_scope = of_size("snapkv budget=0.2 budget_scope=total", 60.0)
    assert refusals([*few, other_scope]) == {}
    both = refusals([*few, of_size("snapkv budget=0.2", 60.0)])
    assert set(both) == {"acckv budget=0.2 tau=0.9", "snapkv budget=0.2"}
    assert "acckv budget=0.2 tau=0.9 40.0 of 300.0" in both["snapkv budget=0.2"]


def test_what_is_measured_is_reported() -> None:
    lines = [of_size("full", 300.0), of_size("acckv budget=0.2", 40.0, 0.5)]
    weights = "\n\n* W of video by layer, acckv budget=0.2: 0.13 0.50"
    assert markdown(lines) == (
        "| arm | KV entries | evicted by tau | exact | see |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| full | 300 of 300 | - | 0.500 (0.250 to 0.750) | 0.50 |\n"
        "| acckv budget=0.2 | 40 of 300 | 50.0 % | 0.500 (0.250 to 0.750) | 0.50 |" + weights
    )
    alone = "* acckv budget=0.2: 40 of 300 KV entries, 50.0 % evicted by tau; exact 0.500"
    assert alone in markdown(lines, refused={"acckv budget=0.2": "too small"})
    nothing_else = markdown(lines[1:], refused={"acckv budget=0.2": "too small"})
    assert nothing_else.startswith("* W") and "\n\ntoo small\n\n* acckv" in nothing_else


# The command


class Fake:
    """In place of a runner: remembers what it was made with and asked, and answers right.

    ``sizes`` are entries by policy.
    """

    sizes: ClassVar[dict[str, float]] = {}
    model, checkpoint = "served", "nowhere"

    def __init__(self, *given: Any, **options: Any) -> None:
        self.given, self.options = given, options
        self.asked: list[tuple[str, Sample]] = []
        made.append(self)

    def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
        self.asked += [(arm.name, one) for one in samples]
        entries = self.sizes.get(arm.policy, 60.0)
        return (Answer(one.id, arm.name, one.answers[0], entries, 300) for one in samples)


made: list[Fake] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> type[Fake]:
    """Stands in for every runner."""
    made.clear()
    for module, name in (("in_vllm", "InVLLM"), ("in_hf", "InHF"), ("in_server", "InServer")):
        imported = importlib.import_module(f"vllm_acckv.evaluation.{module}")
        monkeypatch.setattr(imported, name, Fake)
    layers = command.num_layers
    monkeypatch.setattr(
        command, "num_layers", lambda name: layers(name) if Path(name).exists() else 4
    )
    monkeypatch.setattr(Fake, "checkpoint", str(checkpoint))
    monkeypatch.setattr(Fake, "sizes", {"full": 300.0})
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return Fake


def call(output: Path, *arguments: str, **environment: str) -> Result:
    command = ["eval", *arguments, "--output", str(output)]
    return CliRunner().invoke(main, command, env={"COLUMNS": "200", **environment})


@pytest.fixture(scope="module")
def mvbench_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three entries of each task, about one clip of two seconds."""
    root = tmp_path_factory.mktemp("mvbench")
    clip = clips.make_clip(root / "clip.mp4", seconds=2).read_bytes()
    entry = {"video": "clip.mp4", "question": "what?", "candidates": ["a dog", "a cat"]}
    entry |= {"answer": "a cat", "start": 0.5, "end": 1.5}
    (root / "json").mkdir()
    for name, task in mvbench.TASKS.items():
        (root / "json" / f"{name}.json").write_text(json.dumps([entry] * 3))
        (root / "video" / task.folder).mkdir(parents=True, exist_ok=True)
        (root / "video" / task.folder / "clip.mp4").write_bytes(clip)
    return root


def test_mvbench(fake: type[Fake], mvbench_root: Path, tmp_path: Path) -> None:
    options = ("--task", "mvbench", "--annotations", str(mvbench_root), "--questions", "10")
    done = call(tmp_path, "model", *options, "--policies", "snapkv", "--budgets", "0.2")
    assert done.exit_code == 0, done.output
    (runner,) = made
    model, media, max_tokens = runner.given
    assert (model, max_tokens, runner.options["max_model_len"]) == ("model", 64, -1)
    asked = [sample for _, sample in runner.asked]
    assert [one.task.partition("/")[2] for one in asked] == list(mvbench.TASKS)
    for sample in asked:
        assert sample.video is not None and sample.audio is not None
        assert sample.start is sample.end is None
        bounded = mvbench.TASKS[sample.task.partition("/")[2]].bounded
        assert (sample.video.parent == tmp_path / "clips") == bounded
        assert len(frames(sample.video)[0]) == (8 if bounded else 16)
        assert media in sample.video.resolve().parents and media in sample.audio.resolve().parents
    assert "| arm | KV entries | evicted by tau | accuracy | rouge_l" in done.stdout


def test_avsd(fake: type[Fake], tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    clips.make_clip(tmp_path / "videos" / "A.mp4", seconds=1)
    turn = {"question": "what is it ?", "answer": "a cat"}
    dialogs = [{"image_id": name, "dialog": [turn]} for name in "AB"]
    (tmp_path / "avsd.json").write_text(json.dumps({"dialogs": dialogs}))
    options = ["--task", "avsd", "--annotations", str(tmp_path / "avsd.json"), "--runner", "hf"]
    options += ["--videos", str(tmp_path / "videos"), "--policies", "full"]
    done = call(tmp_path / "out", "model", *options)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: 1 of 2 videos are missing: ")
    done = call(tmp_path / "out", "model", *options, "--skip-missing", "--max-tokens", "9")
    assert done.exit_code == 0, done.output
    assert "1 questions are left out" in done.stderr
    (runner,) = made
    assert runner.given == ("model", 9, None)
    assert [sample.id for _, sample in runner.asked] == ["avsd/1/A/1"]
    assert "| arm | KV entries | evicted by tau | rouge_l |" in done.stdout


def test_server(fake: type[Fake], tmp_path: Path) -> None:
    options = ("--runner", "server", "--url", "http://here", "--questions", "7")
    for arguments, environment, expected in (
        (("name",), {"OPENAI_API_KEY": "a"}, ("http://here", "name", 64, "a")),
        ((), {"OPENAI_API_KEY": "a", "VLLM_API_KEY": "b"}, ("http://here", None, 64, "b")),
        (("--api-key", "c"), {"VLLM_API_KEY": "b"}, ("http://here", None, 64, "c")),
    ):
        done = call(tmp_path, *arguments, *options, **environment)
        assert done.exit_code == 0, done.output
        assert made[-1].given == expected
    assert len(made[0].asked) == 7 * 5 and not made[1].asked


def test_unequal_sizes_are_refused(fake: type[Fake], tmp_path: Path) -> None:
    fake.sizes["acckv"] = 40.0
    options = ("model", "--budgets", "0.2", "--questions", "7")
    done = call(tmp_path, *options)
    assert done.exit_code == REFUSED
    assert "## Not compared" in done.stdout and "| snapkv" not in done.stdout
    assert "no question will be asked again" in done.stdout
    assert len(json.loads((tmp_path / "results.json").read_text())) == 3
    assert not (tmp_path / "quality.svg").exists()  # full alone
    done = call(tmp_path, *options, "--allow-unequal")
    assert done.exit_code == 0
    assert "| snapkv budget=0.2 | 60 of 300 |" in done.stdout
    assert "snapkv" in (tmp_path / "quality.svg").read_text()
    assert "Not comparable: snapkv budget=0.2 keeps 60.0 entries and acckv" in done.stdout
    assert not made[1].asked


@pytest.mark.parametrize("runner", ["server", "vllm"])
def test_preset(fake: type[Fake], checkpoint: Path, tmp_path: Path, runner: str) -> None:
    """Its arms follow from the number of layers, which a server's checkpoint tells as well."""
    where = ("--runner", "server", "--url", "http://here") if runner == "server" else ()
    model = () if runner == "server" else (str(checkpoint),)
    done = call(tmp_path, *model, "--preset", "table4", "--questions", "7", *where)
    assert done.exit_code == 0, done.output
    written = (tmp_path / "table4.md").read_text()
    assert written.startswith("## Table 4") and done.stdout == written + "\n"
    assert ("served" if runner == "server" else str(checkpoint)) + " on tiny-av" in written
    arms = PRESETS["table4"].arms(4)
    assert [name for name, _ in made[0].asked[::7]] == [arm.name for arm in arms]


def test_unequal_preset(fake: type[Fake], checkpoint: Path, tmp_path: Path) -> None:
    fake.sizes["acckv"] = 40.0
    options = (str(checkpoint), "--preset", "table4", "--questions", "7")
    assert call(tmp_path, *options).exit_code == 0
    assert "Unequal sizes" in (tmp_path / "table4.md").read_text()
    assert (tmp_path / "quality.svg").exists() and not (tmp_path / "weights.svg").exists()


def test_answers_of_two_models_are_not_mixed(fake: type[Fake], tmp_path: Path) -> None:
    options = ("--questions", "7", "--policies", "full")
    assert call(tmp_path, "one", *options).exit_code == 0
    assert call(tmp_path, "one", *options).exit_code == 0
    assert not made[1].asked
    for changed, name in (
        (("other",), "model"),
        (("one", "--seed", "1"), "seed"),
        (("one", "--max-tokens", "9"), "max_tokens"),
        (("one", "--runner", "hf", "--block-size", "16"), "runner"),
    ):
        done = call(tmp_path, *changed, *options)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {tmp_path} holds answers with {name} ")


def test_a_failed_start_does_not_claim_the_folder(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise KVPolicyError("wrong cannot be loaded.")

    options = ("--questions", "7", "--policies", "full")
    with monkeypatch.context() as patch:
        patch.setattr("vllm_acckv.evaluation.in_vllm.InVLLM", broken)
        done = call(tmp_path, "wrong", *options)
        assert (done.exit_code, done.stderr) == (1, "error: wrong cannot be loaded.\n")
    assert call(tmp_path, "right", *options).exit_code == 0


@pytest.mark.parametrize("package", ["rouge_score", "av"])
def test_a_missing_package_is_named_before_the_work(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == package else find(name))
    done = call(tmp_path, "model")
    assert done.exit_code == 1 and not made
    assert done.stderr.startswith(f"error: The package {package.replace('_', '-')} is missing: pip")


def test_a_policy_that_does_not_fit_the_model(
    fake: type[Fake], checkpoint: Path, tmp_path: Path
) -> None:
    done = call(tmp_path, str(checkpoint), "--policies", "fastv", "--budgets", "0.2")
    assert done.exit_code == 1 and not made
    assert done.stderr.startswith("error: --kv-budget is 0.2; it must be above 0.50, what fastv's ")


def test_figure1(
    fake: type[Fake], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    options = ("--preset", "figure1", "--questions", "7", "--runner", "hf")
    done = call(tmp_path, str(checkpoint), *options)
    assert done.exit_code == 0, done.output
    assert "| both (3) | 0 |" in done.stdout and (tmp_path / "figure1.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "hint", "said"),
    [
        ("", "MODEL", "--runner vllm needs one."),
        ("--runner hf", "MODEL", "--runner hf needs one."),
        ("m --task mvbench", "--annotations", "--task mvbench needs it."),
        ("m --task avsd --annotations a", "--videos", "--task avsd needs it."),
        ("m --task mvbench --annotations a --videos b", "--videos", "mvbench has no use for it."),
        ("m --preset figure1", "--runner", "figure1 looks into --runner hf only."),
        ("m --block-size 16", "--block-size", "only --runner hf has none of its own."),
        ("m --annotations a", "--annotations", "--task tiny-av has no use for it."),
        ("m --skip-missing", "--skip-missing", "--task tiny-av has no use for it."),
        ("--runner server", "--url", "--runner server needs it."),
        ("m --url http://here", "--url", "only --runner server asks one."),
        ("m --preset table4 --taus 0.5", "--taus", "--preset chooses them itself."),
        ("m --preset table9", "--preset", "table9 is none of table1, "),
        ("m --budgets 0.2,much", "--budgets", "0.2,much must be numbers separated by commas."),
        ("m --task mmlu", "--task", "'mmlu' is not one of"),
    ],
)
def test_options_at_odds(
    fake: type[Fake], tmp_path: Path, arguments: str, hint: str, said: str
) -> None:
    done = call(tmp_path, *arguments.split())
    assert done.exit_code == 2, done.output
    assert f"Invalid value for {hint}: " in done.stderr or f"for '{hint}'" in done.stderr
    assert said in done.stderr and not made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("m --task mvbench --annotations nowhere", "nowhere/json/action_sequence.json does not"),
        ("m --policies nothing", "'nothing'"),
    ],
)
def test_what_cannot_be_honoured(
    fake: type[Fake], tmp_path: Path, arguments: str, said: str
) -> None:
    done = call(tmp_path, *arguments.split())
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: ") and said in done.stderr and not made


@pytest.mark.parametrize("more", ["", "--preset table4"])
def test_no_checkpoint(tmp_path: Path, more: str) -> None:
    done = call(tmp_path, str(tmp_path / "m"), *more.split())
    assert done.exit_code == 1, done.output
    assert f"layers is needed, but {tmp_path / 'm'} has no configuration" in done.stderr


def test_questions_are_spread_over_tasks(mvbench_root: Path) -> None:
    everything = mvbench.load(mvbench_root).samples
    some = spread(everything, 14, seed=0)
    assert some == spread(everything, 14, seed=0) != spread(everything, 14, seed=1)
    assert Counter(Counter(one.task for one in some).values()) == {1: 6, 2: 4}
    assert some == [one for one in everything if one in some]
    assert set(spread(everything, 9, seed=0)) < set(some)
    assert spread(everything, 99, seed=0) == list(everything)


def test_command_through_vllm(tmp_path: Path) -> None:
    """A model of random weights, so every answer is wrong; sizes and counts are real."""
    model = tiny_model.build(
        tmp_path / "model", min_pixels=tiny_av.SIZE**2, max_pixels=tiny_av.SIZE**2
    )
    code = "from vllm_acckv.tools.cli import main; main()"
    command = [sys.executable, "-c", code, "eval", str(model), "--output", str(tmp_path / "out")]
    command += ["--policies", "full,acckv,random", "--budgets", "0.2", "--questions", "14"]
    done = subprocess.run([*command, "--max-tokens", "4"], capture_output=True, text=True)
    # Random weights decide how much AccKV's filter drops, and so whether sizes are equal.
    refused = "## Not compared" in (tmp_path / "out" / "results.md").read_text()
    assert done.returncode == (REFUSED if refused else 0), done.stderr[-3000:]
    full, acckv, random = json.loads((tmp_path / "out" / "results.json").read_text())
    assert full["entries"] == full["tokens"] > 290
    assert random["entries"] < 0.5 * full["tokens"] and acckv["entries"] <= random["entries"] + 32
    assert len(acckv["video_weight"]) == 4 and 0 < acckv["rejected"] <= 1
    assert {one["questions"] for one in (full, acckv, random)} == {14}
