# SPDX-License-Identifier: Apache-2.0
"""Everything of a checkpoint but weights: vLLM draws those itself (``load_format="dummy"``).

The tokenizers know bytes and the models' special tokens. Sizes are the smallest that vLLM takes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

REMOTE_CODE = Path(__file__).with_name("remote_code.py")

# What the models' own templates write for a clip, without roles.
TEMPLATE = """\
{%- for message in messages -%}{%- for part in message.content -%}
{%- if part.type == 'video' -%}VIDEO{%- elif part.type == 'audio' -%}AUDIO
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endfor -%}
"""

Ids = dict[str, int]


def write_tokenizer(
    directory: Path, special: dict[str, str], video: str, audio: str, **settings: Any
) -> Ids:
    """Write a tokenizer whose template says ``video`` and ``audio``; return the special ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: id for id, one in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", **special}
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(directory / "tokenizer.json"))
    template = TEMPLATE.replace("VIDEO", video).replace("AUDIO", audio)
    write_json(
        directory / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token=special["pad_token"],
        eos_token=special["eos_token"],
        extra_special_tokens=special,
        chat_template=template,
        **settings,
    )
    return {name: tokenizer.token_to_id(token) for name, token in special.items()}


def write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def decoder(**settings: Any) -> dict[str, Any]:
    """A text model of two layers, in the words that most configurations share."""
    return {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **settings,
    }


def qwen3_omni(directory: Path) -> None:
    pixels = {"shortest_edge": 4 * 32 * 32, "longest_edge": 12 * 32 * 32}
    special = {
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    ids = write_tokenizer(
        directory,
        special,
        "<|vision_start|><|video_pad|><|vision_end|>",
        "<|audio_start|><|audio_pad|><|audio_end|>",
        size=pixels,  # the only file whose limits reach videos, as in tiny_model.py
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]}
    thinker = {
        "audio_config": {
            "encoder_layers": 1,
            "d_model": 64,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "output_dim": 128,
            "downsample_hidden_size": 16,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 128,
            "image_size": 128,
            "num_position_embeddings": 64,
            "apply_vit_abs_pos_embed": True,
            "deepstack_visual_indexes": [0],
        },
        "text_config": decoder(
            moe_intermediate_size=64,
            num_experts=4,
            num_experts_per_tok=2,
            rope_parameters={**rope, "mrope_interleaved": True},
        ),
        "audio_token_id": ids["audio_token"],
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "position_id_per_seconds": 13,
    }
    write_json(
        directory / "config.json",
        architectures=["Qwen3OmniMoeForConditionalGeneration"],
        model_type="qwen3_omni_moe",
        dtype="float32",
        enable_audio_output=False,
        thinker_config=thinker,
    )
    write_json(
        directory / "preprocessor_config.json",
        processor_class="Qwen3OmniMoeProcessor",
        image_processor_type="Qwen2VLImageProcessor",
        video_processor_type="Qwen2VLVideoProcessor",
        feature_extractor_type="WhisperFeatureExtractor",
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size=pixels,
        cap_pixels_per_frame=False,
        feature_size=128,
    )


def minicpm_o(directory: Path) -> None:
    """Version 2.6. A picture is 4 tokens, all of them ``<unk>``, like a second's 25 of sound."""
    shutil.copy(REMOTE_CODE, directory)
    special = {
        "unk": "<unk>",
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "audio_start": "<|audio_start|>",
        "audio_end": "<|audio_end|>",
        "spk_start": "<|spk_bos|>",
        "spk_end": "<|spk_eos|>",
    }
    write_tokenizer(directory, special, "(<video>./</video>)", "(<audio>./</audio>)")
    write_json(
        directory / "config.json",
        architectures=["MiniCPMO"],
        model_type="minicpmo",
        auto_map={"AutoConfig": "remote_code.MiniCPMOConfig"},
        dtype="float32",
        version="2.6",
        query_num=4,
        image_size=112,
        drop_vision_last_layer=False,
        audio_pool_step=2,
        audio_chunk_length=1.0,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
        },
        audio_config={
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 256,
        },
        **decoder(),
    )
    write_json(
        directory / "preprocessor_config.json",
        auto_map={
            "AutoProcessor": "remote_code.MiniCPMOProcessor",
            "AutoImageProcessor": "remote_code.MiniCPMVImageProcessor",
        },
        processor_class="MiniCPMOProcessor",
        image_processor_type="MiniCPMVImageProcessor",
        feature_extractor_type="WhisperFeatureExtractor",
        image_feature_size=4,
    )


def mimo_v2(directory: Path) -> None:
    """As published: the architecture without multimodal parts, which vLLM replaces."""
    shutil.copy(REMOTE_CODE, directory)
    special = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_token": "<|audio_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "audio_start_token": "<|mimo_audio_start|>",
        "audio_end_token": "<|mimo_audio_end|>",
        "video_start_token": "<|mimo_video_start|>",
        "video_end_token": "<|mimo_video_end|>",
    }
    ids = write_tokenizer(
        directory,
        special,
        "<|vision_start|><|video_pad|><|vision_end|>",
        "<|mimo_audio_start|><|audio_pad|><|mimo_audio_end|>",
    )
    write_json(
        directory / "config.json",
        architectures=["MiMoV2ForCausalLM"],
        model_type="mimo_v2",
        auto_map={"AutoConfig": "remote_code.MiMoV2Config"},
        dtype="float32",
        sliding_window=128,
        hybrid_layer_pattern=[0, 1],
        vision_config={"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
        processor_config={
            "video_max_pixels": 12 * 32 * 32,
            **{f"{name}_id": id for name, id in ids.items()},
        },
        **decoder(),
    )


def gemma4(directory: Path, name: str = "Gemma4", model_type: str = "gemma4") -> None:
    special = {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "audio_token": "<|audio|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    ids = write_tokenizer(directory, special, special["video_token"], special["audio_token"])
    write_json(
        directory / "config.json",
        architectures=[f"{name}ForConditionalGeneration"],
        model_type=model_type,
        dtype="float32",
        text_config=decoder(sliding_window=64),
        # The one is Gemma 4's, the other Gemma 4 Unified's.
        vision_config={"default_output_length": 70, "num_soft_tokens": 70},
        audio_config={},
        eoa_token_index=ids["eoa_token"],
        **{f"{token}_id": id for token, id in ids.items() if token[:3] not in ("pad", "eos")},
    )
    write_json(
        directory / "processor_config.json",
        processor_class=f"{name}Processor",
        image_processor={"image_processor_type": f"{name}ImageProcessor"},
        video_processor={"video_processor_type": f"{name}VideoProcessor"},
        feature_extractor={"feature_extractor_type": f"{name}AudioFeatureExtractor"},
    )


def gemma4_unified(directory: Path) -> None:
    gemma4(directory, "Gemma4Unified", "gemma4_unified")
