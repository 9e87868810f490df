# SPDX-License-Identifier: Apache-2.0
"""An evaluation through a server: what is measured there, and what is said about servers that
cannot be asked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from typer.testing import CliRunner

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation import in_server, tiny_av
from vllm_acckv.evaluation.arms import Arm
from vllm_acckv.evaluation.in_server import InServer
from vllm_acckv.evaluation.in_vllm import conversation
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.plan import make_plan
from vllm_acckv.spans import AUDIO, VIDEO
from vllm_acckv.tools.cli import main
from vllm_acckv.tools.server import Server

KEY = "a key of its own"
MAX_TOKENS = 6
BLOCK_SIZE = 32
FULL, SNAPKV = Arm("full"), Arm("snapkv", {"budget": 0.2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def samples(folder: Path) -> tuple[Sample, ...]:
    return tiny_av.load(folder / "clips", 7).samples


@pytest.fixture(scope="module")
def server(checkpoint: Path, folder: Path) -> Iterator[Server]:
    """With a key, so that it cannot be the one that other tests ask."""
    flags = ("--kv-policy", "acckv", "--api-key", KEY)
    with Server(checkpoint, *flags, media=folder, log=folder / "server.log") as running:
        yield running


@pytest.fixture(scope="module")
def answerer(server: Server) -> InServer:
    return InServer(url(server), max_tokens=MAX_TOKENS, api_key=KEY)


def url(server: Server) -> str:
    return str(server.client().base_url)


def directly(server: Server, arm: Arm, sample: Sample) -> Any:
    """The answer to a request of our own."""
    return (
        server.client()
        .with_options(api_key=KEY)
        .chat.completions.create(
            model=server.model,
            messages=conversation(sample),  # type: ignore[arg-type]
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"vllm_xargs": arm.request(), "return_token_ids": True},
        )
    )


def planned_blocks(checkpoint: Path, arm: Arm, prompt: Sequence[int]) -> int:
    """Blocks that the plan of a prompt frees."""
    config = json.loads((checkpoint / "config.json").read_text())["thinker_config"]
    codes = {config["video_token_index"]: VIDEO, config["audio_token_index"]: AUDIO}
    modalities = np.array([codes.get(token, 0) for token in prompt], np.int8)
    layers = config["text_config"]["num_hidden_layers"]
    return make_plan(modalities, arm.made(), BLOCK_SIZE, layers).freed_blocks


@pytest.mark.parametrize("arm", [FULL, SNAPKV], ids=lambda arm: arm.policy)
def test_answers_and_sizes(
    server: Server,
    answerer: InServer,
    samples: tuple[Sample, ...],
    checkpoint: Path,
    arm: Arm,
) -> None:
    answers = list(answerer.answer(arm, samples))
    assert [one.sample for one in answers] == [sample.id for sample in samples]
    assert {one.arm for one in answers} == {arm.name}
    expected = [directly(server, arm, sample) for sample in samples]
    assert [one.text for one in answers] == [one.choices[0].message.content for one in expected]
    assert len({one.text for one in answers}) > 1
    assert [one.tokens for one in answers] == [one.usage.prompt_tokens for one in expected]
    blocks = sum(planned_blocks(checkpoint, arm, one.prompt_token_ids) for one in expected)
    assert blocks > 0 or arm is FULL
    tokens = sum(one.tokens for one in answers)
    entries = sum(one.entries for one in answers)
    assert entries == pytest.approx(tokens - blocks * BLOCK_SIZE)
    assert all((one.rejected, one.video_weight) == (None, ()) for one in answers)


def test_batches_are_counted_apart(
    answerer: InServer, samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = list(answerer.answer(SNAPKV, samples))
    monkeypatch.setattr(in_server, "_BATCH", 3)
    apart = list(answerer.answer(SNAPKV, samples))
    assert [one.text for one in apart] == [one.text for one in together]
    assert sum(one.entries for one in apart) == pytest.approx(sum(one.entries for one in together))


def test_command(server: Server, samples: tuple[Sample, ...], folder: Path) -> None:
    command = ["eval", "--runner", "server", "--url", url(server), "--output", str(folder)]
    command += ["--policies", "full,snapkv", "--budgets", "0.2", "--questions", "7"]
    done = CliRunner().invoke(
        main, [*command, "--max-tokens", "4"], env={"VLLM_API_KEY": KEY, "COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    full, snapkv = json.loads((folder / "results.json").read_text())
    assert full["questions"] == 7 and full["entries"] == full["tokens"]
    assert snapkv["entries"] < 0.5 * snapkv["tokens"]
    assert "| snapkv budget=0.2 |" in done.stdout


def test_wrong_key(server: Server) -> None:
    for key in (None, "another"):
        assert_refused(
            lambda key=key: InServer(url(server), api_key=key),
            f"The server at {url(server).removesuffix('/v1/')} does not accept the API key; give "
            "the one that it was started with by --api-key or in VLLM_API_KEY.",
        )


def test_unknown_model(server: Server) -> None:
    assert_refused(
        lambda: InServer(url(server), "another", api_key=KEY),
        f"The server at {url(server).removesuffix('/v1/')} has no model another; it serves "
        f"{server.model}.",
    )


def test_refused_requests(
    server: Server, answerer: InServer, samples: tuple[Sample, ...], tmp_path: Path
) -> None:
    base = url(server).removesuffix("/v1/")
    arm = Arm("fastv", {"budget": 0.2})
    message = refusal(lambda: list(answerer.answer(arm, samples)))
    assert message.startswith(f"{arm.name}, {samples[0].id}: the server at {base} answers 400: ")
    assert "kv_budget is 0.2" in message and "\n" not in message
    outside = tiny_av.load(tmp_path, 1).samples
    message = refusal(lambda: list(answerer.answer(FULL, outside)))
    assert "answers 400: " in message and "allowed-local-media-path" in message


# Servers that are none


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(KVPolicyError) as raised:
        call()
    return str(raised.value)


def assert_refused(call: Callable[[], Any], message: str) -> None:
    assert refusal(call) == message


COUNTERS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",engine="0"} 1.0
# TYPE vllm:kv_policy_freed_blocks counter
vllm:kv_policy_freed_blocks_total{engine="0"} 5.0
"""
MODELS = '{"object": "list", "data": [{"id": "tiny", "object": "model", "root": "/models/tiny"}]}'
ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "tiny",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "it"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
}


