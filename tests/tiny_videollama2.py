# SPDX-License-Identifier: Apache-2.0
"""A VideoLLaMA2.1-7B-AV of two million random weights, in the layout of the published files."""

from __future__ import annotations

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_acckv import cpu_media

cpu_media.fix()

from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import Qwen2Tokenizer  # noqa: E402

from vllm_acckv.models.videollama2.config import VideoLLaMA2Config  # noqa: E402

VOCABULARY = 448
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's own template, which the plugin's takes the place of: it cannot write lists of parts.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{% endfor %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["Videollama2Qwen2ForCausalLM"],
    "model_type": "videollama2_qwen2",
    "dtype": "float32",
    "vocab_size": VOCABULARY + 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
    "bos_token_id": VOCABULARY - 3,
    "eos_token_id": VOCABULARY - 1,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "stc_connector_v35",
    "mm_hidden_size": 64,
    "mm_audio_tower": "work_dirs/audio_tower.bin",
    "mm_projector_a_type": "mlp2x_gelu",
    "mm_hidden_size_a": 48,
    "hidden_size_a": 256,
    "num_frames": 16,
    "image_aspect_ratio": "pad",
    "use_mm_proj": True,
    "tune_audio_tower": True,
    # 7 x 7 patches, an odd number as at full size: 16 frames become 8 x 3 x 3 = 72 tokens.
    "vision_tower_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 98,
    },
    # 46 x 2 = 92 tokens.
    "audio_tower_config": {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 96,
        "patch_size": 64,
        "patch_channels": 32,
        "conv_positions": 16,
        "conv_groups": 4,
        "num_buckets": 32,
        "max_distance": 64,
    },
    "video_token_id": VOCABULARY,
    "audio_token_id": VOCABULARY + 1,
}
VIDEO_TOKENS, AUDIO_TOKENS = 72, 92


def build(directory: Path, **config: Any) -> Path:
    """Write a checkpoint; ``config`` overrides `CONFIG`. Equal arguments, equal bytes."""
    from vllm_acckv.models.videollama2.modeling import Videollama2Qwen2ForCausalLM

    directory.mkdir(parents=True)
    settings = {**CONFIG, **config}
    (directory / "config.json").write_text(json.dumps(settings, indent=2))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [VOCABULARY - 1, VOCABULARY - 3]})
    )
    train_tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        model = Videollama2Qwen2ForCausalLM(VideoLLaMA2Config(**settings))
    shapes = {name: tuple(empty.shape) for name, empty in model.state_dict().items()}
    save_file(
        {name: weight(name, shape) for name, shape in {**shapes, **unused(settings)}.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


def train_tokenizer() -> Any:
    """Byte-level BPE like Qwen2's; it knows neither ``<|video|>`` nor ``<|audio|>``."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "What happens in the clip? Describe what can be seen and heard: video, audio, colours. "
    trained.train_from_iterator(
        [text * 4, "system user assistant You are a helpful assistant.\n"], trainer
    )
    learned = json.loads(trained.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    while len(vocabulary) < VOCABULARY - len(SPECIAL):  # a short text has few pairs to merge
        vocabulary[f"unused{len(vocabulary)}"] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in learned["merges"]],
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
    )
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def unused(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys that published files hold and the model does not need."""
    vision, audio = settings["vision_tower_config"], settings["audio_tower_config"]
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    tower = "model.vision_tower.vision_tower.vision_model"
    layer = f"{tower}.encoder.layers.{vision['num_hidden_layers'] - 1}"
    linear = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.out_proj": (hidden, hidden),
        "mlp.fc1": (inner, hidden),
        "mlp.fc2": (hidden, inner),
    }
    keys: dict[str, tuple[int, ...]] = {
        f"{tower}.head.probe": (1, 1, hidden),
        "model.audio_tower.predictor.weight": (527, audio["hidden_size"]),
        "model.audio_tower.predictor.bias": (527,),
    }
    for name, shape in linear.items():
        keys |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for norm in ("layer_norm1", "layer_norm2"):
        keys |= {f"{layer}.{norm}.weight": (hidden,), f"{layer}.{norm}.bias": (hidden,)}
    return keys


# First pattern that a name matches -> standard deviation of the output for unit input.
_GAINS = (
    (r"lm_head", 4.0),
    (r"model\.layers\.\d+\.self_attn\.q_proj", 2.5),
    (r"model\.layers.*o_proj", 2.0),
    (r"patch_embedding", 4.0),
    (r"position_embedding|relative_attention_bias", 1.0),
    (r"sampler", 3.0),
    (r"readout\.2|mm_projector_a\.2", 2.0),
    (r"", 1.4),
)


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32; depends on name and shape only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) == 1 or name.endswith(("weight_g", "grep_a")):
        return 1 + 0.2 * noise
    gain = next(gain for pattern, gain in _GAINS if re.search(pattern, name))
    table = re.search(r"embed_tokens|position_embedding|relative_attention_bias|probe", name)
    return gain / math.sqrt(1 if table else math.prod(shape[1:])) * noise
