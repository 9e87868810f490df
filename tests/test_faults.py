# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --kv-policy`` in a storm of good, bad and abandoned requests, and after a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import DefaultHttpxClient

from tests.conftest import TEXT_ONLY, Media
from tests.test_server import AUDIO_IN_VIDEO, QUESTION, RUNNING, USAGE, bad_media
from vllm_acckv.tools.demo import COMPACTIONS
from vllm_acckv.tools.server import Server

REQUESTS, CLIENTS, SEED = 500, 12, 0
QUESTIONS = 40
# A hang, on a machine that does other things as well.
ANSWER_SECONDS = 120.0
DEATH_SECONDS = 60.0
# Tokens that take far longer than a busy server's metrics do.
LONG_ANSWER = 8192
MAX_LENGTH = 1024
SMALL = (
    *("--num-gpu-blocks-override", "48"),
    *("--max-model-len", str(MAX_LENGTH)),
    *("--max-num-seqs", str(CLIENTS)),
    # Two clips or three: prompts come in chunks.
    *("--max-num-batched-tokens", "512"),
)
"""Blocks for about five clips, fewer than there are clients."""

MEMORY_GROWTH = 1.02
"""Bound of the fourth quarter's peak over the third's; seen: 0.999 to 1.008."""

WAITING = "vllm:num_requests_waiting"
PREEMPTIONS = "vllm:num_preemptions_total"

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_budget": 0.1},
    {"kv_policy": "full"},
    {"kv_budget": 0.5, "kv_tau": -1},
    {"kv_policy": "snapkv"},
    {"kv_budget": 40, "kv_tau": 0.9},
    {"kv_policy": "streaming"},
    {"kv_policy_config": '{"head_mode": "head"}'},
    {"kv_policy": "h2o", "kv_budget": 0.4},
    {"kv_budget": 1_000_000},
    {"kv_policy": "lookm"},
    {"kv_policy": "pyramidkv"},
    {"kv_policy": "drop_video"},
)


@dataclass(frozen=True)
class Job:
    """A body to post, and what the client expects.

    Attributes:
        status: of the answer.
        question: number of the question that ``body`` asks; None if it is no good request.
        chunks: how many chunks of a stream to read before the connection is closed.
        seconds: to wait for the answer before the connection is closed.
    """

    body: dict[str, Any] | bytes
    status: int = 200
    question: int | None = None
    chunks: int | None = None
    seconds: float | None = None

    @property
    def abandoned(self) -> bool:
        return self.chunks is not None or self.seconds is not None


@dataclass(frozen=True)
class Outcome:
    status: int
    tokens: tuple[int, ...] = ()
    message: str = ""


class Client:
    """Posts jobs; usable by several threads."""

    def __init__(self, server: Server) -> None:
        base = str(server.client().base_url)
        self.http = DefaultHttpxClient(trust_env=False, base_url=base, timeout=ANSWER_SECONDS)

    def post(self, job: Job) -> Outcome:
        """What came back; of an abandoned job, what came before."""
        try:
            return self._post(job)
        except Exception:
            if not job.abandoned:
                raise
            return Outcome(job.status)

    def health(self) -> int:
        return self.http.get(self.http.base_url.copy_with(path="/health")).status_code

    def _post(self, job: Job) -> Outcome:
        body = job.body if isinstance(job.body, bytes) else json.dumps(job.body).encode()
        request: dict[str, Any] = {"content": body, "timeout": job.seconds or ANSWER_SECONDS}
        # A connection of its own: vLLM closes the one on which it answered 500.
        request["headers"] = {"content-type": "application/json", "connection": "close"}
        tokens: list[int] = []
        with self.http.stream("POST", "chat/completions", **request) as answer:
            if answer.status_code != 200:
                answer.read()
                return Outcome(answer.status_code, message=answer.json()["error"]["message"])
            if not answer.headers["content-type"].startswith("text/event-stream"):
                answer.read()
                return Outcome(200, tuple(answer.json()["choices"][0]["token_ids"]))
            for number, event in enumerate(events(answer.iter_lines())):
                if "error" in event:
                    return Outcome(500, tuple(tokens), event["error"]["message"])
                for choice in event["choices"]:
                    tokens += choice.get("token_ids") or []
                if number == job.chunks:
                    break
        return Outcome(200, tuple(tokens))


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def contents(media: Media) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Content and further body fields; few clips, so that vLLM's caches of them soon are full."""
    made: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    for seconds, seed in ((2, 0), (4, 1), (6, 2)):
        silent, sound = media.video(seconds, seed, sound=False), media.audio(seconds, seed)
        made.append(([silent, sound, QUESTION], {}))
        made.append(([media.video(seconds, seed), QUESTION], AUDIO_IN_VIDEO))
        made.append(([sound, QUESTION], {}))
        made.append(([silent, QUESTION], {}))
    made.append(([{"type": "text", "text": TEXT_ONLY}], {}))
    return made


