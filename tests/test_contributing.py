# SPDX-License-Identifier: Apache-2.0
"""The recipes of CONTRIBUTING.md, followed to the letter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny_videollama2
from tests.conftest import Media
from tests.engines import Engine
from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.policies import BUILT_IN, make_policy, policy_names
from vllm_acckv.spans import AUDIO, SPAN_HOOKS, TEXT, VIDEO

ROOT = Path(__file__).parent.parent
RECIPES = (ROOT / "CONTRIBUTING.md").read_text()


def recipe(name: str) -> str:
    """The code block marked ``name``."""
    code = re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", RECIPES, re.S)
    assert code is not None
    return code[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks as if pip had installed the recipe's package into it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "latest_policy.py").write_text(recipe("policy"))
    group, entry = re.findall(r'"(.*?)"', recipe("export"))
    metadata = folder / "latest_policy-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: latest-policy\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\nlatest = {entry}\n")
    return folder


def test_policy_recipe(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "latest" not in policy_names()
    monkeypatch.syspath_prepend(package)
    assert policy_names() == (*BUILT_IN, "latest")
    parts = [(TEXT, 5), (VIDEO, 60), (AUDIO, 40), (TEXT, 7)]
    modality = torch.tensor([code for code, count in parts for _ in range(count)]).to(torch.int8)
    key, value = torch.randn(2, 2, 112, 8)
    for block_size, entries in ((None, 32), (16, 32), (32, 48)):
        out = make_policy("latest").compress(None, key, value, modality, block_size=block_size)
        assert out.keys.shape == out.values.shape == (2, entries, 8)
        latest = range(105 - (entries - 12), 112)
        assert out.positions.tolist() == [[0, 1, 2, 3, 4, *latest]]
        assert torch.equal(out.keys, key[:, out.positions[0]])


def test_policy_recipe_in_vllm(package: Path, checkpoint: Path, media: Media) -> None:
    """``--kv-policy latest`` and a request's ``kv_policy`` find the new policy in every process."""
    with Engine(
        checkpoint, {"PYTHONPATH": str(package)}, additional_config={"kv_policy": "latest"}
    ) as engine:
        latest, recent = engine.run(
            media.separate(), media.separate(xargs={"kv_policy": "recent"})
        ).kept.values()
    assert latest
    assert latest == recent


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere:Policy", r"'broken' cannot be loaded from nowhere:Policy \(No module named"),
        ("latest_policy:gone", r"'broken' cannot be loaded from latest_policy:gone"),
        ("broken_on_import:Policy", r"'broken' cannot be loaded from .* \(name 'oops' is not"),
        ("pathlib:Path", r"'broken' of pathlib:Path is not a subclass of"),
    ],
)
def test_broken_packages_are_named(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    (tmp_path / "broken_on_import.py").write_text("oops")
    metadata = tmp_path / "broken-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    exports = f"[vllm_acckv.policies]\nbroken = {entry}\nacckv = {entry}\n"
    (metadata / "entry_points.txt").write_text(exports)
    monkeypatch.syspath_prepend(package)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KVPolicyError, match=message):
        make_policy("broken")
    with pytest.raises(KVPolicyError, match="Several packages define the KV policy 'acckv'"):
        make_policy("acckv")
    assert make_policy("snapkv").name == "snapkv"


def test_span_hook_recipe() -> None:
    exec(recipe("hook"), {"VIDEO": VIDEO, "AUDIO": AUDIO, "np": np, "SPAN_HOOKS": SPAN_HOOKS})
    try:
        place = SimpleNamespace(offset=0, length=6, is_embed=None)
        request: Any = SimpleNamespace(
            mm_features=[SimpleNamespace(modality="video", mm_position=place)],
            num_prompt_tokens=8,
            prompt_token_ids=[1, 7, 1, 7, 1, 1, 7, 1],
            sampling_params=None,
        )
        hf_config = SimpleNamespace(model_type="my_model")
        plan = plan_request(request, make_policy("acckv"), 4, 2, hf_config)
        expected = [VIDEO, AUDIO, VIDEO, AUDIO, VIDEO, VIDEO, TEXT, TEXT]
        assert plan.layout.modalities.tolist() == expected
    finally:
        SPAN_HOOKS.pop("my_model")


def test_model_recipe(tmp_path: Path, media: Media) -> None:
    """A model of its own, from a request's mp4 to blocks given back."""
    (tmp_path / "bright_model.py").write_text(recipe("model"))
    group, entry = re.findall(r'"(.*?)"', recipe("plugin"))
    metadata = tmp_path / "bright_model-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bright-model\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\nbright = {entry}\n")
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    tiny_videollama2.train_tokenizer().save_pretrained(checkpoint)
    decoder = {
        name: tiny_videollama2.CONFIG[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    named = {"architectures": ["BrightForCausalLM"], "model_type": "bright", "dtype": "float32"}
    config = {**named, **decoder, **heads, "max_position_embeddings": 8192}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with Engine(
        checkpoint,
        {"PYTHONPATH": str(tmp_path)},
        load_format="dummy",
        limit_mm_per_prompt={"video": 2, "audio": 2},
        additional_config={"kv_policy": "acckv"},
    ) as engine:
        trace = engine.run(media.ask(media.video()), media.ask(media.video(), media.audio()))
    for answer, name in zip(trace.answers, ("r0", "r1"), strict=True):
        tags = [one for one in answer.prompt if one in (448, 449)]
        assert tags == [448] * 40 + [449] * 40
        layers = trace.kept[name].values()
        assert min(layer["freed_blocks"] for layer in layers) > 0


def test_every_policy_has_its_row() -> None:
    """In the shared test matrix and in the tables of the docs."""
    from tests.test_policy_invariants import CASES

    assert {name for _, name, _ in CASES} == set(BUILT_IN)
    for page in ("README.md", "docs/policies.md"):
        rows = set(re.findall(r"^\| `(\w+)` \|", (ROOT / page).read_text(), re.M))
        assert set(BUILT_IN) <= rows, page
