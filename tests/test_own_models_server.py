# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with the paper's models: a real mp4 over HTTP, two ranks, a KV policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests import tiny_avicuna, tiny_videollama2
from tests.conftest import Media
from tests.engines import TWO_CORES, Ask
from tests.own_models import OwnModel
from tests.test_avicuna_engine import AVicuna
from tests.test_server import QUESTION, after_one_more, ask, policy_lines
from vllm_acckv.tools import clips
from vllm_acckv.tools.demo import COMPACTIONS, TOKENS
from vllm_acckv.tools.server import Server


@dataclass(frozen=True)
class Model:
    """A tiny one, the same in transformers, Hz of its sound, and its tokens of a clip."""

    build: Callable[[Path], Path]
    own: type[OwnModel]
    sample_rate: int
    tokens: dict[str, int]


MODELS = {
    "videollama2": Model(tiny_videollama2.build, OwnModel, 16_000, {"video": 72, "audio": 92}),
    "avicuna": Model(tiny_avicuna.build, AVicuna, 48_000, {"video": 75, "audio": 25}),
}


@dataclass(frozen=True)
class Served:
    """A server with one of the models, and clips for it."""

    server: Server
    model: Model
    own: OwnModel
    media: Media


@pytest.fixture(scope="module", params=MODELS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    model, folder = MODELS[request.param], tmp_path_factory.mktemp(request.param)
    checkpoint, media = model.build(folder / "model"), Media(folder / "media")
    media.folder.mkdir()
    flags = ("--kv-policy", "acckv", "--tensor-parallel-size", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "SAMPLE_RATE", model.sample_rate)
        for name, value in TWO_CORES.items():
            patch.setenv(name, value)
        with Server(checkpoint, *flags, media=media.folder, log=folder / "log") as server:
            yield Served(server, model, model.own(checkpoint), media)


def test_clip_with_sound(served: Served) -> None:
    """Nothing but the mp4 is sent; its sound comes with it, and the answer is transformers'."""
    server = served.server
    content = [served.media.video(), QUESTION]
    before = server.metrics()
    reply = ask(server, content, {})
    after = after_one_more(server, before, COMPACTIONS)
    tokens = reply.choices[0].token_ids
    settings = {"policy": "acckv", "budget": 0.2}
    asked = Ask([{"role": "user", "content": content}])
    prompt, logprobs, _ = served.own.run_policy(asked, settings, tokens)
    assert reply.prompt_token_ids == prompt
    assert tokens == logprobs.argmax(-1).tolist()
    for modality, count in served.model.tokens.items():
        counted = after.value(TOKENS, modality=modality) - before.value(TOKENS, modality=modality)
        assert counted == pytest.approx(count)
    (line,) = policy_lines(server, reply.id)
    assert "freed" in line


def test_bad_requests_are_explained(served: Served) -> None:
    server, media = served.server, served.media
    tagged = {"type": "text", "text": "What is <|video|>?"}
    with pytest.raises(openai.BadRequestError, match=r"do not write <\|video\|> yourself"):
        ask(server, [media.video(), tagged], {})
    assert ask(server, [media.audio(), QUESTION], {}).usage.completion_tokens == 12