def questions(model: str, media: Media) -> list[dict[str, Any]]:
    """Bodies of good requests: contents, settings and sampling in many combinations."""
    made = []
    pairs = zip(itertools.cycle(contents(media)), itertools.cycle(SETTINGS[:-1]), strict=False)
    for number, ((content, more), settings) in enumerate(itertools.islice(pairs, QUESTIONS)):
        seeded = number % 4 == 3
        made.append(
            {
                "model": model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": (8, 24, 80)[number % 3],
                "temperature": 0.8 if seeded else 0,
                "seed": number,
                "ignore_eos": True,
                "return_token_ids": True,
                "vllm_xargs": settings,
                **more,
            }
        )
    return made


def bad_jobs(good: dict[str, Any], media: Media) -> list[Job]:
    """Requests that nobody can answer."""

    def asking(content: Any, **fields: Any) -> dict[str, Any]:
        return {**good, "messages": [{"role": "user", "content": content}], **fields}

    missing = {"type": "video_url", "video_url": {"url": (media.folder / "no.mp4").as_uri()}}
    kinds = ("corrupt mp4", "half an mp4", "silent mp4", "empty wav", "no wav")
    broken = [asking(content, **more) for content, more in (bad_media(media, k) for k in kinds)]
    settings: list[dict[str, Any]] = [
        {"kv_policy": "nope"},
        {"kv_budget": 0},
        {"kv_budget": 1.5},
        {"kv_budget": float("inf")},
        {"kv_budget": 10**30},
        {"kv_budget": "abc"},
        {"kv_tau": 7},
        {"kv_policy": "snapkv", "kv_tau": 0.5},
        {"kv_policy_config": "{"},
        {"kv_budgets": 0.5},
    ]
    bodies: list[dict[str, Any] | bytes] = [
        *broken,
        *({**good, "vllm_xargs": one} for one in settings),
        asking([media.video(2), media.video(4), QUESTION]),
        asking("far too many words " * MAX_LENGTH),
        {**good, "max_tokens": 2 * MAX_LENGTH},
        {**good, "temperature": -1},
        b'{"model": ',
        b"[]",
    ]
    return [
        *(Job(body, 400) for body in bodies),
        Job({**good, "model": "nobody"}, 404),
        # Not ours: vLLM itself answers 500 where a file is missing.
        Job(asking([missing, QUESTION]), 500),
    ]


def storm(good: list[dict[str, Any]], bad: list[Job]) -> list[Job]:
    """65 % good requests, half of them streamed, 15 % abandoned ones and 20 % bad ones."""
    rng = random.Random(SEED)
    bad_ones = itertools.cycle(bad)
    jobs = []
    for _ in range(REQUESTS):
        number, draw = rng.randrange(len(good)), rng.random()
        body = {**good[number], "stream": rng.random() < 0.5}
        if draw < 0.65:
            jobs.append(Job(body, question=number))
        elif draw < 0.75:
            long = {**body, "stream": True, "max_tokens": 300}
            jobs.append(Job(long, question=number, chunks=rng.randrange(30)))
        elif draw < 0.8:
            jobs.append(Job(body, question=number, seconds=rng.uniform(0.001, 0.5)))
        else:
            jobs.append(next(bad_ones))
    return jobs


class Watch:
    """Looks at a server again and again: is it healthy, how much memory does it hold?"""

    def __init__(self, server: Server, client: Client) -> None:
        self.health: Counter[int] = Counter()
        self.memory: list[tuple[int, int]] = []  # requests done, KiB
        self.done = 0
        self._server, self._client = server, client
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.25):
            self.health[self._client.health()] += 1
            self.memory.append((self.done, resident(self._server)))

    def peak(self, quarter: int) -> int:
        """Most memory while this quarter of the requests was answered."""
        ends = REQUESTS * quarter // 4, REQUESTS * (quarter + 1) // 4
        return max(kib for done, kib in self.memory if ends[0] <= done <= ends[1])


