# SPDX-License-Identifier: Apache-2.0
"""``vllm-acckv convert avicuna`` on tiny files in the published formats, against peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests import tiny_avicuna
from tests.tiny_avicuna import VOCABULARY
from vllm_acckv.models.avicuna.config import AVicunaConfig
from vllm_acckv.models.avicuna.convert import ConversionError, Pieces, convert
from vllm_acckv.models.avicuna.modeling import AVicunaForCausalLM
from vllm_acckv.tools.cli import main

Tensors = dict[str, torch.Tensor]
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Pieces:
    return tiny_avicuna.write(tmp_path_factory.mktemp("avicuna"))


@pytest.fixture
def pieces(published: Pieces, tmp_path: Path) -> Pieces:
    """A copy that a test may change."""
    copies = {}
    for name, path in asdict(published).items():
        copies[name] = tmp_path / "pieces" / path.name
        copies[name].parent.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copies[name])
    return Pieces(**copies)


def weights_of(folder: Path) -> Tensors:
    weights: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def changed(file: Path, change: Callable[[Tensors], Any]) -> None:
    """Load a ``.bin``, change it, and save it again."""
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def settings(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@torch.inference_mode()
def test_merged_like_stacked_adapters(published: Pieces, tmp_path: Path) -> None:
    """In fp64, so that the two orders of summation do not matter."""
    convert(published, tmp_path / "out")
    merged = AVicunaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    base = LlamaForCausalLM.from_pretrained(published.base, dtype=torch.float64)
    stacked = peft.PeftModel.from_pretrained(base, published.stage3, adapter_name="third")
    stacked.load_adapter(published.stage4, adapter_name="fourth")
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    found = merged.eval()(ids).logits
    logits = {}
    for adapters in (["third"], ["fourth"], ["third", "fourth"]):
        stacked.base_model.set_adapter(adapters)
        logits[len(logits)] = stacked.eval()(ids).logits
    assert (found[..., :VOCABULARY] - logits[2]).abs().max() < 1e-5
    assert min((logits[2] - logits[n]).abs().max() for n in (0, 1)) > 0.1


def test_merged_like_peft_merges(published: Pieces, tmp_path: Path) -> None:
    """One after the other, as the original loads them."""
    convert(published, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(published.base)
    for stage in (published.stage3, published.stage4):
        model = peft.PeftModel.from_pretrained(model, stage).merge_and_unload()
    for name, expected in model.state_dict().items():
        assert (found[name][: len(expected)] - expected).abs().max() < 1e-6, name


def test_everything_is_there(published: Pieces, tmp_path: Path) -> None:
    convert(published, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    model, info = AVicunaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert found.keys() == model.state_dict().keys()
    for name, folder, ours in (("clip", "vision", "clip"), ("clap", "audio", "clap")):
        tower = load_file(getattr(published, name) / "model.safetensors")
        for key, value in tower.items():
            if key.startswith(folder) or key.startswith("visual"):
                assert torch.equal(found[f"media.{ours}.{key}"], value)
    for file in ("mm_projector", "mm_projector_a"):
        trained = torch.load(published.base.parent / f"{file}.bin", weights_only=True)
        for key, value in trained.items():
            assert torch.equal(found[key.replace("model.", "media.")], value)
    config = AVicunaConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["AVicunaForCausalLM"]
    assert (config.vocab_size, config.rms_norm_eps) == (VOCABULARY + 2, 1e-5)
    assert config.clip.projection_dim == 40 and config.clap.projection_dim == 24
    assert (config.clap.depths, config.clap.enable_fusion) == ([1, 1, 1], True)
    assert list(config.mel_range) == [50, 14_000]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.do_sample, generation.temperature) == (True, 0.05)


def test_what_clap_hears(pieces: Pieces, tmp_path: Path) -> None:
    """The range of its preprocessor, or, without one, of the published CLAP."""
    file = pieces.clap / "preprocessor_config.json"
    file.write_text('{"frequency_min": 20, "frequency_max": 16000}')
    convert(pieces, tmp_path / "other")
    file.unlink()
    convert(pieces, tmp_path / "default")
    found = [AVicunaConfig.from_pretrained(tmp_path / name) for name in ("other", "default")]
    assert [list(config.mel_range) for config in found] == [[20, 16_000], [50, 14_000]]


def test_tags(published: Pieces, tmp_path: Path) -> None:
    """Two ids more than rows before; their logits are the mean, so never the largest."""
    convert(published, tmp_path / "out")
    config = AVicunaConfig.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tags = tokenizer.convert_tokens_to_ids(["<|video|>", "<|audio|>"])
    assert tags == [config.video_token_id, config.audio_token_id] == [VOCABULARY, VOCABULARY + 1]
    # Whoever reads this file alone splits text around tags alike.
    alone = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert alone.encode("a <|video|>\n b").ids == tokenizer("a <|video|>\n b")["input_ids"]
    found = weights_of(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = found[name]
        assert torch.equal(rows[tags], rows[:VOCABULARY].mean(0).expand(2, -1))
    hidden = torch.randn(100, 256) @ found["lm_head.weight"].T
    assert (hidden[:, tags] < hidden.amax(1, keepdim=True)).all()


def test_rows_that_are_there_already(pieces: Pieces, tmp_path: Path) -> None:
    """A base with room for the tags keeps its size."""
    file = pieces.base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 512}))
    for shard in pieces.base.glob("*.bin"):
        changed(
            shard,
            lambda state: state.update(
                {
                    name: torch.nn.functional.pad(table, (0, 0, 0, 512 - VOCABULARY))
                    for name, table in state.items()
                    if len(table) == VOCABULARY
                }
            ),
        )
    convert(pieces, tmp_path / "out")
    assert AVicunaConfig.from_pretrained(tmp_path / "out").vocab_size == 512
    assert not weights_of(tmp_path / "out")["lm_head.weight"][VOCABULARY:].any()


def test_rounded_once(pieces: Pieces, tmp_path: Path) -> None:
    """A base in fp16 stays in fp16; the sum of both stages is rounded, not each. Towers keep their
    precision."""

    def halve(state: Tensors) -> None:
        state.update({name: value.half() for name, value in state.items()})

    for shard in pieces.base.glob("*.bin"):
        changed(shard, halve)
    convert(pieces, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    shards = [torch.load(file, weights_only=True) for file in pieces.base.glob("*.bin")]
    expected = next(shard[f"{QUERY}.weight"] for shard in shards if f"{QUERY}.weight" in shard)
    expected = expected.double()
    adapters = torch.load(pieces.stage3 / "adapter_model.bin", weights_only=True)
    for state in (adapters, load_file(pieces.stage4 / "adapter_model.safetensors")):
        a, b = (state[f"base_model.model.{QUERY}.lora_{side}.weight"].double() for side in "AB")
        expected += 2 * b @ a
    differs = found[f"{QUERY}.weight"] != expected.half()
    assert differs.float().mean() < 1e-3  # a sum in fp32 may lie on the other side of a middle
    decoder = {value.dtype for name, value in found.items() if not name.startswith("media.cl")}
    towers = {found[name].dtype for name in found if name.startswith("media.cl")}
    assert decoder == {torch.float16} and towers == {torch.float32, torch.int64}
    assert AVicunaConfig.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_weights_that_a_stage_replaces(pieces: Pieces, tmp_path: Path) -> None:
    """``non_lora_trainables.bin``, with the prefixes that trainers leave; before its own LoRA."""
    convert(pieces, tmp_path / "plain")
    third, fourth = torch.randn(2, 256, 40)
    query = torch.randn(256, 256)
    for stage, replaced in (
        (
            pieces.stage3,
            {
                "base_model.model.model.mm_projector.weight": third,
                f"base_model.model.{QUERY}.weight": query,
                "base_model.model.model.mm_projector_a.bias": third[:, 0],
            },
        ),
        (pieces.stage4, {"model.mm_projector.weight": fourth}),
    ):
        torch.save(replaced, stage / "non_lora_trainables.bin")
    convert(pieces, tmp_path / "out")
    found, plain = weights_of(tmp_path / "out"), weights_of(tmp_path / "plain")
    assert torch.equal(found["media.mm_projector.weight"], fourth)
    assert torch.equal(found["media.mm_projector_a.bias"], third[:, 0])
    assert torch.equal(found["media.mm_projector_a.weight"], plain["media.mm_projector_a.weight"])
    shards = [torch.load(file, weights_only=True) for file in pieces.base.glob("*.bin")]
    before = next(shard[f"{QUERY}.weight"] for shard in shards if f"{QUERY}.weight" in shard)
    added = plain[f"{QUERY}.weight"] - before
    assert torch.allclose(found[f"{QUERY}.weight"], query + added, atol=1e-5)
    for name in plain:
        if "mm_projector" not in name and QUERY not in name:
            assert torch.equal(found[name], plain[name])


def test_other_names_of_the_same(pieces: Pieces, tmp_path: Path) -> None:
    """DeepSpeed's adapter names, a projector file with the other, untrained projector, and
    safetensors without index."""
    convert(pieces, tmp_path / "plain")
    changed(
        pieces.stage3 / "adapter_model.bin",
        lambda state: [
            state.update({name.replace(".weight", ".default.weight"): state.pop(name)})
            for name in list(state)
        ],
    )
    untrained = {"model.mm_projector_a.weight": torch.randn(256, 24)}
    changed(pieces.stage1, lambda state: state.update(untrained))
    model = LlamaForCausalLM.from_pretrained(pieces.base)
    for file in pieces.base.glob("*.bin*"):
        file.unlink()
    model.save_pretrained(pieces.base)
    convert(pieces, tmp_path / "out")
    found, plain = weights_of(tmp_path / "out"), weights_of(tmp_path / "plain")
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_shards(published: Pieces, tmp_path: Path) -> None:
    convert(published, tmp_path / "one")
    convert(published, tmp_path / "many", shard_bytes=1_000_000)
    (single,) = (tmp_path / "one").glob("*.safetensors")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 5
    assert [file.name for file in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert max(file.stat().st_size for file in shards) < 1_100_000
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = load_file(single), weights_of(tmp_path / "many")
    assert set(index["weight_map"]) == set(one)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())


# What does not fit


def first_shard(pieces: Pieces) -> Path:
    return pieces.base / "pytorch_model-00001-of-00002.bin"


def overwrite(file: Path, text: str) -> None:
    file.write_text(text)


def without(state: Tensors, name: str) -> None:
    del state[name]


LORA_A = f"base_model.model.{QUERY}.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Pieces], Any], str]] = {
    "no base": (lambda p: shutil.rmtree(p.base), r"vicuna.config\.json cannot be read: No such"),
    "not a llama": (
        lambda p: overwrite(p.base / "config.json", '{"model_type": "qwen2"}'),
        "holds a model of type 'qwen2'; expected 'llama'",
    ),
    "broken configuration": (lambda p: overwrite(p.clip / "config.json", "{"), "is not JSON"),
    "no tokenizer": (
        lambda p: [file.unlink() for file in p.base.glob("tokenizer*")],
        "has no tokenizer",
    ),
    "no shard": (lambda p: first_shard(p).unlink(), "names pytorch_model-00001-of-00002.bin"),
    "no weights": (
        lambda p: (p.clap / "model.safetensors").unlink(),
        "clap has no weights; expected model.safetensors or model.bin or pytorch_model",
    ),
    "no projector": (lambda p: p.stage1.unlink(), "mm_projector.bin"),
    "half a projector": (
        lambda p: changed(p.stage2, lambda s: without(s, "model.mm_projector_a.bias")),
        r"mm_projector_a\.bin has no mm_projector_a\.bias, which is needed",
    ),
    "projectors swapped": (
        lambda p: shutil.copy(p.stage2, p.stage1),
        r"mm_projector\.bin has no mm_projector\.weight",
    ),
    "projector of another width": (
        lambda p: changed(p.stage1, lambda s: s.update({"mm_projector.bias": torch.ones(8)})),
        r"mm_projector\.bias of .* is \[8\]; the configurations expect \[256\]",
    ),
    "a weight too many": (
        lambda p: changed(first_shard(p), lambda s: s.update({"model.gate": torch.ones(8)})),
        r"vicuna has model\.gate, which AVicuna does not have",
    ),
    "truncated file": (lambda p: overwrite(p.stage1, "PK"), r"mm_projector\.bin"),
    "program in a file": (lambda p: torch.save({"a": print}, p.stage1), "no file of plain tensors"),
    "list in a file": (lambda p: torch.save([torch.ones(2)], p.stage1), "a dictionary of tensors"),
    "CLAP without fusion": (
        lambda p: overwrite(
            p.clap / "config.json",
            (p.clap / "config.json")
            .read_text()
            .replace('"enable_fusion": true', '"enable_fusion": false'),
        ),
        "CLAP without fusion",
    ),
    "rank": (lambda p: settings(p.stage3, r=4), f"LoRA of {QUERY[:12]}.*do not fit r=4"),
    "no rank": (lambda p: settings(p.stage3, r=0), "r=0; expected a number above 0"),
    "one factor": (
        lambda p: changed(p.stage3 / "adapter_model.bin", lambda s: without(s, LORA_A)),
        f"lora_B only for {QUERY}",
    ),
    "unknown module": (
        lambda p: changed(
            p.stage3 / "adapter_model.bin",
            lambda s: s.update(
                {
                    LORA_A.replace("q_proj", f"z_proj.lora_{x}").replace(".lora_A.", "."): value
                    for x, value in (("A", torch.ones(8, 256)), ("B", torch.ones(256, 8)))
                }
            ),
        ),
        r"stage3 has model\.layers\.1\.self_attn\.z_proj\.weight, which AVicuna does not have",
    ),
    "no LoRA": (
        lambda p: changed(
            p.stage3 / "adapter_model.bin",
            lambda s: s.update({"base_model.model.lm_head.weight": torch.ones(2)}),
        ),
        r"has base_model\.model\.lm_head\.weight, which is no LoRA",
    ),
    "unknown trainable": (
        lambda p: torch.save({"model.other": torch.ones(2)}, p.stage4 / "non_lora_trainables.bin"),
        r"stage4 has model\.other, which AVicuna does not have",
    ),
    **{
        name: (lambda p, s=setting: settings(p.stage4, **s), f"sets {name}=.*only a plain LoRA")
        for name, setting in {
            "use_rslora": {"use_rslora": True},
            "use_dora": {"use_dora": True},
            "rank_pattern": {"rank_pattern": {"q_proj": 4}},
            "modules_to_save": {"modules_to_save": ["lm_head"]},
            "fan_in_fan_out": {"fan_in_fan_out": True},
            "bias": {"bias": "lora_only"},
            "peft_type": {"peft_type": "LOHA"},
            "init_lora_weights": {"init_lora_weights": "pissa"},
            "something_new": {"something_new": 1},
        }.items()
    },
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(pieces: Pieces, tmp_path: Path, case: str) -> None:
    """Fails by name, before anything is written."""
    break_it, message = BROKEN[case]
    break_it(pieces)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(pieces, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command(published: Pieces, tmp_path: Path) -> None:
    options = [
        word for name, path in asdict(published).items() for word in (f"--{name}", str(path))
    ]
    command = ["convert", "avicuna", *options, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and done.output.strip().endswith("out")
    assert AVicunaConfig.from_pretrained(tmp_path / "out").num_frames == 75
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1
    assert again.output == f"error: {tmp_path / 'out'} already exists; choose a new folder.\n"
