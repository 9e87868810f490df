# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --kv-policy``: good and bad requests, counters and log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import test_dashboard
from tests.conftest import Media
from vllm_acckv.tools import clips
from vllm_acckv.tools.demo import COMPACTIONS, FINISHED, FREED_BLOCKS, SKIPPED, TOKENS
from vllm_acckv.tools.server import Metrics, Server

POLICY = ("--kv-policy", "acckv")
USAGE = "vllm:kv_cache_usage_perc"
RUNNING = "vllm:num_requests_running"
SAVED_BLOCKS = "vllm:kv_policy_saved_blocks"
SAVED_TOKENS = "vllm:kv_policy_saved_tokens"
SECONDS_SPENT = "vllm:kv_policy_compaction_seconds"
SECONDS = 12
QUESTION = {"type": "text", "text": "What happens in the clip?"}
AUDIO_IN_VIDEO = {"mm_processor_kwargs": {"use_audio_in_video": True}}


@pytest.fixture(scope="module")
def server(
    checkpoint: Path, media: Media, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ("--kv-policy", "acckv", "--kv-request-max-budget", "1")
    with Server(checkpoint, *flags, media=media.folder, log=log) as running:
        yield running


def ask(server: Server, content: list[dict[str, Any]], body: dict[str, Any], **options: Any) -> Any:
    """A completion, or with ``stream=True`` its chunks as they come."""
    options = {"max_tokens": 12, "temperature": 0, **options}
    return server.client().chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
        extra_body={"return_token_ids": True, "ignore_eos": True, **body},
        **options,
    )


