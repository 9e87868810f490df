# SPDX-License-Identifier: Apache-2.0
"""What users rely on: no change without compression, memory comes back, batches do not mix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import (
    BLOCK_SIZE,
    CHUNK,
    LONG_QUESTION,
    QUESTION,
    Media,
    Reference,
    difference,
)
from tests.engines import RUNNER_V2, WITHOUT_PLUGIN, Answer, Ask, Engine, Trace
from tests.reference import naive_acckv


def assert_same(one: Answer, other: Answer, tolerance: float = 0.0) -> None:
    assert one.prompt == other.prompt
    assert one.tokens == other.tokens
    assert np.abs(one.logprobs - other.logprobs).max() <= tolerance


UNCOMPRESSED = {
    "full policy": lambda media: media.separate(xargs={"kv_policy": "full"}),
    "full policy, interleaved": lambda media: media.interleaved(xargs={"kv_policy": "full"}),
    "text only": lambda media: media.text(),
    "below an absolute budget": lambda media: media.separate(xargs={"kv_budget": 5000}),
    "budget of everything": lambda media: media.separate(xargs={"kv_budget": 1.0, "kv_tau": 0.9}),
    "less than a block to free": lambda media: media.ask(
        media.audio(seconds=2), xargs={"kv_budget": 0.9}
    ),
}


@pytest.mark.parametrize("case", UNCOMPRESSED)
def test_uncompressed_requests_equal_stock_vllm(
    acckv: Engine, start_engine: Callable[..., Engine], media: Media, case: str
) -> None:
    ask = UNCOMPRESSED[case](media)
    trace = acckv.run(ask)
    assert not trace.kept
    stock = start_engine({**acckv.environment, **WITHOUT_PLUGIN})
    assert_same(trace.answers[0], stock.answer(Ask(ask.messages, ask.audio_in_video)))


def test_full_policy_of_the_server_equals_stock_vllm(
    checkpoint: Path, stock: Engine, media: Media
) -> None:
    with Engine(checkpoint, additional_config={"kv_policy": {"policy": "full"}}) as full:
        for ask in (media.separate(), media.interleaved(), media.text()):
            trace = full.run(ask)
            assert not trace.kept
            assert "policy full" in trace.log[-1]
            assert_same(trace.answers[0], stock.answer(ask))


def test_engines_one_after_the_other_in_one_process(
    checkpoint: Path, stock: Engine, start_engine: Callable[..., Engine], media: Media
) -> None:
    """A notebook that tries a policy and goes back to plain vLLM gets plain vLLM."""
    ask = media.separate()
    plain = stock.answer(ask)
    compressed = start_engine({}, additional_config={"kv_policy": "acckv"}).answer(ask)
    with Engine(checkpoint) as engine:
        assert_same(engine.answer(ask), plain)
        engine.call("restart", additional_config={"kv_policy": "acckv"})
        assert_same(engine.answer(ask), compressed)
        engine.call("restart")
        assert_same(engine.answer(ask), plain)


def mixed(media: Media) -> list[Ask]:
    return [
        media.separate(seed=1, xargs={"kv_budget": 0.2}, max_tokens=14),
        media.text(max_tokens=6),
        media.interleaved(seed=2, xargs={"kv_budget": 0.1}, max_tokens=20),
        media.separate(seed=3, xargs={"kv_policy": "full"}, max_tokens=9),
        media.two_separate(xargs={"kv_budget": 40}, max_tokens=17),
        media.ask(media.video(seed=4, sound=False, seconds=8), max_tokens=5),
        media.ask(media.audio(seed=5, seconds=5), xargs={"kv_budget": 0.5}, max_tokens=12),
        media.two_interleaved(xargs={"kv_budget": 0.3, "kv_tau": -1.0}, max_tokens=11),
    ]


@pytest.fixture(scope="module")
def alone(acckv: Engine, media: Media) -> list[Trace]:
    """The requests of :func:`mixed`, one at a time."""
    return [acckv.run(ask) for ask in mixed(media)]


def assert_like_alone(trace: Trace, alone: list[Trace]) -> None:
    for number, single in enumerate(alone):
        assert_same(trace.answers[number], single.answers[0], 1e-4)
        assert trace.kept.get(f"r{number}") == single.kept.get("r0")
    assert trace.free_before == trace.free_after


def test_batch_of_eight_mixed_requests(acckv: Engine, media: Media, alone: list[Trace]) -> None:
    trace = acckv.run(*mixed(media))
    assert_like_alone(trace, alone)
    kept = {
        name: [layer["tokens"] for layer in layers.values()] for name, layers in trace.kept.items()
    }
    assert set(kept) == {"r0", "r2", "r4", "r5", "r6", "r7"}
    assert all(any(layer != layers[0] for layer in layers) for layers in kept.values())
    sets = [str(layers) for layers in kept.values()]
    assert len(set(sets)) == len(sets)


def test_hazard_12_rows_in_prefill_beside_compacted_rows(
    acckv_chunked: Engine, media: Media, alone: list[Trace]
) -> None:
    """Requests arrive while others decode; every prompt takes several chunks."""
    trace = acckv_chunked.run(*mixed(media), arrive=[0, 1, 3, 4, 7, 9, 10, 14])
    assert_like_alone(trace, alone)


def test_hazard_13_rows_move_when_others_finish(
    acckv: Engine, media: Media, alone: list[Trace]
) -> None:
    """Row order differs from arrival order because requests end at different steps."""
    trace = acckv.run(*mixed(media), arrive=[6, 0, 2, 0, 8, 0, 4, 7])
    assert_like_alone(trace, alone)


def long_ask(media: Media, **kwargs) -> Ask:
    """At least 3,000 audio-video tokens."""
    parts = [
        part
        for seed in range(4)
        for part in (
            media.video(seconds=28, seed=seed, sound=False),
            media.audio(seconds=28, seed=seed),
        )
    ]
    return media.ask(*parts, **kwargs)


def test_long_prompt_holds_the_computed_bound(
    acckv: Engine, media: Media, reference: Reference
) -> None:
    ask = long_ask(media, xargs={"kv_budget": 0.2}, max_tokens=40)
    trace = acckv.run(ask)
    (answer,) = trace.answers
    modality = reference.modality(answer.prompt)
    assert sum(code != naive_acckv.TEXT for code in modality) >= 3000
    _, freed, active = naive_acckv.naive_plan(modality, 0.2, BLOCK_SIZE)
    assert active
    length = len(answer.prompt)
    blocks = -(-length // BLOCK_SIZE)
    held = [step["r0"] for step in trace.held if "r0" in step]
    prefill_steps = held.index(max(held)) + 1
    assert max(held) == blocks
    for generated, count in enumerate(held[prefill_steps:], start=1):
        assert count <= -(-(length + generated) // BLOCK_SIZE) - freed
    assert freed > 0.7 * blocks
    assert trace.free_before == trace.free_after


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_abort_returns_every_block(acckv: Engine, media: Media, step: int) -> None:
    """Before, in, and after the step that compacts (chunks of up to 2048 tokens)."""
    asks = [long_ask(media, max_tokens=30), media.separate(max_tokens=12)]
    trace = acckv.run(*asks, abort={0: step})
    assert trace.free_before == trace.free_after
    assert len(trace.answers) == 1


def test_hazard_2_nothing_is_compacted_before_the_prompt_is_complete(
    acckv_chunked: Engine, media: Media
) -> None:
    trace = acckv_chunked.run(media.separate(question=LONG_QUESTION, max_tokens=8))
    held = [step["r0"] for step in trace.held if "r0" in step]
    blocks = -(-len(trace.answers[0].prompt) // BLOCK_SIZE)
    growing = held[: held.index(blocks) + 1]
    assert len(growing) > 3
    assert growing == sorted(growing)
    assert held[len(growing)] < blocks


def test_hazard_3_trailing_text_split_over_chunks(
    acckv: Engine, acckv_chunked: Engine, media: Media, reference: Reference
) -> None:
    """Scores of several chunks accumulate to those of one."""
    ask = media.separate(question=LONG_QUESTION)
    whole, split = acckv.run(ask), acckv_chunked.run(ask)
    modality = reference.modality(whole.answers[0].prompt)
    start = naive_acckv.first_trailing_text(modality)
    assert len(modality) - start > 64  # longer than a chunk
    assert split.kept == whole.kept_up_to_rounding()
    assert_same(split.answers[0], whole.answers[0], 1e-4)


def test_hazard_4_last_prompt_token_alone_in_its_chunk(
    acckv: Engine, acckv_chunked: Engine, media: Media
) -> None:
    """A chunk of one token would run as a decode, where nothing is compacted: the last chunk takes
    a second token from the one before."""
    length = len(acckv.answer(media.separate(max_tokens=1)).prompt)
    missing = (1 - length) % CHUNK
    ask = media.separate(question=QUESTION + " a" * missing)
    whole, split = acckv.run(ask), acckv_chunked.run(ask)
    assert len(whole.answers[0].prompt) % CHUNK == 1
    assert split.kept == whole.kept_up_to_rounding() and split.kept
    assert_same(split.answers[0], whole.answers[0], 1e-4)


def test_hazard_7_blocks_stay_while_the_compacting_step_is_in_flight(
    start_engine: Callable[..., Engine], media: Media, reference: Reference
) -> None:
    """Under async scheduling the next step is scheduled before the compaction has run; its counts
    are ahead of what is done, and blocks freed by them would be overwritten too early."""
    engine = start_engine({}, additional_config={"kv_policy": "acckv"})
    ask = media.separate()
    held = engine.call("schedule_ahead", ask)
    modality = reference.modality(engine.answer(ask).prompt)
    _, freed, _ = naive_acckv.naive_plan(modality, 0.2, BLOCK_SIZE)
    prompt, one_more, two_more = (-(-(len(modality) + more) // BLOCK_SIZE) for more in (0, 1, 2))
    assert freed > 0
    assert held == {
        "prefill": prompt,
        "decode in flight": one_more,
        "prefill done": two_more - freed,
    }


def test_hazard_8_preemption_starts_over(acckv: Engine, media: Media, alone: list[Trace]) -> None:
    """A preempted request is computed again and compacted again, and counted once."""
    for step in (2, 6):
        trace = acckv.run(*mixed(media), preempt_at=step)
        for number, single in enumerate(alone):
            assert trace.answers[number].tokens == single.answers[0].tokens
        assert trace.free_before == trace.free_after
        finished = [line.split("; ")[1] for line in trace.log if "freed" in line]
        lines = [line for single in alone for line in single.log if "freed" in line]
        assert sorted(finished) == sorted(line.split("; ")[1] for line in lines)
        for name in ("compactions", "freed_blocks", "tokens/video/kept", "tokens/audio/evicted"):
            expected = sum(single.counters.get(name, 0) for single in alone)
            assert trace.counters[name] == pytest.approx(expected)
        assert trace.counters["compactions"] == 6


def test_a_request_that_ends_with_its_first_token(acckv: Engine, media: Media) -> None:
    """It is compacted, reported once, and its blocks count as freed by its end."""
    trace = acckv.run(media.separate(max_tokens=1))
    assert len(trace.log) == 1
    assert "freed 0 of" in trace.log[0]
    assert "entries, video kept" in trace.log[0]
    assert trace.counters["compactions"] == 1
    assert trace.counters["freed_blocks"] == 0
    assert trace.free_before == trace.free_after


def test_hazard_15_several_answers_and_prompt_logprobs(
    acckv: Engine, media: Media, alone: list[Trace]
) -> None:
    """Each answer of ``n=3`` is compacted by itself; prompt log-probabilities are the model's."""
    ask = mixed(media)[0]
    ask.sampling = {"n": 3, "temperature": 0.01, "seed": 0, "prompt_logprobs": 2}
    trace = acckv.run(ask)
    assert trace.answers[0].tokens == alone[0].answers[0].tokens
    assert trace.counters["compactions"] == 3
    assert trace.free_before == trace.free_after


