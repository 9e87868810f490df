# SPDX-License-Identifier: Apache-2.0
"""The half of gpu_bench.py that runs in an engine's own process: prompts and what is timed.

Numbers are yielded under the keys of gpu_figures.py as soon as they are there. What no longer fits
into the time is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gpu_figures import Scale

SAMPLE_RATE = 16_000
PART = "<|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
QUESTION = "What happens in the clips, and which sound is heard last? Answer the question shortly."
# Output tokens of a request that ends only because it is aborted.
ENDLESS = 1024
# Steps before those that are timed.
WARM_UP = 4
# More than a decode step takes, in seconds: only decides what still fits into the time.
STEP = 0.015

Timed = Iterator[tuple[str, float | str]]


class Bench:
    """An engine, stepped by hand."""

    def __init__(self, model: Path, scale: Scale, deadline: float, options: dict[str, Any]) -> None:
        """
        Args:
            deadline: on ``time.monotonic()``'s clock.
        """
        from vllm import LLM

        clips = max(scale.lengths) // scale.clip.tokens
        self.scale, self.deadline = scale, deadline
        self.llm = LLM(
            model=str(model),
            load_format="dummy",
            max_model_len=max(scale.lengths) + 2 * ENDLESS,
            max_num_seqs=max(scale.tight_requests, *scale.batches),
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"video": clips, "audio": clips, "image": 0},
            skip_mm_profiling=True,
            **options,
        )
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.block_size = self.scheduler.block_size
        self._prompts: dict[int, Any] = {}
        self._sent = 0

    def prompt(self, length: int) -> Any:
        """A processed prompt of ``length`` audio-video tokens; its text is at the end."""
        if length not in self._prompts:
            clip, count = self.scale.clip, length // self.scale.clip.tokens
            rng = np.random.default_rng(0)
            size = (clip.frames, 28 * clip.height, 28 * clip.width, 3)
            frames = rng.integers(0, 256, size, dtype=np.uint8)
            sound = rng.standard_normal(clip.audio * SAMPLE_RATE // 25).astype(np.float32) / 10
            text = f"<|im_start|>user\n{PART * count}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
            media = {"video": [frames] * count, "audio": [sound] * count}
            (prompt,) = self.llm._preprocess_cmpl([{"prompt": text, "multi_modal_data": media}])
            placeholders = prompt["mm_placeholders"]
            found = sum(part.length for parts in placeholders.values() for part in parts)
            assert found == length, f"{found} audio-video tokens instead of {length}"
            self._prompts[length] = prompt
        return self._prompts[length]

    def text(self, length: int) -> int:
        """Tokens of that prompt that are not audio or video."""
        return len(self.prompt(length)["prompt_token_ids"]) - length

    def send(self, length: int, count: int, answer: int, settings: dict[str, Any]) -> list[Any]:
        """Queue equal requests; all of the scheduler's, in the order of their arrival."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=answer,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=settings or None,
        )
        for _ in range(count):
            self.engine.add_request(f"{self._sent}", self.prompt(length), params)
            self._sent += 1
        return list(self.scheduler.requests.values())

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def fits(self, tokens: int, steps: int, token: float) -> bool:
        """Whether there is time for prompts of so many tokens, at ``token`` seconds for each, and
        for so many steps."""
        return time.monotonic() + 1.1 * tokens * token + steps * STEP < self.deadline

    def holds(self, requests: int, tokens: int) -> bool:
        """Whether the KV space does."""
        blocks = requests * -(-tokens // self.block_size)
        return blocks <= self.pool.get_num_free_blocks()

    def prefill(self, length: int, settings: dict[str, Any]) -> float:
        """Seconds to the first token, from the time when the request is queued."""
        self.send(length, 1, 1, settings)
        started = time.perf_counter()
        self.finish()
        return time.perf_counter() - started

    def prefills(self, length: int, arms: dict[str, Any]) -> dict[str, float]:
        """Medians, the arms in turn; the first round warms up."""
        taken: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(1 + self.scale.repetitions):
            for arm, settings in arms.items():
                taken[arm].append(self.prefill(length, settings))
        return {arm: statistics.median(times[1:]) for arm, times in taken.items()}

    def decode(
        self, length: int, batches: list[int], settings: dict[str, Any]
    ) -> dict[int, tuple[float, float]]:
        """Of each batch, seconds per output token, and tokens of a request beside audio and video.

        Requests join those that decode already, so each prompt is computed once.
        """
        found, requests = {}, []
        for batch in batches:
            requests = self.send(length, batch - len(requests), ENDLESS, settings)
            while not all(request.num_output_tokens for request in requests):
                self.engine.step()
            for _ in range(WARM_UP):
                self.engine.step()
            before = sum(request.num_output_tokens for request in requests)
            started = time.perf_counter()
            for _ in range(self.scale.decode_steps):
                self.engine.step()
            taken = time.perf_counter() - started
            after = sum(request.num_output_tokens for request in requests)
            text = self.text(length) + (before + after) / 2 / batch
            found[batch] = (taken * batch / (after - before), text)
        assert not any(request.num_preemptions for request in requests)
        self.engine.abort_request([f"{self._sent - 1 - one}" for one in range(len(requests))])
        self.prefill(min(self.scale.lengths), settings)  # a step may still be in flight
        return found

    def crowd(
        self, requests: int, settings: dict[str, Any], room: int | None = None
    ) -> tuple[int, float]:
        """Answer equal requests sent at once: the most that were decoding at the same time, and
        output tokens per second from the first prompt to the last token.

        Args:
            room: how many of them the KV space is to hold uncompressed (default: what it does).
        """
        length, answer = self.scale.crowd, self.scale.answer
        taken: list[Any] = []
        if room is not None:
            whole = length + self.text(length) + answer
            free = self.pool.get_num_free_blocks()
            taken = self.pool.get_new_blocks(free - room * -(-whole // self.block_size))
        self.send(length, requests, answer, settings)
        peak, started = 0, time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
            peak = max(peak, sum(one.num_output_tokens > 0 for one in self.scheduler.running))
        seconds = time.perf_counter() - started
        self.pool.free_blocks(taken)
        return peak, requests * answer / seconds


def arms(scale: Scale) -> dict[str, dict[str, Any]]:
    """Settings of a request, by name; a budget's name is its number."""
    budgets = {f"{budget:g}": {"kv_budget": budget} for budget in scale.budgets}
    return {"full": {"kv_policy": "full"}, **budgets}


def measure(
    bench: Bench,
    arms: dict[str, dict[str, Any]],
    batches: tuple[int, ...],
    *,
    tight: bool = False,
    ample: bool = False,
    lengths: tuple[int, ...] = (),
) -> Timed:
    """Time the arms, the most important first; with the reason where KV space is too small."""
    scale = bench.scale
    taken = bench.prefills(scale.main, arms)
    yield from ((f"prefill/{scale.main}/{arm}", value) for arm, value in taken.items())
    token = max(taken.values()) / scale.main
    yield from decodes(bench, arms, batches, token)
    work = len(arms) * scale.tight_requests * scale.crowd
    if tight and bench.fits(work, len(arms) * 1000, token):
        yield from tight_space(bench, arms)
    rounds = 4
    work = rounds * len(arms) * scale.ample_requests * scale.crowd
    if ample and bench.fits(work, rounds * len(arms) * 2 * scale.answer, token):
        yield from ample_space(bench, arms, rounds)
    for length in lengths:
        if bench.fits(len(arms) * (1 + scale.repetitions) * length, 0, token):
            taken = bench.prefills(length, arms)
            yield from ((f"prefill/{length}/{arm}", value) for arm, value in taken.items())


def decodes(
    bench: Bench, arms: dict[str, dict[str, Any]], batches: tuple[int, ...], token: float
) -> Timed:
    scale, chosen = bench.scale, []
    for batch in batches:
        if not bench.holds(batch, scale.main + ENDLESS // 2):
            reason = f"the KV space does not hold {batch} uncompressed requests"
            yield from ((f"decode/{batch}/{arm}", reason) for arm in arms)
        elif bench.fits(len(arms) * batch * scale.main, len(arms) * 300, token):
            chosen.append(batch)
    for arm, settings in arms.items():
        for batch, (taken, text) in bench.decode(scale.main, chosen, settings).items():
            yield f"decode/{batch}/{arm}", taken
            yield f"text/{batch}/{arm}", text


def tight_space(bench: Bench, arms: dict[str, dict[str, Any]]) -> Timed:
    scale = bench.scale
    yield "text/crowd", bench.text(scale.crowd) + scale.answer / 2
    for arm, settings in arms.items():
        peak, rate = bench.crowd(scale.tight_requests, settings, scale.tight)
        yield f"peak/{arm}", peak
        yield f"tight/{arm}", rate


def ample_space(bench: Bench, arms: dict[str, dict[str, Any]], rounds: int) -> Timed:
    """Medians, the arms in turn; the first round warms up."""
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, settings in arms.items():
            rates[arm].append(bench.crowd(bench.scale.ample_requests, settings)[1])
    yield from ((f"ample/{arm}", statistics.median(values[1:])) for arm, values in rates.items())
