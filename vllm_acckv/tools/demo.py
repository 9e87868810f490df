# SPDX-License-Identifier: Apache-2.0
"""A real server, a small trained model, one clip: what a KV policy does to answers and memory."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.evaluation.in_vllm import conversation
from vllm_acckv.evaluation.metrics import exact
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Policy
from vllm_acckv.tools.server import Metrics, Server

MODEL = Path(__file__).with_name("tiny_av_model")
"""The checkpoint of evaluation/tiny; its README.md says what it is."""
ANSWER_TOKENS = 40
COMPACTIONS = "vllm:kv_policy_compactions_total"
FREED_BLOCKS = "vllm:kv_policy_freed_blocks_total"
SKIPPED = "vllm:kv_policy_skipped_requests_total"
TOKENS = "vllm:kv_policy_tokens_total"
FINISHED = "vllm:request_success_total"


@dataclass(frozen=True)
class Outcome:
    """Answers with the full cache and under the policy, and what the server counted for the latter.

    Token counts are of one prompt, by modality ("video", "audio"), means over layers and KV heads;
    all are 0 if the policy left the prompts alone, because their clips fit into the budget.
    """

    full: tuple[str, ...]
    answers: tuple[str, ...]
    prompt_tokens: float
    tokens: dict[str, float]
    kept: dict[str, float]
    merged: float
    freed_blocks: float
    block_size: int


def run(
    output: Path, name: str, options: dict[str, float], seed: int, port: int, console: Console
) -> None:
    """Write a clip into ``output``, serve the model, ask, print the table.

    Args:
        name: of the policy.
        options: its ``budget`` and ``tau``, where given.
        seed: of the clip.

    Raises:
        ServerError: with the end of the server's log.
        KVPolicyError: for an unknown policy, or an option outside its range.
    """
    policy = make_policy(name, **options)
    # Without this, an end by SIGTERM would leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    samples = tiny_av.load(output / "clips", len(tiny_av.TASKS), seed).samples
    # With "=", because vLLM's parser takes a separate -0.5 for an option.
    flags = [f"--kv-policy={name}", *(f"--kv-{key}={value}" for key, value in options.items())]
    log = output / "server.log"
    server = Server(MODEL, *flags, media=output, log=log, port=port)
    console.print(Text(f"vllm serve {MODEL} {' '.join(flags)}", style="bold"), soft_wrap=True)
    with (
        console.status(f"Starting, most of a minute on two cores; log: {log} ...") as status,
        server,
    ):
        status.update("Asking, with the full cache and with less ...")
        outcome = ask(server, samples)
        status.update("Stopping the server ...")
    console.print(f"A clip of {tiny_av.SECONDS} seconds: {samples[0].video}, {samples[0].audio}")
    console.print(_table(outcome, samples, policy))
    console.print(_memory(outcome), soft_wrap=True)


def ask(server: Server, samples: Sequence[Sample]) -> Outcome:
    """Ask everything twice; the counters are differences around the second time."""
    count = len(samples)
    with server.client() as client:
        start = server.metrics()
        full = [_answer(client, server.model, one, {"kv_policy": "full"})[0] for one in samples]
        before = _after(server, start, count)
        answers, lengths = zip(
            *(_answer(client, server.model, one, {}) for one in samples), strict=True
        )
        after = _after(server, before, count)

    def each(name: str, **labels: str) -> float:
        return (after.value(name, **labels) - before.value(name, **labels)) / count

    modalities = ("video", "audio")
    return Outcome(
        full=tuple(full),
        answers=answers,
        prompt_tokens=sum(lengths) / count,
        tokens={name: each(TOKENS, modality=name) for name in modalities},
        kept={name: each(TOKENS, modality=name, fate="kept") for name in modalities},
        merged=each(TOKENS, fate="merged"),
        freed_blocks=each(FREED_BLOCKS),
        block_size=int(after.labels("vllm:cache_config_info")[0]["block_size"]),
    )


def _answer(client: OpenAI, model: str, sample: Sample, xargs: dict[str, str]) -> tuple[str, int]:
    """The answer's text and the number of prompt tokens."""
    completion = client.chat.completions.create(
        model=model,
        messages=conversation(sample),  # type: ignore[arg-type]
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={"vllm_xargs": xargs},
    )
    assert completion.usage is not None
    return completion.choices[0].message.content or "", completion.usage.prompt_tokens


def _after(server: Server, before: Metrics, requests: int) -> Metrics:
    """The metrics once so many more requests are finished, and compacted or counted as skipped."""

    def counted(metrics: Metrics) -> float:
        return metrics.value(COMPACTIONS) + metrics.value(SKIPPED)

    return server.wait_for_metrics(
        lambda now: (
            now.value(FINISHED) >= before.value(FINISHED) + requests
            and counted(now) >= counted(before) + requests
        ),
        "the counters of the requests",
    )


def _table(outcome: Outcome, samples: Sequence[Sample], policy: Policy) -> Table:
    settings = {"budget": policy.budget} | policy.model_dump(include={"tau"})
    shown = ", ".join([policy.name, *(f"{key} {value:g}" for key, value in settings.items())])
    table = Table()
    for title in ("question", "answer, full cache", f"answer, {shown}"):
        table.add_column(title, overflow="fold")
    for sample, full, answer in zip(samples, outcome.full, outcome.answers, strict=True):
        table.add_row(sample.question, _judged(full, sample), _judged(answer, sample))
    return table


def _judged(answer: str, sample: Sample) -> Text:
    # Text: the answers may hold what rich would take for markup.
    right = exact(answer, sample.answers) == 1
    return Text(f"{'right' if right else 'wrong'}: {answer}", "green" if right else "red")


def _memory(outcome: Outcome) -> str:
    kept, tokens = sum(outcome.kept.values()), sum(outcome.tokens.values())
    prompt = f"A prompt has {outcome.prompt_tokens:.0f} tokens"
    if not tokens:
        return f"{prompt}, and all stay: the clip fits into the budget."
    parts = " and ".join(f"{count:.0f} {name}" for name, count in outcome.tokens.items())
    stay = " and ".join(f"{count:.1f} {name}" for name, count in outcome.kept.items())
    blocks = -(-outcome.prompt_tokens // outcome.block_size)
    return (
        f"{prompt}, {parts}. Of these, {stay} stay in each layer ({kept / tokens:.0%}), "
        f"{outcome.merged:.1f} live on in merged entries; {outcome.freed_blocks:.1f} of "
        f"{blocks:.0f} KV blocks of {outcome.block_size} tokens return to the pool."
    )