@pytest.mark.parametrize("preempt_at", [None, 1, 2])
def test_hazard_8_nothing_is_remembered_after_an_abort(
    acckv_chunked: Engine, media: Media, preempt_at: int | None
) -> None:
    """Aborted before, in and after its compaction, also after a preemption."""
    asks = [media.separate(seed=seed, max_tokens=30) for seed in range(6)]
    abort = {0: 1, 1: 3, 2: 5, 3: 7, 4: 12, 5: 20}
    trace = acckv_chunked.run(*asks, abort=abort, preempt_at=preempt_at)
    assert trace.free_before == trace.free_after
    assert set(acckv_chunked.call("leftovers").values()) == {0}


def test_hazard_9_pool_returns_to_its_start_value(acckv: Engine, media: Media) -> None:
    before = acckv.call("free_blocks")
    for _ in range(3):
        acckv.run(*mixed(media))
    assert acckv.call("free_blocks") == before


def test_hazard_10_null_block_is_never_written(acckv: Engine, media: Media) -> None:
    acckv.run(*mixed(media))
    assert acckv.call("null_block") == 0


ONE_SIDED = {
    "video only": lambda media: media.ask(media.video(sound=False, seconds=8)),
    "audio only": lambda media: media.ask(media.audio(seconds=6)),
    "audio before video": lambda media: media.ask(media.audio(), media.video(sound=False)),
}


