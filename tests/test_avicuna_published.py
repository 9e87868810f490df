# SPDX-License-Identifier: Apache-2.0
"""AVicuna at full size: keys and shapes of what its authors build on, written out."""

from __future__ import annotations

import torch

from tests.tiny_avicuna import LINEAR
from vllm_acckv.models.avicuna.config import AVicunaConfig
from vllm_acckv.models.avicuna.modeling import AVicunaForCausalLM
from vllm_acckv.models.avicuna.weight_files import model_name


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of lmsys/vicuna-7b-v1.5 with two rows more, of CLIP ViT-L/14, of CLAP
    HTSAT-fused and of the projectors, written out."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32002, 4096),
        "lm_head.weight": (32002, 4096),
        "model.norm.weight": (4096,),
        "media.mm_projector.weight": (4096, 768),
        "media.mm_projector.bias": (4096,),
        "media.mm_projector_a.weight": (4096, 512),
        "media.mm_projector_a.bias": (4096,),
    }
    for layer in range(32):
        for name in LINEAR:
            inner = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096)}
            inner |= {"down_proj": (4096, 11008)}
            part = "mlp" if name in inner else "self_attn"
            shapes[f"model.layers.{layer}.{part}.{name}.weight"] = inner.get(name, (4096, 4096))
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (4096,)
    clip = "media.clip.vision_model"
    shapes |= {
        f"{clip}.embeddings.class_embedding": (1024,),
        f"{clip}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{clip}.embeddings.position_embedding.weight": (257, 1024),
        "media.clip.visual_projection.weight": (768, 1024),
    }
    pairs = {f"{clip}.pre_layrnorm": (1024,), f"{clip}.post_layernorm": (1024,)}
    for layer in range(24):
        name = f"{clip}.encoder.layers.{layer}"
        pairs |= {f"{name}.layer_norm{n}": (1024,) for n in (1, 2)}
        pairs |= {f"{name}.self_attn.{n}_proj": (1024, 1024) for n in ("q", "k", "v", "out")}
        pairs |= {f"{name}.mlp.fc1": (4096, 1024), f"{name}.mlp.fc2": (1024, 4096)}
    clap, norms = "media.clap.audio_model.audio_encoder", {}
    fusion = f"{clap}.patch_embed.fusion_model"
    pairs |= {
        f"{clap}.patch_embed.proj": (96, 1, 4, 4),
        f"{clap}.patch_embed.norm": (96,),
        f"{clap}.patch_embed.mel_conv2d": (96, 1, 4, 12),
        f"{clap}.norm": (768,),
        "media.clap.audio_projection.linear1": (512, 768),
        "media.clap.audio_projection.linear2": (512, 512),
    }
    norms[f"{clap}.batch_norm"] = 64
    for branch, first in (("local_att", 0), ("global_att", 1)):
        pairs[f"{fusion}.{branch}.{first}"] = (24, 96, 1, 1)
        pairs[f"{fusion}.{branch}.{first + 3}"] = (96, 24, 1, 1)
        norms |= {f"{fusion}.{branch}.{first + 1}": 24, f"{fusion}.{branch}.{first + 4}": 96}
    for stage, (blocks, heads) in enumerate(((2, 4), (2, 8), (6, 16), (2, 32))):
        width = 96 * 2**stage
        for block in range(blocks):
            name = f"{clap}.layers.{stage}.blocks.{block}"
            own = f"{name}.attention.self"
            shapes[f"{own}.relative_position_bias_table"] = (225, heads)
            shapes[f"{own}.relative_position_index"] = (64, 64)
            pairs |= {f"{own}.{part}": (width, width) for part in ("query", "key", "value")}
            pairs |= {f"{name}.layernorm_{n}": (width,) for n in ("before", "after")}
            pairs[f"{name}.attention.output.dense"] = (width, width)
            pairs[f"{name}.intermediate.dense"] = (4 * width, width)
            pairs[f"{name}.output.dense"] = (width, 4 * width)
        if stage < 3:
            shapes[f"{clap}.layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            pairs[f"{clap}.layers.{stage}.downsample.norm"] = (4 * width,)
    for name, size in norms.items():
        pairs[name] = (size,)
        shapes |= {f"{name}.running_{what}": (size,) for what in ("mean", "var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    for name, shape in pairs.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_full_size() -> None:
    with torch.device("meta"):
        model = AVicunaForCausalLM(AVicunaConfig())
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == published_shapes()
    assert sum(parameter.numel() for parameter in model.parameters()) > 7.0e9


def test_names_in_trained_files() -> None:
    """What peft and the original's trainer call the weights they train."""
    with torch.device("meta"):
        names = set(AVicunaForCausalLM(AVicunaConfig()).state_dict())
    for layer in (0, 31):
        for part in LINEAR:
            block = "self_attn" if part in LINEAR[:4] else "mlp"
            name = f"model.layers.{layer}.{block}.{part}.weight"
            assert model_name(f"base_model.model.{name}") == name
            assert name in names
    for key in ("mm_projector.weight", "mm_projector_a.bias"):
        for prefix in ("model.", "base_model.model.model.", "module.model.", "model.model.", ""):
            assert model_name(prefix + key) == f"media.{key}"
            assert f"media.{key}" in names
    assert model_name("base_model.model.lm_head.weight") == "lm_head.weight"
