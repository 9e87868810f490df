# SPDX-License-Identifier: Apache-2.0
"""A real server, a tiny model, one clip: what the KV policy does to two requests."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Policy
from vllm_acckv.tools import clips, tiny_model
from vllm_acckv.tools.server import Metrics, Server

CLIP_SECONDS = 12
ANSWER_TOKENS = 24
QUESTION = "What happens in the clip?"
COMPACTIONS = "vllm:kv_policy_compactions_total"
FREED_BLOCKS = "vllm:kv_policy_freed_blocks_total"
SKIPPED = "vllm:kv_policy_skipped_requests_total"
TOKENS = "vllm:kv_policy_tokens_total"
FINISHED = "vllm:request_success_total"

_NOTE = "The weights of the tiny model are random: its answers are gibberish under any policy."


@dataclass(frozen=True)
class Request:
    """A title for the table, the content of the user's message and further body fields."""

    title: str
    content: list[dict[str, Any]]
    body: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What the server says of a request answered with the full cache and under its policy.

    Token counts are by modality ("video", "audio") and means over layers and KV heads; all are 0
    for a request that the policy left alone, because its clips fit into the budget.
    """

    full_answer: str
    answer: str
    prompt_tokens: int
    tokens: dict[str, float]
    kept: dict[str, float]
    merged: float
    freed_blocks: int
    prompt_blocks: int


def run(output: Path, name: str, options: dict[str, float], port: int, console: Console) -> None:
    """Build model and clips in ``output``, serve them, print the table.

    Args:
        name: of the policy.
        options: its ``budget`` and ``tau``, where given.

    Raises:
        ServerError: with the end of the server's log.
        KVPolicyError: for an unknown policy, or an option outside its range.
    """
    policy = make_policy(name, **options)
    # Without this, an end by SIGTERM would leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with console.status(f"Building a tiny Qwen2.5-Omni and a clip in {output} ..."):
        output.mkdir(parents=True, exist_ok=True)
        model = tiny_model.build(output / "model")
        clip = clips.make_clip(output / "clip.mp4", seconds=CLIP_SECONDS)
        sound = clips.make_wav(output / "clip.wav", seconds=CLIP_SECONDS)
    # With "=", because vLLM's parser takes a separate -0.5 for an option.
    flags = [f"--kv-policy={name}", *(f"--kv-{key}={value}" for key, value in options.items())]
    log = output / "server.log"
    server = Server(model, *flags, media=output, log=log, port=port)
    console.print(Text(f"vllm serve {model} {' '.join(flags)}", style="bold"), soft_wrap=True)
    with (
        console.status(f"Starting, most of a minute on two cores; log: {log} ...") as status,
        server,
    ):
        outcomes = {}
        for request in _requests(clip, sound):
            status.update(f"Asking: {request.title} ...")
            outcomes[request.title] = ask(server, request)
        status.update("Stopping the server ...")
    console.print(_table(outcomes, policy))
    console.print(_NOTE, soft_wrap=True)


def ask(server: Server, request: Request) -> Outcome:
    """Send ``request`` twice; the counters are differences around the second time."""
    with server.client() as client:
        before = server.metrics()
        full, _ = _answer(client, server.model, request, {"vllm_xargs": {"kv_policy": "full"}})
        before = _after(server, before)
        answer, prompt_tokens = _answer(client, server.model, request, {})
        after = _after(server, before)

    def difference(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    modalities = ("video", "audio")
    block_size = int(after.labels("vllm:cache_config_info")[0]["block_size"])
    return Outcome(
        full_answer=full,
        answer=answer,
        prompt_tokens=prompt_tokens,
        tokens={name: difference(TOKENS, modality=name) for name in modalities},
        kept={name: difference(TOKENS, modality=name, fate="kept") for name in modalities},
        merged=difference(TOKENS, fate="merged"),
        freed_blocks=round(difference(FREED_BLOCKS)),
        prompt_blocks=-(-prompt_tokens // block_size),
    )


def _requests(clip: Path, sound: Path) -> list[Request]:
    video = {"type": "video_url", "video_url": {"url": clip.resolve().as_uri()}}
    audio = {"type": "audio_url", "audio_url": {"url": sound.resolve().as_uri()}}
    question = {"type": "text", "text": QUESTION}
    return [
        Request("mp4, then wav", [video, audio, question], {}),
        Request(
            "mp4 with its sound interleaved",
            [video, question],
            {"mm_processor_kwargs": {"use_audio_in_video": True}},
        ),
    ]


def _answer(client: OpenAI, model: str, request: Request, body: dict[str, Any]) -> tuple[str, int]:
    """The answer's text and the number of prompt tokens."""
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": request.content}],  # type: ignore[misc, list-item]
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={**request.body, **body},
    )
    assert completion.usage is not None
    return completion.choices[0].message.content or "", completion.usage.prompt_tokens


def _after(server: Server, before: Metrics) -> Metrics:
    """The metrics once one more request is finished, and compacted or counted as skipped."""

    def counted(metrics: Metrics) -> float:
        return metrics.value(COMPACTIONS) + metrics.value(SKIPPED)

    return server.wait_for_metrics(
        lambda now: now.value(FINISHED) > before.value(FINISHED) and counted(now) > counted(before),
        "the counters of the request",
    )


def _table(outcomes: dict[str, Outcome], policy: Policy) -> Table:
    settings = {"budget": policy.budget} | policy.model_dump(include={"tau"})
    shown = [f"{key} {value:g}" for key, value in settings.items()]
    table = Table(title=", ".join([policy.name, *shown]))
    table.add_column()
    for title in outcomes:
        table.add_column(title, overflow="fold")

    def row(name: str, *cells: str) -> None:
        # Text: the answers may hold what rich would take for markup.
        table.add_row(name, *map(Text, cells))

    several = outcomes.values()
    row("prompt tokens", *map(_prompt, several))
    row("answer, full cache", *(repr(one.full_answer) for one in several))
    row(f"answer, {policy.name}", *(repr(one.answer) for one in several))
    row("audio-video tokens kept per layer", *map(_kept, several))
    row("merged into shared entries", *(f"{one.merged:.1f}" for one in several))
    row(
        "KV blocks freed",
        *(f"{one.freed_blocks} of the prompt's {one.prompt_blocks}" for one in several),
    )
    return table


def _prompt(outcome: Outcome) -> str:
    tokens = {name: round(count) for name, count in outcome.tokens.items()}
    text = outcome.prompt_tokens - sum(tokens.values())
    parts = ", ".join(f"{count} {name}" for name, count in {**tokens, "text": text}.items())
    return f"{outcome.prompt_tokens}: {parts}" if any(tokens.values()) else f"{text}"


def _kept(outcome: Outcome) -> str:
    kept, tokens = sum(outcome.kept.values()), sum(outcome.tokens.values())
    if not tokens:
        return "all: they fit into the budget"
    parts = ", ".join(f"{count:.1f} {name}" for name, count in outcome.kept.items())
    return f"{kept:.1f} of {tokens:.0f} ({kept / tokens:.0%}): {parts}"
