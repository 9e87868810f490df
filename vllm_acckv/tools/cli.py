# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-acckv``: a tiny model, clips, a demonstration, evaluations, conversions.

Commands import what they need when they run; PyTorch alone would slow down ``--help``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from vllm_acckv.config import KVPolicyError

main = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Try the KV policies of vllm-acckv without downloading a model.",
)

Task = Literal["tiny-av", "mvbench", "avsd"]
Runner = Literal["vllm", "hf", "server"]
_Seed = Annotated[int, typer.Option(min=0, help="Another seed, another content.")]


@main.command("tiny-model")
def tiny_model(
    directory: Annotated[Path, typer.Argument(help="Where to write the checkpoint.")],
    seed: _Seed = 0,
) -> None:
    """Write a checkpoint of a Qwen2.5-Omni with a few million random weights."""
    from vllm_acckv.tools import tiny_model as builder

    try:
        builder.build(directory, seed=seed)
    except FileExistsError as error:
        raise _failure(error) from None
    typer.echo(directory)


@main.command()
def clip(
    path: Annotated[Path, typer.Argument(help="The file: .mp4, or .wav for sound alone.")],
    seconds: Annotated[int, typer.Option(min=1, help="Length.")] = 4,
    seed: _Seed = 0,
    sound: Annotated[bool, typer.Option(help="Whether an mp4 has a sound track.")] = True,
) -> None:
    """Write a synthetic clip: moving shapes and changing chords."""
    if path.suffix not in (".mp4", ".wav"):
        raise typer.BadParameter(f"{path} must end in .mp4 or .wav.", param_hint="PATH")
    if path.suffix == ".wav" and not sound:
        raise typer.BadParameter("a .wav is nothing but sound.", param_hint="--no-sound")
    from vllm_acckv.tools import clips

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp4":
        clips.make_clip(path, seconds=seconds, seed=seed, sound=sound)
    else:
        clips.make_wav(path, seconds=seconds, seed=seed)
    typer.echo(path)


@main.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the clip and the server's log.")] = Path(
        "demo-output"
    ),
    policy: Annotated[str, typer.Option(help="KV policy to try.")] = "acckv_plus",
    budget: Annotated[
        float | None, typer.Option(help="Audio-video tokens to keep: a ratio, or a number above 1.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="AccKV's similarity below which tokens are dropped.")
    ] = None,
    seed: _Seed = 0,
    port: Annotated[int, typer.Option(help="Port of the server; 0 is any free one.")] = 0,
) -> None:
    """Serve a small model under a KV policy, ask about a clip, and compare with the full cache."""
    from vllm_acckv.tools import demo as demonstration
    from vllm_acckv.tools.server import ServerError

    try:
        options = {"budget": budget, "tau": tau}
        given = {key: value for key, value in options.items() if value is not None}
        demonstration.run(output, policy, given, seed, port, Console())
    except (KVPolicyError, ServerError, OSError) as error:
        raise _failure(error) from None


@main.command("eval")
def evaluate(
    output: Annotated[Path, typer.Option(help="Folder for clips, answers and results.")],
    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint; of a server, the name it is served by."),
    ] = None,
    task: Annotated[Task, typer.Option(help="Which questions; see docs/datasets.md.")] = "tiny-av",
    annotations: Annotated[
        Path | None, typer.Option(help="MVBench's folder, or AVSD's file of dialogues.")
    ] = None,
    videos: Annotated[Path | None, typer.Option(help="Folder of AVSD's videos.")] = None,
    references: Annotated[
        Path | None, typer.Option(help="Answers to AVSD's test set, where it has none.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option(help="Whether to leave out questions about missing videos.")
    ] = False,
    runner: Annotated[
        Runner, typer.Option(help="vLLM in this process, transformers, or a running server.")
    ] = "vllm",
    url: Annotated[str | None, typer.Option(help="Of a server: http://localhost:8000.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Of a server.", envvar=["VLLM_API_KEY", "OPENAI_API_KEY"]),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="An experiment of the paper, in place of policies.")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas.", show_default="full,acckv,snapkv"),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Ratios or numbers of tokens.", show_default="0.2,0.1")
    ] = None,
    taus: Annotated[str | None, typer.Option(help="For policies that have a tau.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many, of all tasks alike.")] = 500,
    seed: _Seed = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Fill up to whole KV blocks, as vLLM does; transformers only.",
            show_default="exact budgets",
        ),
    ] = None,
    allow_unequal: Annotated[
        bool, typer.Option(help="Whether to compare policies that keep unequal numbers of entries.")
    ] = False,
) -> None:
    """Ask questions about clips under several policies; stopped, it goes on.

    Exit code 3: policies were not compared, because they keep unequal numbers of entries.
    """
    given = locals()
    from vllm_acckv.evaluation import command
    from vllm_acckv.evaluation.samples import DatasetError
    from vllm_acckv.tools.server import ServerError

    try:
        report, code = command.run(command.Options(**given), Console(stderr=True))
    except (KVPolicyError, DatasetError, ServerError, OSError) as error:
        raise _failure(error) from None
    typer.echo(report)
    if code:
        raise typer.Exit(code)


@main.command()
def convert(
    model: Annotated[Literal["avicuna"], typer.Argument(help="What the pieces make.")],
    base: Annotated[Path, typer.Option(help="Folder of lmsys/vicuna-7b-v1.5.")],
    stage1: Annotated[Path, typer.Option(help="mm_projector.bin")],
    stage2: Annotated[Path, typer.Option(help="mm_projector_a.bin")],
    stage3: Annotated[Path, typer.Option(help="Folder of the first LoRA.")],
    stage4: Annotated[Path, typer.Option(help="Folder of the second LoRA.")],
    clip: Annotated[Path, typer.Option(help="Folder of openai/clip-vit-large-patch14.")],
    clap: Annotated[Path, typer.Option(help="Folder of laion/clap-htsat-fused.")],
    output: Annotated[Path, typer.Option(help="A new folder for the checkpoint.")],
) -> None:
    """Make one checkpoint of a model that is published in pieces."""
    from vllm_acckv import cpu_media

    cpu_media.fix()
    from vllm_acckv.models.avicuna import convert as avicuna

    try:
        pieces = avicuna.Pieces(base, stage1, stage2, stage3, stage4, clip, clap)
        avicuna.convert(pieces, output)
    except (avicuna.ConversionError, OSError) as error:
        raise _failure(error) from None
    typer.echo(output)


def _failure(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
