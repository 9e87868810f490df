# SPDX-License-Identifier: Apache-2.0
"""Answers through transformers: are they what ``generate`` says, whatever the draft?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests import tiny_videollama2
from tests.conftest import Media
from tests.own_models import OwnModel, path_of
from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation import mvbench, tiny_av
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.command import Options, questions
from vllm_acckv.evaluation.in_hf import InHF
from vllm_acckv.evaluation.samples import Dataset, Sample
from vllm_acckv.hf import kv_policy
from vllm_acckv.models import hears_clips

TOKENS = 12
ARMS = [
    Arm("full"),
    Arm("snapkv", {"budget": 0.2}),
    Arm("acckv", {"budget": 0.2, "tau": 0.1}),
    Arm("h2o", {"budget": 0.2, "decode": "evict"}),
]


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> InHF:
    return InHF(str(checkpoint), TOKENS)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    return tiny_av.load(tmp_path_factory.mktemp("clips"), 2).samples


def generated(runner: InHF, arm: Arm, sample: Sample) -> list[int]:
    """What transformers' own loop says."""
    inputs = runner.prepare(sample)
    with kv_policy(runner.model, arm.made()), torch.inference_mode():
        out = runner.model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=runner.ends
        )
    said: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return [token for token in said if token not in runner.ends]


@pytest.mark.parametrize("draft", ["none", "right", "one word wrong", "all wrong"])
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_a_draft_changes_nothing(
    runner: InHF, samples: tuple[Sample, ...], arm: Arm, draft: str
) -> None:
    expected = generated(runner, arm, samples[0])
    given = {
        "none": [],
        "right": [*expected, runner.ends[0]],
        "one word wrong": [*expected[:4], expected[4] ^ 1, *expected[5:]],
        "all wrong": [token ^ 1 for token in expected],
    }[draft]
    with kv_policy(runner.model, arm.made()):
        said = runner.generate(runner.prepare(samples[0]), given)
    assert said == expected


def test_measures_what_stays(runner: InHF, samples: tuple[Sample, ...]) -> None:
    found: dict[str, list[Answer]] = {arm.policy: list(runner.answer(arm, samples)) for arm in ARMS}
    assert [one.sample for one in found["full"]] == [sample.id for sample in samples]
    for full, snapkv, acckv in zip(found["full"], found["snapkv"], found["acckv"], strict=True):
        av = 72 + 200  # 8 seconds of 3 x 3 and of 25
        assert full.entries == full.tokens == snapkv.tokens
        assert snapkv.entries == full.tokens - av + round(0.2 * av)
        assert acckv.rejected is not None and len(acckv.video_weight) == 4
        assert snapkv.rejected is None and snapkv.video_weight == ()


def test_stops_at_an_end(runner: InHF, samples: tuple[Sample, ...], monkeypatch: Any) -> None:
    arm = ARMS[0]
    expected = generated(runner, arm, samples[0])
    monkeypatch.setattr(runner, "ends", [*runner.ends, expected[5]])
    cut = expected[: expected.index(expected[5])]
    for draft in ([], expected):
        with kv_policy(runner.model, arm.made()):
            assert runner.generate(runner.prepare(samples[0]), draft) == cut


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KVPolicyError, match="cannot be loaded by transformers"):
        InHF(str(tmp_path), TOKENS)


def test_models_of_this_package_hear_clips(
    checkpoint: Path, media: Media, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sound of a clip is sampled as theirs, and no recording of it is written."""
    own = tiny_videollama2.build(tmp_path / "model")
    assert hears_clips(str(own)) and not hears_clips(str(checkpoint)) and not hears_clips("gpt")
    ask = media.ask(media.video())
    path = path_of(ask.messages[0]["content"][0])
    question = "What happens in the clip?"
    sample = Sample("one", "task", path, None, None, None, question, ("that",))
    inputs = InHF(str(own), TOKENS).prepare(sample)
    expected = OwnModel(own).prepare(ask)
    for name in ("input_ids", "pixel_values_videos", "input_features"):
        assert torch.equal(inputs[name], expected[name])
    assert inputs["input_ids"].tolist()[0].count(449) == tiny_videollama2.AUDIO_TOKENS

    monkeypatch.setattr(mvbench, "load", lambda *_, **__: Dataset((sample,)))
    for model, written in ((own, False), (checkpoint, True)):
        options = Options(tmp_path / model.name, str(model), "mvbench", Path("MVBench"))
        (found,) = questions(options, Console(quiet=True)).samples
        assert (found.audio is not None) == written
