# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-acckv convert avicuna`` reads, in the published formats, with random weights."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from vllm_acckv import cpu_media

cpu_media.fix()

from transformers import (  # noqa: E402
    ClapConfig,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from vllm_acckv.models.avicuna.convert import Pieces, convert  # noqa: E402

VOCABULARY = 448
VIDEO_TOKEN, AUDIO_TOKEN = VOCABULARY, VOCABULARY + 1
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "_name_or_path": "vicuna-7b-v1.5",
    "model_type": "llama",
    "max_sequence_length": 8192,
    "transformers_version": "4.31.0",
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
}
_TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
CLIP: dict[str, Any] = {
    "text_config": {**_TEXT, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    },
    "projection_dim": 40,
}
CLAP: dict[str, Any] = {
    "text_config": {**_TEXT, "num_attention_heads": 2},
    "audio_config": {
        "enable_fusion": True,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 32,
        "depths": [1, 1, 1],
        "num_attention_heads": [1, 2, 4],
        "num_hidden_layers": 3,
    },
    "projection_dim": 24,
}


def build(folder: Path) -> Path:
    """Sources and, in ``folder / "model"``, what they are converted to."""
    convert(write(folder), folder / "model")
    return folder / "model"


def write(folder: Path, rank: int = 8) -> Pieces:
    """Write all sources; equal arguments, equal weights."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = Pieces(
        base=folder / "vicuna",
        stage1=folder / "mm_projector.bin",
        stage2=folder / "mm_projector_a.bin",
        stage3=folder / "stage3",
        stage4=folder / "stage4",
        clip=folder / "clip",
        clap=folder / "clap",
    )
    _write_base(pieces.base)
    for path, name, width in ((pieces.stage1, "", 40), (pieces.stage2, "_a", 24)):
        shapes: dict[str, tuple[int, ...]] = {
            f"model.mm_projector{name}.weight": (256, width),
            f"model.mm_projector{name}.bias": (256,),
        }
        torch.save({key: weight(key, shape) for key, shape in shapes.items()}, path)
    write_lora(pieces.stage3, rank)
    write_lora(pieces.stage4, rank, safetensors=True)
    _write_tower(pieces.clip, CLIPModel(CLIPConfig(**CLIP)))
    _write_tower(pieces.clap, ClapModel(ClapConfig(**CLAP)))
    (pieces.clap / "preprocessor_config.json").write_text(
        json.dumps({"frequency_min": 50, "frequency_max": 14_000})
    )
    return pieces


def _write_base(folder: Path) -> None:
    """Two ``.bin`` shards and a SentencePiece model, as lmsys/vicuna-7b-v1.5 has them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    state = random_state(LlamaForCausalLM(LlamaConfig(**BASE)))
    # Published shards hold what was a buffer once.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    names = sorted(state)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "tokenizer.model").write_bytes(_train_tokenizer())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": None,
                "legacy": False,
                "model_max_length": 4096,
                "clean_up_tokenization_spaces": False,
            }
        )
    )


def _train_tokenizer() -> bytes:
    """BPE with byte fallback and a dummy space in front, like Llama's."""
    model = io.BytesIO()
    text = "USER: ASSISTANT: What happens in the clip? Describe what can be seen and heard, please."
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text, "A chat between a curious user and an assistant."] * 3),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_lora(folder: Path, rank: int, safetensors: bool = False, **config: Any) -> None:
    """An adapter of peft on every linear layer of the decoder; ``config`` overrides settings."""
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "revision": None,
        "target_modules": list(LINEAR),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**BASE))
    state = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in LINEAR:
            for side, shape in (
                ("A", (rank, module.in_features)),
                ("B", (module.out_features, rank)),
            ):
                key = f"base_model.model.{name}.lora_{side}.weight"
                state[key] = 0.5 * weight(folder.name + key, shape)
    if safetensors:
        save_file(state, folder / "adapter_model.safetensors")
    else:
        torch.save(state, folder / "adapter_model.bin")


def _write_tower(folder: Path, model: Any) -> None:
    model.load_state_dict(random_state(model))
    model.save_pretrained(folder)


def random_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state with every floating-point tensor drawn anew, positive where it must be."""
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value
        if value.is_floating_point():
            state[name] = weight(name, value.shape)
        if name.endswith("running_var"):
            state[name] = 400 * state[name].abs() + 400  # of decibels
    return state


def weight(name: str, shape: Iterable[int]) -> torch.Tensor:
    """fp32; depends on name and shape only."""
    shape = tuple(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) < 2:
        return 1 + 0.2 * noise
    gain = 1.5
    table = "embed" in name and "patch" not in name
    return gain / math.sqrt(1 if table else math.prod(shape[1:])) * noise