@pytest.mark.parametrize("case", ONE_SIDED)
def test_hazard_16_one_modality_or_the_other_order(
    acckv: Engine, media: Media, reference: Reference, case: str
) -> None:
    ask = ONE_SIDED[case](media)
    trace = acckv.run(ask)
    (answer,) = trace.answers
    _, expected = reference.answer(ask, 0.2, answer.tokens, tau=0.6)
    assert expected.active
    assert difference(answer, expected.logprobs) < 1e-3
    for layer, selection in zip(trace.kept["r0"].values(), expected.selections, strict=True):
        assert layer["tokens"] == selection.kept


SABOTAGE = [
    (
        "vllm_acckv.engine.startup:activate",
        r"layers\.0.*runs on the attention backend vllm\.v1",
        {},
    ),
    ("vllm_acckv.engine.runners:install", "did not announce its batch", {}),
    ("vllm_acckv.engine.runners:install", "ran a step that the KV policy did not see", RUNNER_V2),
    (
        "vllm_acckv.engine.cpu_attention:KVPolicyCPUAttentionBackend.customize_spec",
        r"layers\.0.*its KV cache is a FullAttentionSpec",
        {},
    ),
]


@pytest.mark.parametrize(("undone", "message", "environment"), SABOTAGE)
def test_hazard_1_a_policy_that_does_not_run_is_refused(
    checkpoint: Path, media: Media, undone: str, message: str, environment: dict[str, str]
) -> None:
    """Another plugin took a part of the machinery away: the engine says so and stops."""
    config = {"kv_policy": "acckv"}
    with (
        Engine(checkpoint, environment, additional_config=config, sabotage=undone) as engine,
        pytest.raises(RuntimeError, match=message),
    ):
        engine.run(media.separate())
