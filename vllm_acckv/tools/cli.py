# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-acckv``: a tiny model, clips and a demonstration, all made on the spot.

Commands import what they need when they run; PyTorch alone would slow down ``--help``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_acckv.config import DEFAULT_POLICY, KVPolicyError

main = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Try the KV policies of vllm-acckv without downloading a model.",
)

_Seed = Annotated[int, typer.Option(help="Another seed, another content.")]


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
    output: Annotated[
        Path, typer.Option(help="Folder for the model, the clip and the server's log.")
    ] = Path("demo-output"),
    policy: Annotated[str, typer.Option(help="KV policy to try.")] = DEFAULT_POLICY,
    budget: Annotated[
        float | None, typer.Option(help="Audio-video tokens to keep: a ratio, or a number above 1.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="AccKV's similarity below which tokens are dropped.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the server; 0 is any free one.")] = 0,
) -> None:
    """Serve a tiny model under a KV policy and compare its answers with those of the full cache."""
    from vllm_acckv.tools import demo as demonstration
    from vllm_acckv.tools.server import ServerError

    try:
        options = {"budget": budget, "tau": tau}
        given = {key: value for key, value in options.items() if value is not None}
        demonstration.run(output, policy, given, port, Console())
    except (KVPolicyError, ServerError, FileExistsError) as error:
        raise _failure(error) from None


@main.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint that vLLM serves.")],
    output: Annotated[Path, typer.Option(help="Folder for clips, answers and results.")],
    policies: Annotated[
        str, typer.Option(help="Names, separated by commas.")
    ] = "full,acckv,snapkv",
    budgets: Annotated[str, typer.Option(help="Ratios or numbers of tokens.")] = "0.2,0.1",
    taus: Annotated[str, typer.Option(help="For policies that have a tau.")] = "",
    questions: Annotated[int, typer.Option(min=1, help="How many.")] = 500,
    seed: _Seed = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
) -> None:
    """Ask questions about clips of the tiny world under several policies; stopped, it goes on."""
    from vllm_acckv.evaluation import tiny_av
    from vllm_acckv.evaluation.arms import grid
    from vllm_acckv.evaluation.run import evaluate

    try:
        arms = grid(policies.split(","), _numbers(budgets), _numbers(taus))
        data = tiny_av.load(output / "clips", questions, seed)
        from vllm_acckv.evaluation.in_vllm import InVLLM

        answerer = InVLLM(
            model,
            output,
            max_tokens,
            max_model_len=4096,
            limit_mm_per_prompt={"video": 1, "audio": 1},
        )
        evaluate(answerer, arms, data.samples, output, Console(stderr=True))
    except KVPolicyError as error:
        raise _failure(error) from None
    typer.echo((output / "results.md").read_text())


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise typer.BadParameter(f"{text} must be numbers separated by commas.") from None


def _failure(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