def processes(server: Server) -> dict[int, str]:
    """Names, of up to 15 letters, of the server's processes by id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, fields = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, _, session = fields.split()[:4]
        if int(session) == server.pid and state != "Z":
            found[int(folder.name)] = name
    return found


def resident(server: Server) -> int:
    """KiB of memory of all processes of the server."""
    total = 0
    for pid in processes(server):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if "VmRSS" in line)
    return total


def assert_right(job: Job, outcome: Outcome, quiet: list[Outcome]) -> None:
    """The status that was expected, and one line of message, or the answer of a quiet server."""
    assert outcome.status == job.status, (job, outcome)
    if job.question is None:
        assert outcome.message
        # A body that is none gets vLLM's list of what is wrong with it.
        assert "\n" not in outcome.message or "validation error" in outcome.message, outcome
        return
    expected = quiet[job.question].tokens
    if job.abandoned:
        both = min(len(expected), len(outcome.tokens))
        assert outcome.tokens[:both] == expected[:both], job
    else:
        assert outcome.tokens == expected, job


def test_storm(checkpoint: Path, media: Media, tmp_path: Path) -> None:
    arguments = ("--kv-policy", "acckv", *SMALL)
    with Server(checkpoint, *arguments, media=media.folder, log=tmp_path / "log") as server:
        client = Client(server)
        good = questions(server.model, media)
        jobs = storm(good, bad_jobs(good[0], media))
        quiet = [client.post(Job(body)) for body in good]
        assert {one.status for one in quiet} == {200}
        before = server.metrics()

        def post(job: Job) -> Outcome:
            try:
                return client.post(job)
            finally:
                watch.done += 1

        with Watch(server, client) as watch, ThreadPoolExecutor(CLIENTS) as pool:
            outcomes = list(pool.map(post, jobs))

        for job, outcome in zip(jobs, outcomes, strict=True):
            assert_right(job, outcome, quiet)
        assert set(watch.health) == {200}
        after = server.wait_for_metrics(
            lambda now: now.value(RUNNING) == now.value(WAITING) == 0, "the last request to end"
        )
        assert after.value(USAGE) == before.value(USAGE)
        assert after.value(PREEMPTIONS) > before.value(PREEMPTIONS)
        assert after.value(COMPACTIONS) > before.value(COMPACTIONS) + 100
        assert watch.peak(3) < MEMORY_GROWTH * watch.peak(2)
        assert [client.post(Job(body)) for body in good] == quiet


@dataclass(frozen=True)
class Death:
    """How a server ended whose process was killed while it answered two requests.

    Attributes:
        failed: whether the requests got an error, whole and streamed.
        ended: whether the server did.
    """

    failed: tuple[bool, ...]
    ended: bool


def kill(server: Server, victim: str, media: Media) -> Death:
    """SIGKILL the process called ``victim``; wait for the end of the server."""
    client = Client(server)
    body = {**questions(server.model, media)[0], "vllm_xargs": {}, "max_tokens": LONG_ANSWER}

    def post(stream: bool) -> bool:
        try:
            return client.post(Job({**body, "stream": stream})).status == 500
        except Exception as error:
            # vLLM answers 500, or closes the connection before it comes to that.
            return "Timeout" not in type(error).__name__

    # Of two requests with one new clip, vLLM may answer one with 500 and "retry".
    client.post(Job({**body, "max_tokens": 1}))
    with ThreadPoolExecutor(2) as pool:
        failures = pool.map(post, (False, True))
        both = lambda: server.metrics().value(RUNNING) == 2  # noqa: E731
        server.wait_until(both, "two requests to run", ANSWER_SECONDS)
        (pid,) = (pid for pid, name in processes(server).items() if name == victim)
        os.kill(pid, signal.SIGKILL)
        failed = tuple(failures)
    deadline = time.monotonic() + DEATH_SECONDS
    while server.exit_code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return Death(failed, server.exit_code is not None)


@pytest.mark.parametrize("victim", ["VLLM::EngineCor", "VLLM::Worker"])
def test_killed_process(checkpoint: Path, media: Media, tmp_path: Path, victim: str) -> None:
    """As without a KV policy: both requests fail at once, and the server ends."""

    def die(policy: tuple[str, ...]) -> Death:
        log = tmp_path / f"log{len(policy)}"
        room = ("--max-model-len", str(2 * LONG_ANSWER))
        with Server(checkpoint, *policy, *room, media=media.folder, log=log) as server:
            return kill(server, victim, media)

    with ThreadPoolExecutor(2) as pool:
        stock, ours = pool.map(die, [(), ("--kv-policy", "acckv")])
    assert ours == stock == Death((True, True), ended=True)
