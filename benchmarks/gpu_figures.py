# SPDX-License-Identifier: Apache-2.0
"""From what gpu_bench.py has timed to its figures, each with its bound.

What was timed is a number under a key: ``prefill/LENGTH/ARM`` and ``decode/BATCH/ARM`` in seconds,
``text/BATCH/ARM`` and ``text/crowd`` in tokens of a request that are not audio or video,
``peak/ARM`` in requests, ``tight/ARM`` and ``ample/ARM`` in output tokens per second. Arms are
``stock``, ``full`` and the budgets; keys of the Vicuna-shaped model begin with ``vicuna/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """What was measured for a row; ``details`` are the numbers that it was computed from."""

    value: float
    bound: float | None = None
    details: str = ""


@dataclass(frozen=True)
class Clip:
    """The clip that prompts repeat: frames of ``height x width`` tokens, two frames to a step of
    the video tokens, and sound."""

    frames: int
    height: int
    width: int
    audio: int

    @property
    def tokens(self) -> int:
        return self.frames // 2 * self.height * self.width + self.audio


@dataclass(frozen=True)
class Scale:
    """How large everything is; lengths are audio-video tokens of a prompt.

    Attributes:
        lengths, main: prompts whose compaction is timed; the one that matters most.
        batches, stock_batch: requests that decode at once; those of them on stock vLLM.
        decode_steps, repetitions: steps and prefills whose time is taken.
        crowd, answer: prompts and output tokens of the requests below.
        tight, tight_requests: uncompressed requests that the tight KV space holds, and those sent.
        ample_requests: sent where all fit.
    """

    clip: Clip
    lengths: tuple[int, ...]
    main: int
    batches: tuple[int, ...]
    stock_batch: int
    decode_steps: int
    repetitions: int
    crowd: int
    answer: int
    tight: int
    tight_requests: int
    ample_requests: int
    budgets: tuple[float, ...] = (0.2, 0.1)


FULL_SCALE = Scale(
    clip=Clip(frames=32, height=8, width=12, audio=512),
    lengths=(2048, 8192, 16384, 32768),
    main=16384,
    batches=(1, 8, 32, 64),
    stock_batch=8,
    decode_steps=32,
    repetitions=5,
    crowd=4096,
    answer=128,
    tight=12,
    tight_requests=112,
    ample_requests=8,
)
SMALL_SCALE = Scale(
    clip=Clip(frames=16, height=3, width=4, audio=32),
    lengths=(128, 512),
    main=512,
    batches=(1, 2),
    stock_batch=2,
    decode_steps=4,
    repetitions=2,
    crowd=256,
    answer=8,
    tight=2,
    tight_requests=8,
    ample_requests=2,
)


def bound(weights: float, kv: float, rows: int, prompt: float, text: float, budget: float) -> float:
    """How much faster a decode step can get where only bytes take time.

    Args:
        weights: bytes of weights that a step reads.
        kv: bytes of keys and values of one token.
        rows: requests in the batch.
        prompt: audio-video tokens of each.
        text: its other tokens, the generated ones among them.
        budget: share of the audio-video tokens that stays.
    """
    full = weights + rows * kv * (prompt + text)
    return full / (weights + rows * kv * (budget * prompt + text))


def bytes_read(text: Mapping[str, Any], element: int = 2) -> tuple[int, int]:
    """Of a decoder with ``element`` bytes to a number, by its text configuration: bytes of the
    weights that a step reads, which are all but the embedding's, and of a token's keys and values.
    """
    hidden, layers, head = text["hidden_size"], text["num_hidden_layers"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    layer = 2 * hidden * (queries + keys) + 3 * hidden * text["intermediate_size"]
    weights = layers * layer + hidden * text["vocab_size"]
    return element * weights, element * layers * 2 * keys


def compaction(timed: Mapping[str, float], length: int, budget: float) -> Result | None:
    """Share of the prefill that AccKV adds."""
    full, ours = (timed.get(f"prefill/{length}/{arm}") for arm in ("full", f"{budget:g}"))
    if full is None or ours is None:
        return None
    return Result(ours / full - 1, None, f"{full * 1e3:.1f} → {ours * 1e3:.1f} ms")


def decode(
    timed: Mapping[str, float],
    scale: Scale,
    config: Mapping[str, Any],
    batch: int,
    budget: float,
) -> Result | None:
    """How much less time an output token takes."""
    full, ours = (timed.get(f"decode/{batch}/{arm}") for arm in ("full", f"{budget:g}"))
    if full is None or ours is None:
        return None
    text = timed[f"text/{batch}/{budget:g}"]
    limit = bound(*bytes_read(config), batch, scale.main, text, budget)
    return Result(full / ours, limit, f"{full * 1e3:.2f} → {ours * 1e3:.2f} ms, t = {text:.0f}")


def residents(timed: Mapping[str, float], scale: Scale, budget: float) -> Result | None:
    """Requests that decode at once in the tight KV space."""
    full, ours = (timed.get(f"peak/{arm}") for arm in ("full", f"{budget:g}"))
    if full is None or ours is None:
        return None
    text = timed["text/crowd"]
    limit = scale.tight * (scale.crowd + text) / (budget * scale.crowd + text)
    details = f"`full` {full:.0f}, t = {text:.0f}"
    return Result(ours, min(limit, scale.tight_requests), details)


def ratio(timed: Mapping[str, float], key: str, one: str, other: str) -> Result | None:
    """``other`` over ``one``, of output tokens per second."""
    first, second = timed.get(f"{key}/{one}"), timed.get(f"{key}/{other}")
    if first is None or second is None:
        return None
    return Result(second / first, None, f"{first:.0f} → {second:.0f} tokens/s")


def slower(timed: Mapping[str, float], key: str, *, rate: bool = False) -> Result | None:
    """By how much ``full`` is slower than stock vLLM; of ``rate``, higher is faster."""
    stock, full = timed.get(f"{key}/stock"), timed.get(f"{key}/full")
    if stock is None or full is None:
        return None
    if rate:
        return Result(stock / full - 1, None, f"{stock:.0f} → {full:.0f} tokens/s")
    return Result(full / stock - 1, None, f"{stock * 1e3:.2f} → {full * 1e3:.2f} ms")


def figures(
    timed: Mapping[str, float],
    scale: Scale,
    config: Mapping[str, Any],
    vicuna: Mapping[str, Any],
) -> Iterator[tuple[str, Result | None]]:
    """Key of a row and its figure, ``None`` where something that it needs was not timed.

    Args:
        config, vicuna: text configurations of the two models.
    """
    for budget in scale.budgets:
        for length in scale.lengths:
            yield f"compaction/{length}/{budget:g}", compaction(timed, length, budget)
        for batch in scale.batches:
            yield f"decode/{batch}/{budget:g}", decode(timed, scale, config, batch, budget)
        yield f"residents/{budget:g}", residents(timed, scale, budget)
        for key in ("tight", "ample"):
            yield f"{key}/{budget:g}", ratio(timed, key, "full", f"{budget:g}")
    yield "stock/prefill", slower(timed, f"prefill/{scale.main}")
    yield "stock/decode", slower(timed, f"decode/{scale.stock_batch}")
    yield "stock/ample", slower(timed, "ample", rate=True)
    prefix, budget, batch = "vicuna/", scale.budgets[0], scale.stock_batch
    own = {key.removeprefix(prefix): timed[key] for key in timed if key.startswith(prefix)}
    for key, figure in {
        f"compaction/{scale.main}/{budget:g}": compaction(own, scale.main, budget),
        f"decode/{batch}/{budget:g}": decode(own, scale, vicuna, batch, budget),
    }.items():
        yield prefix + key, figure
