# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with VideoLLaMA2.1-7B-AV: a real mp4 over HTTP, two ranks, a KV policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests import tiny_videollama2
from tests.conftest import Media
from tests.engines import TWO_CORES, Ask
from tests.own_models import OwnModel
from tests.test_server import QUESTION, after_one_more, ask, policy_lines
from vllm_acckv.tools.demo import COMPACTIONS, TOKENS
from vllm_acckv.tools.server import Server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_videollama2.build(tmp_path_factory.mktemp("videollama2") / "model")


@pytest.fixture(scope="module")
def server(
    checkpoint: Path, media: Media, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ("--kv-policy", "acckv", "--tensor-parallel-size", "2")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TWO_CORES.items():
            patch.setenv(name, value)
        with Server(checkpoint, *flags, media=media.folder, log=log) as running:
            yield running


def test_clip_with_sound(server: Server, checkpoint: Path, media: Media) -> None:
    """Nothing but the mp4 is sent; its sound comes with it, and the answer is transformers'."""
    content = [media.video(), QUESTION]
    before = server.metrics()
    reply = ask(server, content, {})
    after = after_one_more(server, before, COMPACTIONS)
    tokens = reply.choices[0].token_ids
    settings = {"policy": "acckv", "budget": 0.2}
    asked = Ask([{"role": "user", "content": content}])
    prompt, logprobs, _ = OwnModel(checkpoint).run_policy(asked, settings, tokens)
    assert reply.prompt_token_ids == prompt
    assert tokens == logprobs.argmax(-1).tolist()
    for modality, count in (
        ("video", tiny_videollama2.VIDEO_TOKENS),
        ("audio", tiny_videollama2.AUDIO_TOKENS),
    ):
        counted = after.value(TOKENS, modality=modality) - before.value(TOKENS, modality=modality)
        assert counted == pytest.approx(count)
    (line,) = policy_lines(server, reply.id)
    assert "freed" in line


def test_bad_requests_are_explained(server: Server, media: Media) -> None:
    tagged = {"type": "text", "text": "What is <video>?"}
    with pytest.raises(openai.BadRequestError, match="do not write <video> yourself"):
        ask(server, [media.video(), tagged], {})
    assert ask(server, [media.audio(), QUESTION], {}).usage.completion_tokens == 12
