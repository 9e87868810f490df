# SPDX-License-Identifier: Apache-2.0
"""The same questions through vLLM and through a Hugging Face model: the same results.

With whole blocks of 32 on both sides, so that both keep as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.in_hf import InHF
from vllm_acckv.evaluation.in_vllm import _ENVIRONMENT, InVLLM
from vllm_acckv.evaluation.metrics import difference, exact
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.tools.demo import MODEL

CLIPS = 6
MERGE_ONLY = {"redistribution": "off", "tau": -1.0, "strict_budget": "entries"}
ARMS = [
    Arm("full"),
    Arm("acckv", {"budget": 0.2}),
    Arm("h2o", {"budget": 0.2, "protect_text": True}),
    *(
        Arm(name, {"budget": budget, **options})
        for budget in (0.5, 0.2, 0.1)
        for name, options in (("acckv_plus", {}), ("acckv", MERGE_ONLY))
    ),
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    return tiny_av.load(tmp_path_factory.mktemp("clips"), CLIPS * len(tiny_av.TASKS)).samples


@pytest.fixture(scope="module")
def in_vllm(samples: tuple[Sample, ...]) -> Iterator[InVLLM]:
    assert samples[0].video is not None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)  # else it stays set, and later servers do not log
        runner = InVLLM(str(MODEL), samples[0].video.parent, 40, max_model_len=1024)
        yield runner
        runner.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def in_hf() -> InHF:
    return InHF(str(MODEL), 40, block_size=32)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_vllm_and_hugging_face_agree(
    in_vllm: InVLLM, in_hf: InHF, samples: tuple[Sample, ...], arm: Arm
) -> None:
    one, other = (list(runner.answer(arm, samples)) for runner in (in_vllm, in_hf))
    assert [answer.tokens for answer in one] == [answer.tokens for answer in other]
    assert [answer.entries for answer in one] == [answer.entries for answer in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.rejected == pytest.approx(theirs.rejected)
        assert mine.video_weight == pytest.approx(theirs.video_weight, abs=2e-3)
    same = sum(mine.text == theirs.text for mine, theirs in zip(one, other, strict=True))
    assert same >= 0.9 * len(samples)
    gap = difference(right(one, samples), right(other, samples), clusters=clips(samples))
    assert gap.low <= 0 <= gap.high, gap


def right(answers: list[Answer], samples: tuple[Sample, ...]) -> list[float]:
    return [
        exact(answer.text, sample.answers) for answer, sample in zip(answers, samples, strict=True)
    ]


def clips(samples: tuple[Sample, ...]) -> list[Path | None]:
    return [sample.video for sample in samples]
