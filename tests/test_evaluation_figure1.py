# SPDX-License-Identifier: Apache-2.0
"""Attention by layer and modality against what transformers' eager attention says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Media
from tests.hf_models import MODALITY, prompt_ids, tiny
from tests.reference import hf_thinker
from vllm_acckv.evaluation import figure1
from vllm_acckv.evaluation.figure1 import Observed, average, measure, observe
from vllm_acckv.spans import AUDIO, TEXT, VIDEO
from vllm_acckv.tools import tiny_model


@pytest.fixture(scope="module")
def thinker(checkpoint: Path) -> Any:
    return tiny_model.load_thinker(checkpoint)


@pytest.fixture(scope="module")
def inputs(checkpoint: Path, media: Media) -> dict[str, dict[str, Any]]:
    asks = {name: getattr(media, name)() for name in ("separate", "interleaved", "text")}
    return {
        name: hf_thinker.prepare_inputs(checkpoint, ask.messages, ask.audio_in_video)[1]
        for name, ask in asks.items()
    }


@torch.inference_mode()
def eager(thinker: Any, inputs: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Modalities, and ``[layers, l]`` mean attention of the rows behind the clip."""
    out = thinker(**inputs, output_attentions=True)
    modality = hf_thinker.modality_of(thinker, inputs["input_ids"][0].tolist())
    first = max(i for i, kind in enumerate(modality) if kind != TEXT) + 1
    rows = [one[0, :, first:].double().mean(dim=(0, 1)).numpy() for one in out.attentions]
    return modality, np.stack(rows)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_is_the_attention_of_the_model(
    thinker: Any, inputs: dict[str, Any], layout: str, implementation: str
) -> None:
    modality, expected = eager(thinker, inputs[layout])
    thinker.model.config._attn_implementation = implementation
    try:
        found = observe(thinker, inputs[layout])
    finally:
        thinker.model.config._attn_implementation = "eager"
    assert found.modality.tolist() == modality
    np.testing.assert_allclose(found.tokens, expected, atol=1e-6)
    np.testing.assert_allclose(found.tokens.sum(1), 1, atol=1e-5)


def test_the_model_says_the_same_meanwhile(thinker: Any, inputs: dict[str, Any]) -> None:
    with torch.inference_mode():
        before = thinker(**inputs["separate"]).logits[0, -1]
        observe(thinker, inputs["separate"])
        after = thinker(**inputs["separate"]).logits[0, -1]
    assert torch.equal(before, after)


def test_prompts_that_cannot_be_observed(thinker: Any, inputs: dict[str, Any]) -> None:
    text = {key: one for key, one in inputs["text"].items() if one is not None}
    with pytest.raises(ValueError, match="cannot be observed: no audio or video"):
        observe(thinker, text)
    model, ids = tiny("llama", "eager"), prompt_ids()
    with pytest.raises(ValueError, match="no text after its last audio-video token"):
        observe(model, {"input_ids": ids[:, :40]}, MODALITY[:40])


def test_average_by_hand() -> None:
    """Two prompts of one layer; the second has no audio, and twice the video."""
    first = Observed(
        np.array([TEXT, VIDEO, VIDEO, AUDIO, AUDIO, AUDIO, TEXT], np.int8),
        np.array([[0.1, 0.2, 0.1, 0.05, 0.1, 0.15, 0.3]]),
    )
    second = Observed(
        np.array([VIDEO] * 4 + [TEXT], np.int8), np.array([[0.1, 0.3, 0.2, 0.2, 0.2]])
    )
    found = average([first, second])
    assert found["samples"] == 2
    for key, expected in {
        "shares": {"text": 0.3, "video": 0.55, "audio": 0.15},
        "per_token": {"text": 0.2, "video": 0.175, "audio": 0.1},
    }.items():
        assert found[key] == {name: [pytest.approx(value)] for name, value in expected.items()}
    assert sum(one[0] for one in found["shares"].values()) == pytest.approx(1)
    # The second's four video tokens in two parts.
    np.testing.assert_allclose(found["tokens"]["video"], [[(0.2 + 0.2) / 2, (0.1 + 0.2) / 2]])
    np.testing.assert_allclose(found["tokens"]["audio"], [[0.05, 0.1, 0.15]])


def test_long_clips_have_no_more_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure1, "PARTS", 3)
    one = Observed(np.array([VIDEO] * 7 + [TEXT], np.int8), np.arange(8.0)[None])
    # Parts of 3, 2 and 2 tokens.
    assert average([one])["tokens"] == {"video": [[1.0, 3.5, 5.5]], "audio": []}


def test_measure(thinker: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    prompts = [
        ("tiny-av/sounds", inputs["separate"]),
        ("tiny-av/see", inputs["separate"]),
        ("tiny-av/hear", inputs["interleaved"]),
        ("avsd", inputs["interleaved"]),
    ]
    groups = measure(thinker, prompts, tmp_path / "out")
    assert {name: one["samples"] for name, one in groups.items()} == {
        "audio": 1,
        "both": 2,
        "avsd": 1,
    }
    assert json.loads((tmp_path / "out" / "figure1.json").read_text()) == groups
    for one in groups.values():
        np.testing.assert_allclose(np.sum([*one["shares"].values()], axis=0), 1, atol=1e-5)
        assert [len(one["shares"][name]) for name in ("text", "video", "audio")] == [4] * 3
        assert [len(one["tokens"][name]) for name in ("video", "audio")] == [4] * 2
    pair = [groups["audio"]["shares"]["video"], groups["avsd"]["shares"]["video"]]
    np.testing.assert_allclose(groups["both"]["shares"]["video"], np.mean(pair, axis=0))
    text = (tmp_path / "out" / "figure1.svg").read_text()
    assert ">both, 2 prompts<" in text and ">share of attention<" in text
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    measure(thinker, prompts, tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="no prompts"):
        measure(thinker, [], tmp_path)