@contextmanager
def pretend(pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A server with these answers by path; 404 for any other."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = pages.get(self.path, (404, "{}"))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_closed_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert_refused(
            lambda: InServer(address + "/v1"),
            f"The server at {address} cannot be reached; start it, or give its address by --url.",
        )


@pytest.mark.parametrize("address", ["localhost:8000", "here", "ftp://localhost"])
def test_no_url(address: str) -> None:
    assert_refused(
        lambda: InServer(address),
        f"{address} is no URL of a server, such as http://localhost:8000.",
    )


def test_server_without_the_plugin() -> None:
    others = "# TYPE vllm:request_success counter\nvllm:request_success_total 3.0\n"
    with pretend({"/metrics": (200, others), "/v1/models": (200, MODELS)}) as address:
        assert_refused(
            lambda: InServer(address),
            f"The server at {address} runs without KV policies; install vllm-acckv there and "
            "start it with --kv-policy.",
        )


def test_no_vllm_server() -> None:
    with pretend({}) as address:
        assert_refused(
            lambda: InServer(address),
            f"{address}/metrics answers 404; give the address of vllm serve itself, because KV "
            "entries are measured by its counters.",
        )
    with pretend({"/metrics": (200, "<html>hello</html>")}) as address:
        assert_refused(
            lambda: InServer(address),
            f"{address}/metrics holds no counters; give the address of vllm serve by --url.",
        )


def test_server_that_breaks(samples: tuple[Sample, ...]) -> None:
    pages = {"/metrics": (200, COUNTERS), "/v1/models": (200, MODELS)}
    pages["/v1/chat/completions"] = (500, '{"error": {"message": "out of luck"}}')
    with pretend(pages) as address:
        answerer = InServer(address)
        assert (answerer.model, answerer.checkpoint) == ("tiny", "/models/tiny")
        assert answerer.block_size == 16
        assert_refused(
            lambda: list(answerer.answer(FULL, samples[:1])),
            f"full, {samples[0].id}: the server at {address} answers 500: out of luck",
        )
    assert_refused(
        lambda: list(answerer.answer(FULL, samples[:1])),
        f"The server at {address} cannot be reached; start it, or give its address by --url.",
    )


def test_slow_server(samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"/metrics": (200, COUNTERS), "/v1/models": (200, MODELS)}
    with pretend(pages) as address:
        answerer = InServer(address)

        def slow(*_: Any, **__: Any) -> None:
            raise openai.APITimeoutError(request=None)  # type: ignore[arg-type]

        monkeypatch.setattr(answerer._client.chat.completions, "create", slow)
        message = refusal(lambda: list(answerer.answer(FULL, samples[:1])))
        assert "gave no answer in time" in message


def test_counters_that_stand_still(
    samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a balancer, where another server than the one that answered may be read."""
    monkeypatch.setattr(in_server, "_LAG_SECONDS", 0.2)
    pages = {"/metrics": (200, COUNTERS), "/v1/models": (200, MODELS)}
    pages["/v1/chat/completions"] = (200, json.dumps(ANSWER))
    with pretend(pages) as address:
        message = refusal(lambda: list(InServer(address).answer(FULL, samples)))
    assert message.startswith(f"{address}/metrics did not count 7 requests within 0 s")