def clip_request(media: Media, layout: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Content and further body fields of a question about sound and pictures."""
    if layout == "separate":
        parts = [media.video(seconds=SECONDS, sound=False), media.audio(seconds=SECONDS)]
        return [*parts, QUESTION], {}
    return [media.video(seconds=SECONDS), QUESTION], AUDIO_IN_VIDEO


def after_one_more(server: Server, before: Metrics, counter: str) -> Metrics:
    """The metrics when a further request is finished, counted by ``counter`` and gone."""
    return server.wait_for_metrics(
        lambda now: (
            now.value(FINISHED) == before.value(FINISHED) + 1
            and now.value(counter) == before.value(counter) + 1
            and now.value(RUNNING) == 0
        ),
        f"{counter} to count one more request",
    )


def policy_lines(server: Server, request_id: str) -> list[str]:
    """The lines that the log has for a request; waits for the first."""
    mark = f"KV policy: request {request_id}"
    server.wait_until(lambda: mark in server.log.read_text(), f"a log line of {request_id}")
    return [line for line in server.log.read_text().splitlines() if mark in line]


def placeholders(checkpoint: Path, prompt: list[int]) -> dict[str, int]:
    """Audio-video tokens of a prompt, by modality."""
    config = json.loads((checkpoint / "config.json").read_text())["thinker_config"]
    return {name: prompt.count(config[f"{name}_token_index"]) for name in ("video", "audio")}


def assert_compacted(
    before: Metrics, after: Metrics, tokens: dict[str, int], lines: list[str]
) -> None:
    """Counters and log say that one prompt with ``tokens`` was compacted."""

    def difference(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    for modality, count in tokens.items():
        assert count > 0
        assert difference(TOKENS, modality=modality) == pytest.approx(count)
    kept, total = difference(TOKENS, fate="kept"), sum(tokens.values())
    assert 0 < kept < total
    assert difference(TOKENS, fate="evicted") > 0
    assert difference(f"{SECONDS_SPENT}_count") == 1
    assert difference(f"{SECONDS_SPENT}_sum") > 0
    assert after.value(SAVED_BLOCKS) == after.value(SAVED_TOKENS) == 0
    freed = difference(FREED_BLOCKS)
    assert freed > 0
    assert difference(SKIPPED) == 0
    assert after.value(USAGE) == before.value(USAGE)
    assert len(lines) == 1
    assert f"freed {freed:.0f} of " in lines[0]


@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_clip_is_compacted(server: Server, media: Media, checkpoint: Path, layout: str) -> None:
    content, body = clip_request(media, layout)
    before = server.metrics()
    completion = ask(server, content, body)
    assert completion.usage.completion_tokens == 12
    after = after_one_more(server, before, COMPACTIONS)
    tokens = placeholders(checkpoint, completion.prompt_token_ids)
    assert_compacted(before, after, tokens, policy_lines(server, completion.id))


def test_streamed_clip_is_compacted(server: Server, media: Media, checkpoint: Path) -> None:
    content, body = clip_request(media, "separate")
    before = server.metrics()
    chunks = list(ask(server, content, body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 3
    after = after_one_more(server, before, COMPACTIONS)
    tokens = placeholders(checkpoint, chunks[0].prompt_token_ids)
    assert_compacted(before, after, tokens, policy_lines(server, chunks[0].id))


@pytest.mark.parametrize(
    ("layout", "xargs", "reason"),
    [(None, {}, "no audio or video"), ("separate", {"kv_policy": "full"}, "policy full")],
)
def test_request_without_compaction(
    server: Server, media: Media, layout: str | None, xargs: dict[str, str], reason: str
) -> None:
    content, body = clip_request(media, layout) if layout else ([QUESTION], {})
    before = server.metrics()
    completion = ask(server, content, {**body, "vllm_xargs": xargs})
    after = after_one_more(server, before, SKIPPED)
    assert after.value(SKIPPED, reason=reason) == before.value(SKIPPED, reason=reason) + 1
    assert after.value(COMPACTIONS) == before.value(COMPACTIONS)
    if layout:
        (line,) = policy_lines(server, completion.id)
        assert f"kept all ({reason})" in line
    else:
        assert completion.id not in server.log.read_text()


def bad_media(media: Media, what: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    path = media.folder / f"{what.replace(' ', '-')}"
    part = {"type": "video_url", "video_url": {"url": path.as_uri()}}
    if what == "corrupt mp4":
        path.write_bytes(b"\x00\x01 these bytes are no movie" * 99)
    elif what == "half an mp4":
        whole = clips.make_clip(path, seconds=2).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif what == "silent mp4":
        return [media.video(sound=False), QUESTION], AUDIO_IN_VIDEO
    else:
        clips.make_wav(path, seconds=1)
        header = 44
        path.write_bytes(path.read_bytes()[:40] + bytes(4) if what == "empty wav" else b"")
        assert path.stat().st_size == (header if what == "empty wav" else 0)
        part = {"type": "audio_url", "audio_url": {"url": path.as_uri()}}
    return [part, QUESTION], {}


def assert_refused(
    server: Server, content: list[dict[str, Any]], body: dict[str, Any], parts: tuple[str, ...]
) -> None:
    """HTTP 400 with one line that has all ``parts``; then all is as before."""
    before = server.metrics()
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, content, body)
    message = caught.value.body["message"]  # type: ignore[index]
    assert caught.value.status_code == 400, message
    assert all(part in message for part in parts), message
    assert "\n" not in message
    ask(server, [QUESTION], {})
    after = after_one_more(server, before, SKIPPED)
    assert after.value(COMPACTIONS) == before.value(COMPACTIONS)
    assert after.value(USAGE) == before.value(USAGE)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("corrupt mp4", "Could not open video stream"),
        ("half an mp4", "Could not open video stream"),
        ("silent mp4", "No audio stream found"),
        ("empty wav", "too short"),
        ("no wav", "Invalid or corrupted audio data"),
    ],
)
def test_bad_media_gets_400(server: Server, media: Media, what: str, message: str) -> None:
    content, body = bad_media(media, what)
    assert_refused(server, content, body, (message,))


BUDGET_RANGE = "a ratio in (0, 1] or a whole number above 1"


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("kv_policy", "nope", ("'nope'", "acckv, acckv_plus")),
        ("kv_budget", 0, ("is 0;", BUDGET_RANGE)),
        ("kv_budget", -1, ("is -1;", BUDGET_RANGE)),
        ("kv_budget", 1.5, ("is 1.5;", BUDGET_RANGE)),
        ("kv_budget", "abc", ("'abc'", BUDGET_RANGE)),
        ("kv_tau", 2, ("is 2;", "[-1, 1]")),
        ("kv_policy", "fastv", ("kv_budget is 0.2", "0.50")),
        ("kv_budgets", 0.5, ("'kv_budgets'", "kv_policy, kv_budget, kv_tau")),
        ("kv_budget", 160, ("is 160;", "a ratio of at most 1 (--kv-request-max-budget)")),
    ],
)
def test_bad_setting_gets_400(
    server: Server, media: Media, key: str, value: Any, parts: tuple[str, ...]
) -> None:
    content, body = clip_request(media, "separate")
    assert_refused(server, content, {**body, "vllm_xargs": {key: value}}, parts)


def test_client_that_goes_away(server: Server, media: Media) -> None:
    content, body = clip_request(media, "interleaved")
    before = server.metrics()
    stream = ask(server, content, body, stream=True, max_tokens=3000)
    for _, chunk in zip(range(4), stream, strict=False):
        request_id = chunk.id
    during = server.wait_for_metrics(lambda now: now.value(SAVED_BLOCKS) > 0, "a saved block")
    assert during.value(USAGE) > before.value(USAGE)
    stream.close()
    after = server.wait_for_metrics(
        lambda now: now.value(RUNNING) == 0 and now.value(USAGE) == before.value(USAGE),
        "the blocks of the aborted request",
    )
    assert after.value(COMPACTIONS) == before.value(COMPACTIONS) + 1
    (line,) = policy_lines(server, request_id)
    assert "video kept" in line
    assert_saved(before, during, after)


def assert_saved(before: Metrics, during: Metrics, after: Metrics) -> None:
    """What the gauges said while one request decoded is what the counters say since."""

    def difference(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert during.value(SAVED_BLOCKS) == difference(FREED_BLOCKS) > 0
    for modality in ("video", "audio", "text"):
        gone = [difference(TOKENS, modality=modality, fate=fate) for fate in ("merged", "evicted")]
        assert during.value(SAVED_TOKENS, modality=modality) == pytest.approx(sum(gone))
    assert during.value(SAVED_TOKENS) > 0
    assert after.value(SAVED_BLOCKS) == after.value(SAVED_TOKENS) == 0


def test_dashboard_asks_for_what_is_exported(server: Server, media: Media) -> None:
    before = server.metrics()
    ask(server, [QUESTION], {})
    after = after_one_more(server, before, SKIPPED)  # names the first reason
    missing = test_dashboard.metric_names() - after.names()
    assert not missing
    for labels in after.labels(SAVED_TOKENS):
        assert labels.keys() == {"model_name", "engine", "modality"}


def test_stream_is_the_whole_answer_in_pieces(server: Server, media: Media) -> None:
    content, body = clip_request(media, "separate")
    options = {"logprobs": True, "top_logprobs": 2, "temperature": 1.0, "seed": 4}
    completion = ask(server, content, body, **options)
    (whole,) = completion.choices
    usage = {"include_usage": True}
    *chunks, last = ask(server, content, body, stream=True, stream_options=usage, **options)
    pieces = [choice for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert len(pieces) > 3
    assert "".join(piece.delta.content for piece in pieces) == whole.message.content
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    entries = [entry for piece in pieces for entry in piece.logprobs.content]
    for entry, expected in zip(entries, whole.logprobs.content, strict=True):
        assert entry.token == expected.token
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [top.token for top in entry.top_logprobs] == [
            top.token for top in expected.top_logprobs
        ]
    assert all(chunk.usage is None for chunk in chunks)
    assert not last.choices
    for name in ("prompt_tokens", "completion_tokens"):
        assert getattr(last.usage, name) == getattr(completion.usage, name)
