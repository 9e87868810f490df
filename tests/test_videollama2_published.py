# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the published VideoLLaMA2.1-7B-AV, loaded without memory; files that lack
something, or hold more."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from tests import tiny_videollama2
from tests.engines import BASE_ENVIRONMENT

Shapes = dict[str, tuple[int, ...]]

DECODER = {"hidden": 3584, "inner": 18944, "kv": 512, "layers": 28, "vocabulary": 152064}
PUBLISHED = {
    **{
        name: value
        for name, value in tiny_videollama2.CONFIG.items()
        if name not in ("vision_tower_config", "audio_tower_config")
    },
    "dtype": "bfloat16",
    "hidden_size": 3584,
    "hidden_size_a": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "mm_hidden_size": 1152,
    "mm_hidden_size_a": 768,
    "video_token_id": 151646,
    "audio_token_id": 151647,
}


def linear(name: str, out: int, *inputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, *inputs), **({f"{name}.bias": (out,)} if bias else {})}


def decoder() -> Shapes:
    hidden, inner, kv = DECODER["hidden"], DECODER["inner"], DECODER["kv"]
    keys: Shapes = {
        "model.embed_tokens.weight": (DECODER["vocabulary"], hidden),
        "lm_head.weight": (DECODER["vocabulary"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in (f"model.layers.{index}" for index in range(DECODER["layers"])):
        keys |= linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        keys |= linear(f"{layer}.self_attn.k_proj", kv, hidden)
        keys |= linear(f"{layer}.self_attn.v_proj", kv, hidden)
        keys |= linear(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        keys |= linear(f"{layer}.mlp.gate_proj", inner, hidden, bias=False)
        keys |= linear(f"{layer}.mlp.up_proj", inner, hidden, bias=False)
        keys |= linear(f"{layer}.mlp.down_proj", hidden, inner, bias=False)
        keys |= {f"{layer}.input_layernorm.weight": (hidden,)}
        keys |= {f"{layer}.post_attention_layernorm.weight": (hidden,)}
    return keys


def vision_tower() -> Shapes:
    """SigLIP so400m/14@384, all 27 layers, with its pooling head."""
    hidden, inner, tower = 1152, 4304, "model.vision_tower.vision_tower.vision_model"
    keys = linear(f"{tower}.embeddings.patch_embedding", hidden, 3, 14, 14)
    keys |= linear(f"{tower}.embeddings.position_embedding", 729, hidden, bias=False)
    keys |= linear(f"{tower}.post_layernorm", hidden)
    blocks = [f"{tower}.encoder.layers.{index}" for index in range(27)]
    for block in blocks:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            keys |= linear(f"{block}.self_attn.{name}", hidden, hidden)
        keys |= linear(f"{block}.layer_norm1", hidden) | linear(f"{block}.layer_norm2", hidden)
    for block in [*blocks, f"{tower}.head"]:
        keys |= linear(f"{block}.mlp.fc1", inner, hidden)
        keys |= linear(f"{block}.mlp.fc2", hidden, inner)
    keys |= {f"{tower}.head.probe": (1, 1, hidden)} | linear(f"{tower}.head.layernorm", hidden)
    keys |= {f"{tower}.head.attention.in_proj_weight": (3 * hidden, hidden)}
    keys |= {f"{tower}.head.attention.in_proj_bias": (3 * hidden,)}
    return keys | linear(f"{tower}.head.attention.out_proj", hidden, hidden)


def connector() -> Shapes:
    hidden, projector = DECODER["hidden"], "model.mm_projector"
    keys = linear(f"{projector}.sampler.0", hidden, hidden, 2, 2, 2)
    for index in (0, 2):
        keys |= linear(f"{projector}.readout.{index}", hidden, hidden)
    for stage, first in (("s1", 1152), ("s2", hidden)):
        for index in range(1, 5):
            block, inputs = f"{projector}.{stage}.b{index}", first if index == 1 else hidden
            for conv, shape in (("conv1", (inputs, 1, 1)), ("conv2", (1, 3, 3))):
                keys |= linear(f"{block}.{conv}.conv", hidden, *shape, bias=False)
                keys |= linear(f"{block}.{conv}.bn", hidden)
            keys |= linear(f"{block}.conv3.conv", hidden, hidden, 1, 1, bias=False)
            keys |= linear(f"{block}.conv3.bn", hidden)
            keys |= linear(f"{block}.se.fc1", inputs // 4, hidden, 1, 1)
            keys |= linear(f"{block}.se.fc2", hidden, inputs // 4, 1, 1)
    keys |= linear(f"{projector}.s1.b1.downsample.conv", hidden, 1152, 1, 1, bias=False)
    return keys | linear(f"{projector}.s1.b1.downsample.bn", hidden)


def audio_tower() -> Shapes:
    """BEATs iter3+ with its classifier; every layer names the table of position biases."""
    hidden, inner, tower = 768, 3072, "model.audio_tower"
    keys = linear(f"{tower}.patch_embedding", 512, 1, 16, 16, bias=False)
    keys |= linear(f"{tower}.layer_norm", 512) | linear(f"{tower}.post_extract_proj", hidden, 512)
    keys |= {f"{tower}.encoder.pos_conv.0.weight_g": (1, 1, 128)}
    keys |= {f"{tower}.encoder.pos_conv.0.weight_v": (hidden, hidden // 16, 128)}
    keys |= {f"{tower}.encoder.pos_conv.0.bias": (hidden,)}
    keys |= linear(f"{tower}.encoder.layer_norm", hidden)
    for layer in (f"{tower}.encoder.layers.{index}" for index in range(12)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            keys |= linear(f"{layer}.self_attn.{name}", hidden, hidden)
        keys |= linear(f"{layer}.self_attn.grep_linear", 8, 64)
        keys |= {f"{layer}.self_attn.grep_a": (1, 12, 1, 1)}
        keys |= {f"{layer}.self_attn.relative_attention_bias.weight": (320, 12)}
        keys |= linear(f"{layer}.self_attn_layer_norm", hidden)
        keys |= linear(f"{layer}.fc1", inner, hidden) | linear(f"{layer}.fc2", hidden, inner)
        keys |= linear(f"{layer}.final_layer_norm", hidden)
    keys |= linear(f"{tower}.predictor", 527, hidden)
    keys |= linear("model.mm_projector_a.0", DECODER["hidden"], hidden)
    return keys | linear("model.mm_projector_a.2", DECODER["hidden"], DECODER["hidden"])


KEYS = decoder() | vision_tower() | connector() | audio_tower()


def test_transformers_loads_the_published_keys() -> None:
    from vllm_acckv.models.videollama2.config import VideoLLaMA2Config
    from vllm_acckv.models.videollama2.modeling import Videollama2Qwen2ForCausalLM

    with torch.device("meta"):
        model = Videollama2Qwen2ForCausalLM(VideoLLaMA2Config(**PUBLISHED))
        weights = {name: torch.empty(shape) for name, shape in KEYS.items()}
    keys = model.load_state_dict(weights, strict=False, assign=True)  # shapes must agree
    assert not keys.missing_keys
    ignored = model._keys_to_ignore_on_load_unexpected
    unknown = [
        key for key in keys.unexpected_keys if not any(re.search(one, key) for one in ignored)
    ]
    assert not unknown
    # The 27th layer, the head, the classifier and the table's copies, nothing else.
    assert len(keys.unexpected_keys) == 16 + 11 + 2 + 11


def test_vllm_loads_the_published_keys(tmp_path: Path) -> None:
    checkpoint = tiny_videollama2.build(tmp_path / "model")
    (checkpoint / "config.json").write_text(json.dumps(PUBLISHED))
    missing, parameters = in_process(load_without_memory, checkpoint, KEYS)
    assert not missing
    assert parameters == 8_496_167_728


def test_missing_keys_are_named(tmp_path: Path) -> None:
    """One of every part, as the checkpoint and as vLLM name it."""
    missing = {
        "model.layers.1.self_attn.k_proj.bias": (
            "language_model.model.layers.1.self_attn.k_proj.bias"
        ),
        "model.layers.1.mlp.down_proj.weight": "language_model.model.layers.1.mlp.down_proj.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias": (
            "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
        ),
        "model.mm_projector.s2.b3.se.fc1.weight": "mm_projector.s2.b3.se.fc1.weight",
        "model.audio_tower.encoder.layers.1.self_attn.grep_a": (
            "audio_tower.encoder.layers.1.self_attn.grep_a"
        ),
    }

    def without(weights: dict[str, torch.Tensor]) -> None:
        for name in missing:
            del weights[name]

    error = refused(tmp_path, without)
    assert error == f"The checkpoint lacks weights of {', '.join(sorted(missing.values()))}."


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    def extended(weights: dict[str, torch.Tensor]) -> None:
        weights["model.mm_projector.s3.b1.conv1.conv.weight"] = torch.ones(1)

    assert "'mm_projector.s3'" in refused(tmp_path, extended)


def refused(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """What vLLM says to the tiny checkpoint with its weights changed."""
    checkpoint = tiny_videollama2.build(folder / "model")
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    error = in_process(load, checkpoint)
    assert error is not None
    return error


# In processes of their own: vLLM's parallel groups are global.


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with (
        mock.patch.dict(os.environ, BASE_ENVIRONMENT),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()


def _in_vllm(checkpoint: Path, work: Callable[[Any], Any]) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.network_utils import get_open_port

    config = EngineArgs(str(checkpoint), enforce_eager=True, dtype="auto").create_engine_config()
    with set_current_vllm_config(config):
        where = f"tcp://127.0.0.1:{get_open_port()}"
        init_distributed_environment(1, 0, where, 0, "gloo")
        initialize_model_parallel(1, 1)
        return work(config)


def load_without_memory(checkpoint: Path, keys: Shapes) -> tuple[list[str], int]:
    """Parameters that were not loaded, and how many numbers they all hold."""
    from vllm.model_executor.model_loader.utils import initialize_model

    def work(config: Any) -> tuple[list[str], int]:
        with torch.device("meta"):
            model = initialize_model(config)
            weights = [(n, torch.empty(s, dtype=torch.bfloat16)) for n, s in keys.items()]
        loaded = model.load_weights(weights)
        parameters = dict(model.named_parameters())
        return sorted(parameters.keys() - loaded), sum(p.numel() for p in parameters.values())

    return _in_vllm(checkpoint, work)


def load(checkpoint: Path) -> str | None:
    """The error of loading a checkpoint, or ``None``."""
    from vllm.model_executor.model_loader import get_model

    try:
        _in_vllm(checkpoint, lambda config: get_model(vllm_config=config))
    except ValueError as error:
        return str(error)
    return None
