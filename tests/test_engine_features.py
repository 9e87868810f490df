# SPDX-License-Identifier: Apache-2.0
"""vLLM's sampling features beside a policy: alone as in a batch, and right by an outside oracle.

The oracle gives the logits (transformers with the naive AccKV, following the answer's tokens);
what a feature makes of logits is restated here. Under Triton's interpreter model runner V2 runs
neither top-k and top-p sampling nor grammar bitmasks, so those are tested on V1 alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.conftest import Media, Reference
from tests.engines import Answer, Ask, Engine

POLICY = {"kv_policy": "acckv"}
TOLERANCE = 1e-4


def assert_alike(one: Answer, other: Answer) -> None:
    """The same request in batches and chunks of other sizes; some log-probabilities are -inf."""
    assert (one.tokens, one.text, one.end) == (other.tokens, other.text, other.end)
    assert np.allclose(one.logprobs, other.logprobs, rtol=0, atol=TOLERANCE)


def expected_logprobs(reference: Reference, ask: Ask, answer: Answer) -> np.ndarray:
    """Log-probabilities of the reference when it follows the tokens of ``answer``."""
    _, expected = reference.answer(ask, 0.2, answer.tokens, tau=0.6)
    return np.asarray(expected.logprobs).copy()


# Seeds and several answers


@pytest.mark.parametrize("control", [{}, {"top_k": 20, "top_p": 0.9}], ids=["all", "top-k, top-p"])
def test_a_seed_fixes_the_answer(
    runner: dict[str, str], acckv: Engine, media: Media, control: dict[str, float]
) -> None:
    if control and runner:
        pytest.skip("Triton's interpreter cannot sort")
    sampling = {"temperature": 1.0, **control}
    seeded = [
        media.separate(sampling={**sampling, "seed": 1}),
        media.separate(sampling={**sampling, "seed": 2}),
        media.interleaved(sampling={**sampling, "seed": 1}),
    ]
    alone = [acckv.answer(ask) for ask in seeded]
    assert acckv.answer(seeded[0]).tokens == alone[0].tokens
    assert alone[0].tokens != alone[1].tokens
    others = [media.separate(), media.text(sampling=sampling), media.two_separate(max_tokens=5)]
    trace = acckv.run(others[0], *seeded, *others[1:])
    for number, answer in enumerate(alone, start=1):
        assert_alike(trace.answers[number], answer)
    assert trace.counters["compactions"] == 5


def test_a_seed_survives_chunks(acckv_chunked: Engine, media: Media) -> None:
    """vLLM takes back what a seeded generator gave for a row in the middle of its prompt, in a way
    that CPU generators do not have; stock vLLM 0.32 stops there."""
    asks = [
        media.separate(seed=number, sampling={"temperature": 0.8, "seed": number})
        for number in range(3)
    ]
    alone = [acckv_chunked.answer(ask) for ask in asks]
    together = acckv_chunked.run(*asks, arrive=[0, 1, 2], preempt_at=9).answers
    for one, other in zip(alone, together, strict=True):
        assert_alike(one, other)


def test_answers_of_n_are_those_of_the_next_seeds(acckv: Engine, media: Media) -> None:
    """vLLM gives completion i the seed ``seed + i``; each is compacted by itself."""
    sampling = {"temperature": 1.0, "seed": 5}
    seeds = [media.separate(sampling={**sampling, "seed": seed}) for seed in (5, 6, 7)]
    alone = [answer.tokens for answer in acckv.run(*seeds).answers]
    assert len({str(tokens) for tokens in alone}) == 3
    trace = acckv.run(media.separate(sampling={**sampling, "n": 3}), media.interleaved())
    assert trace.answers[0].completions == alone
    assert trace.counters["compactions"] == 4
    assert trace.free_before == trace.free_after


# Log-probabilities


def test_few_logprobs_are_those_of_the_whole_vocabulary(
    acckv: Engine, media: Media, reference: Reference
) -> None:
    """The five best and the sampled token, which is seldom among them at this temperature."""
    ask = media.separate(sampling={"temperature": 2.0, "seed": 3, "logprobs": 5})
    (answer,) = acckv.run(ask).answers
    expected = expected_logprobs(reference, ask, answer)
    given = np.isfinite(answer.logprobs)
    for row, token, best in zip(given, answer.tokens, np.argsort(-expected), strict=True):
        assert set(np.flatnonzero(row)) == {token, *best[:5]}
    assert given.sum(1).max() == 6
    assert np.abs(answer.logprobs[given] - expected[given]).max() < 1e-3


PROMPT_LOGPROBS = {
    "whole prompt": {},
    "chunks": {"max_num_batched_tokens": 64},
    "prefix caching": {"enable_prefix_caching": True},
}
LATE = {"kv_policy_config": {"compress_before_last_token": True}}


@pytest.mark.parametrize("xargs", [{"kv_budget": 0.1}, LATE], ids=["small", "before last token"])
@pytest.mark.parametrize("case", PROMPT_LOGPROBS)
def test_prompt_logprobs_are_those_of_stock_vllm(
    runner: dict[str, str],
    start_engine: Callable[..., Engine],
    stock: Engine,
    media: Media,
    case: str,
    xargs: dict[str, Any],
) -> None:
    """They come from prefill, which no policy changes. With the compression in front of the last
    prompt token only the answer changes, because that token predicts the first one of it."""
    engine = start_engine(runner, additional_config=POLICY, **PROMPT_LOGPROBS[case])
    sampling = {"prompt_logprobs": 3}
    ask = media.separate(xargs=xargs, sampling=sampling)
    again = engine.run(media.separate(xargs=xargs), media.separate(xargs=xargs, seed=1))
    trace = engine.run(ask, media.separate(xargs=xargs, seed=1, sampling=sampling))
    for number, answer in enumerate(trace.answers):
        assert trace.kept[f"r{number}"]
        assert answer.cached == 0  # vLLM looks nothing up for a request that wants all rows
        assert_alike(answer, again.answers[number])
        expected = stock.answer(media.separate(seed=number, sampling=sampling))
        assert answer.prompt_logprobs is not None and expected.prompt_logprobs is not None
        assert answer.prompt_logprobs.shape == (len(answer.prompt) - 1, answer.logprobs.shape[1])
        given = np.isfinite(answer.prompt_logprobs)
        assert (given == np.isfinite(expected.prompt_logprobs)).all()
        assert given.sum(1).min() >= 3
        gap = np.abs(answer.prompt_logprobs[given] - expected.prompt_logprobs[given]).max()
        assert gap < TOLERANCE
        first = np.abs(answer.logprobs[0] - expected.logprobs[0]).max()
        assert first > 1e-2 if xargs is LATE else first < TOLERANCE
    if case == "prefix caching":
        assert engine.answer(media.separate(xargs=xargs)).cached > 0


# Structured outputs

COLOURS = ["red circle", "blue square", "green triangle"]
SCHEMA = {
    "type": "object",
    "properties": {"loud": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
    "required": ["loud", "colour"],
    "additionalProperties": False,
}


SOUNDS = [{"loud": loud, "colour": colour} for loud in (True, False) for colour in ("red", "blue")]
GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "choice": ({"choice": COLOURS}, COLOURS.__contains__),
    "regular expression": ({"regex": "[a-c]{9,12}!"}, re.compile("[a-c]{9,12}!").fullmatch),
    "JSON schema": ({"json": SCHEMA}, lambda text: json.loads(text) in SOUNDS),
}


def test_structured_outputs(
    start_engine: Callable[..., Engine], media: Media, reference: Reference, checkpoint: Path
) -> None:
    engine = start_engine({}, additional_config=POLICY)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # Or a model without sense would fill the JSON up with them.
    spaces = [tokenizer.encode(space)[0] for space in " \n\r\t"]
    sampling = {"ignore_eos": False, "logit_bias": dict.fromkeys(spaces, -50.0)}
    asks = [
        media.separate(
            seed=seed, max_tokens=60, sampling={**sampling, "structured_outputs": grammar}
        )
        for grammar, _ in GRAMMARS.values()
        for seed in (0, 1)
    ]
    asks.append(media.interleaved(max_tokens=20, sampling=sampling))
    alone = [engine.answer(ask) for ask in asks]
    trace = engine.run(*asks, arrive=[0, 3, 1, 0, 2, 5, 4])
    assert trace.counters["compactions"] == len(asks)
    assert trace.free_before == trace.free_after
    for ask, answer, single in zip(asks, trace.answers, alone, strict=True):
        assert_alike(answer, single)
        # Log-probabilities are over the tokens that the grammar allows.
        expected = expected_logprobs(reference, ask, answer)
        expected[np.isneginf(answer.logprobs)] = -np.inf
        expected -= np.log(np.exp(expected).sum(1, keepdims=True))
        assert np.allclose(answer.logprobs, expected, rtol=0, atol=1e-3)
        expected[:, spaces] -= 50
        assert answer.tokens == expected.argmax(1).tolist()
    valid = [accepts for _, accepts in GRAMMARS.values() for _ in (0, 1)]
    for answer, accepts in zip(trace.answers, valid, strict=False):
        assert answer.end == ("stop", None)
        assert accepts(answer.text), answer.text


# Penalties, biases and ends

Process = Callable[[np.ndarray, list[int], list[int]], None]
"""Changes a row of logits in place, given the prompt and the tokens generated before it."""


def unchanged(row: np.ndarray, prompt: list[int], before: list[int]) -> None:
    pass


def repetition(row: np.ndarray, prompt: list[int], before: list[int]) -> None:
    seen = list({*prompt, *before})
    row[seen] = np.where(row[seen] > 0, row[seen] / 0.5, row[seen] * 0.5)


def frequency(row: np.ndarray, prompt: list[int], before: list[int]) -> None:
    for token, count in Counter(before).items():
        row[token] -= 1.5 * count + 0.5


def only(*tokens: int) -> Process:
    def process(row: np.ndarray, prompt: list[int], before: list[int]) -> None:
        row[np.setdiff1d(np.arange(len(row)), tokens)] = -np.inf

    return process


def plus(bias: dict[int, float], until: int = 99) -> Process:
    def process(row: np.ndarray, prompt: list[int], before: list[int]) -> None:
        if len(before) < until:
            row[list(bias)] += list(bias.values())

    return process


def greedy(logits: np.ndarray, process: Process, prompt: list[int], tokens: list[int]) -> list[int]:
    rows = logits.copy()
    for step, row in enumerate(rows):
        process(row, prompt, tokens[:step])
    return rows.argmax(1).tolist()


@dataclass(frozen=True)
class Plain:
    """An answer without controls, its tokens, and the first that is a word."""

    answer: Answer
    tokens: list[int]
    token: int
    text: str


@pytest.fixture(scope="module")
def plain(acckv: Engine, media: Media, checkpoint: Path) -> Plain:
    tokenizer, answer = AutoTokenizer.from_pretrained(checkpoint), acckv.answer(media.separate())
    words = ((token, tokenizer.decode([token])) for token in answer.tokens)
    token, text = next(one for one in words if re.fullmatch("[a-z]{2,}", one[1]))
    return Plain(answer, answer.tokens, token, text)


CONTROLS: dict[str, Callable[[Plain], tuple[dict[str, Any], Process]]] = {
    "repetition penalty": lambda plain: ({"repetition_penalty": 0.5}, repetition),
    "frequency and presence penalty": lambda plain: (
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        frequency,
    ),
    "bias": lambda plain: (
        {"logit_bias": {plain.tokens[0]: -3.0, plain.tokens[2]: 3.0}},
        plus({plain.tokens[0]: -3.0, plain.tokens[2]: 3.0}),
    ),
    "allowed tokens": lambda plain: ({"allowed_token_ids": [20, 30, 40, 50]}, only(20, 30, 40, 50)),
    "bad words": lambda plain: ({"bad_words": [plain.text]}, plus({plain.token: -np.inf})),
    "least tokens": lambda plain: (
        {"stop_token_ids": [plain.tokens[1]], "min_tokens": 8},
        plus({plain.tokens[1]: -np.inf}, until=8),
    ),
    "stop token": lambda plain: ({"stop_token_ids": [plain.tokens[4]]}, unchanged),
    "stop string": lambda plain: ({"stop": [plain.text]}, unchanged),
}


@pytest.fixture(scope="module")
def controlled(acckv: Engine, media: Media, plain: Plain) -> dict[str, tuple[Ask, Answer, Answer]]:
    """For each of ``CONTROLS`` a request, its answer alone, and that in a batch with them all."""
    asks = [media.separate(sampling=control(plain)[0]) for control in CONTROLS.values()]
    trace = acckv.run(media.interleaved(), *asks, arrive=[0, 4, 0, 2, 1, 0, 3, 0, 1])
    alone = [acckv.answer(ask) for ask in asks]
    return dict(zip(CONTROLS, zip(asks, alone, trace.answers[1:], strict=True), strict=True))


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_of_sampling(
    controlled: dict[str, tuple[Ask, Answer, Answer]], plain: Plain, reference: Reference, name: str
) -> None:
    """Every row of a batch has a control of its own; the logits are those of the policy, and the
    prompt that a penalty counts is the whole one."""
    ask, answer, in_batch = controlled[name]
    assert_alike(in_batch, answer)
    expected = expected_logprobs(reference, ask, answer)
    assert np.abs(answer.logprobs - expected).max() < 1e-3
    # The special tokens' rows of the tiny model's last layer are zero, and so are their logits.
    logits = expected - expected[:, -1:]
    _, process = CONTROLS[name](plain)
    assert answer.tokens == greedy(logits, process, answer.prompt, answer.tokens)
    assert answer.tokens != plain.tokens
    if name == "stop string":
        assert answer.end == ("stop", plain.text)
        assert answer.text == plain.answer.text.partition(plain.text)[0]
    elif name == "stop token":
        assert answer.end == ("stop", plain.tokens[4])
        assert len(answer.tokens) == plain.tokens.index(plain.tokens[4]) + 1
    else:
        assert len(answer.tokens) >= 8
    if name == "repetition penalty":  # the prompt counts: without it, tokens would differ
        assert answer.tokens != greedy(logits, process, [], answer.tokens)


def test_penalties_without_compression_equal_stock_vllm(
    acckv: Engine, stock: Engine, media: Media
) -> None:
    sampling = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5}
    penalised = acckv.answer(media.separate(xargs={"kv_policy": "full"}, sampling=sampling))
    assert_alike(penalised, stock.answer(media.separate(sampling=sampling)))
    assert penalised.tokens != stock.answer(media.separate()).tokens


# Beam search


def test_beam_search_equals_stock_vllm(acckv: Engine, stock: Engine, media: Media) -> None:
    """Every step of a beam is a request of one token, which the whole prompt predicts."""
    ask = media.separate(max_tokens=4)
    before = acckv.call("free_blocks")
    beams, compactions = acckv.call("beams", ask, 3)
    assert acckv.call("free_blocks") == before
    assert compactions == 1 + 3 * 3
    expected, _ = stock.call("beams", ask, 3)
    assert [tokens for tokens, _ in beams] == [tokens for tokens, _ in expected]
    assert len({str(tokens) for tokens, _ in beams}) == 3
    for (_, logprob), (_, other) in zip(beams, expected, strict=True):
        assert logprob == pytest.approx(other, abs=1e-3)
