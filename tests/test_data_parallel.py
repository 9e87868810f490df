# SPDX-License-Identifier: Apache-2.0
"""Two engines behind one server (``--data-parallel-size 2``): both compress, each is counted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Media
from tests.engines import TWO_CORES, Ask, Engine
from tests.test_server import AUDIO_IN_VIDEO, POLICY, RUNNING, SAVED_BLOCKS, ask
from vllm_acckv.tools.demo import COMPACTIONS, FREED_BLOCKS
from vllm_acckv.tools.server import Server


def test_two_engines_compress_and_count(
    checkpoint: Path,
    media: Media,
    start_engine: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers are those of one engine, whichever of the two gave them."""
    for name, value in TWO_CORES.items():
        monkeypatch.setenv(name, value)
    asks = [media.interleaved(seed=seed, max_tokens=12) for seed in range(4)] * 2
    one = start_engine({}, additional_config={"kv_policy": "acckv"})
    expected = [answer.tokens for answer in one.run(*asks[:4]).answers] * 2
    flags = (*POLICY, "--data-parallel-size", "2")
    with Server(checkpoint, *flags, media=media.folder, log=tmp_path / "log") as server:

        def answer(one: Ask) -> list[int]:
            (message,) = one.messages
            completion = ask(server, message["content"], AUDIO_IN_VIDEO)
            return completion.choices[0].token_ids

        with ThreadPoolExecutor(len(asks)) as pool:
            assert list(pool.map(answer, asks)) == expected
        now = server.wait_for_metrics(
            lambda now: now.value(COMPACTIONS) == len(asks) and now.value(RUNNING) == 0,
            "all requests",
        )
        engines = [labels["engine"] for labels in now.labels(COMPACTIONS)]
        assert engines == ["0", "1"]
        for engine in engines:
            assert now.value(COMPACTIONS, engine=engine) > 0
            assert now.value(FREED_BLOCKS, engine=engine) > 0
        assert now.value(SAVED_BLOCKS) == 0
