# SPDX-License-Identifier: Apache-2.0
"""A Qwen2.5-Omni thinker of a few million random weights, for tests and trials without downloads.

Plain random initialisation would make a poor test: attention nearly uniform, logits nearly flat,
one token repeated. Here the scales are chosen such that attention is peaked and differs between
heads, every modality enters at the scale of the text, and greedy output depends on all of them.
"""

import hashlib
import json
import math
import re
import shutil
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from vllm_acckv import cpu_media

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerBase,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )

MARKER = "tiny_model.json"
"""File that names the arguments of a finished build and marks a directory as ours."""

SPECIAL_TOKENS = {
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "vision_pad_token": "<|vision_pad|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
}
"""Attribute of the tokenizer -> token."""

CHAT_TEMPLATE = """\
{%- macro part(content) -%}
{%- if content.type == 'image' or 'image' in content or 'image_url' in content -%}
<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif content.type == 'video' or 'video' in content or 'video_url' in content -%}
<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif content.type == 'audio' or 'audio' in content or 'audio_url' in content -%}
<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif 'text' in content -%}
{{- content.text -}}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for content in message.content -%}{{- part(content) -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_CORPUS = """\
system user assistant You are a helpful assistant. What happens in the video? What can be heard?
Describe the video and the sound. Describe what is happening in this clip, second by second.
A red square moves from the left to the right while a low tone plays. Then the tone becomes higher
and a blue square crosses the green background. Which colour is shown first? Which sound is louder?
The person in the video is playing the guitar, and another person is singing on the stage. The dog
barks twice before the door opens. Is the instrument that makes the sound visible in the picture?
How many instruments are there? When does the speaker begin to talk? Answer the question shortly.
The audio and the video are aligned: every second of the video has twenty five tokens of sound.
Yes. No. One, two, three, four, five, six, seven, eight, nine, ten. 0 1 2 3 4 5 6 7 8 9
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `build` can vary.

    `head_dim` is a multiple of 16; `vocab_size` is a multiple of 64 and at least 320. Pixels are
    those of an image or frame after resizing; two frames make one token per 28 x 28 of them.
    """

    seed: int = 0
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 512
    max_positions: int = 32768
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 12 * 28 * 28
    max_audio_seconds: int = 120

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim


def build(directory: Path, **arguments: int) -> Path:
    """Write the checkpoint that `arguments` (the fields of `Recipe`) describe; return `directory`.

    The same arguments give the same bytes. A directory that already holds them is left as it is,
    an older build is replaced, and anything else in the way raises FileExistsError.
    """
    directory = Path(directory)
    recipe = Recipe(**arguments)
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    marker = {"arguments": asdict(recipe), "built_by": source}
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARKER).is_file():
            raise FileExistsError(f"{directory} is not empty and not a tiny model")
        if json.loads((directory / MARKER).read_text()) == marker:
            return directory

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        finished = Path(scratch) / "model"
        finished.mkdir()
        _write_checkpoint(finished, recipe)
        _write_json(finished / MARKER, marker)
        if directory.exists():
            shutil.rmtree(directory)
        finished.rename(directory)
    return directory


def write_shape(
    directory: Path, recipe: Recipe, corpus: str | None = None, **text_config: Any
) -> Path:
    """Write everything but weights, for vLLM's ``load_format="dummy"``; return `directory`.

    Towers stay tiny. `text_config` overrides the decoder's own settings, so that it can have the
    shape of a real model; a larger `vocab_size` leaves the tokenizer as it is. The tokenizer learns
    its words from `corpus`.
    """
    directory.mkdir(parents=True)
    _write_settings(directory, recipe, text_config, corpus or _CORPUS)
    return directory


def load_thinker(directory: Path) -> "Qwen2_5OmniThinkerForConditionalGeneration":
    """The checkpoint in transformers: float32, eager attention, evaluation mode."""
    cpu_media.fix()
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    thinker = Qwen2_5OmniThinkerForConditionalGeneration._from_config(
        _thinker_config(config), attn_implementation="eager", dtype=torch.float32
    )
    weights = load_file(directory / "model.safetensors")
    thinker.load_state_dict({key.removeprefix("thinker."): w for key, w in weights.items()})
    return thinker.eval()


def _write_checkpoint(directory: Path, recipe: Recipe) -> None:
    config, num_text_tokens = _write_settings(directory, recipe, {}, _CORPUS)
    weights = _random_weights(_thinker_config(config), recipe, num_text_tokens)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _write_settings(
    directory: Path, recipe: Recipe, text_config: dict, corpus: str
) -> tuple[dict, int]:
    """Tokenizer, processors and configuration; the latter, and how many tokens are text."""
    cpu_media.fix()
    tokenizer = _train_tokenizer(recipe, corpus)
    tokenizer.save_pretrained(directory)
    config = _config(recipe, tokenizer)
    config["thinker_config"]["text_config"].update(text_config)
    _write_json(directory / "config.json", config)
    _write_json(directory / "preprocessor_config.json", _preprocessor_config(recipe))
    eos = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    _write_json(
        directory / "generation_config.json",
        {"eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id},
    )
    return config, len(tokenizer) - len(SPECIAL_TOKENS)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _train_tokenizer(recipe: Recipe, corpus: str) -> "PreTrainedTokenizerBase":
    """Byte-level BPE over `corpus`; the special tokens take the ids after the last merge.

    `size` in the tokenizer's arguments looks misplaced. It is the only file setting that reaches
    the pixel limits of videos: Qwen2_5OmniProcessor has defaults for them (128 to 768 tokens per
    frame) which outrank the video processor's own, and which only the tokenizer's arguments
    outrank. Explicit ``mm_processor_kwargs`` still win.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trained.train_from_iterator(corpus.splitlines(), trainer)
    model = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        **SPECIAL_TOKENS,
        model_max_length=recipe.max_positions,
        chat_template=CHAT_TEMPLATE,
        size=_pixel_limits(recipe),
    )


def _pixel_limits(recipe: Recipe) -> dict[str, int]:
    return {"shortest_edge": recipe.min_pixels, "longest_edge": recipe.max_pixels}


def _preprocessor_config(recipe: Recipe) -> dict:
    """Settings of the image, video and audio processors.

    Sound is padded to `max_audio_seconds` before it is cut again; longer sound loses its end.
    """
    return {
        "processor_class": "Qwen2_5OmniProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": _pixel_limits(recipe),
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "cap_pixels_per_frame": False,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "sampling_rate": 16_000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": recipe.max_audio_seconds,
        "n_samples": recipe.max_audio_seconds * 16_000,
        "nb_max_frames": recipe.max_audio_seconds * 100,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
    }


def _config(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> dict:
    """config.json: the whole Omni model as far as its thinker, without speech output."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        "audio_config": _audio_config(recipe),
        "vision_config": _vision_config(recipe),
        "text_config": _text_config(recipe),
        "audio_token_index": ids["audio_token"],
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "vision_token_id": ids["vision_pad_token"],
        "pad_token_id": ids["pad_token"],
        "eos_token_id": ids["eos_token"],
        "user_token_id": tokenizer.encode("user")[0],
        "seconds_per_chunk": 2,
        "position_id_per_seconds": 25,
        "tie_word_embeddings": False,
    }
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "dtype": "float32",
        "enable_audio_output": False,
        "thinker_config": thinker,
    }


def _thinker_config(config: dict) -> "Qwen2_5OmniThinkerConfig":
    from transformers import Qwen2_5OmniThinkerConfig

    return Qwen2_5OmniThinkerConfig(**config["thinker_config"])


def _text_config(recipe: Recipe) -> dict:
    eighth = recipe.head_dim // 8
    return {
        "model_type": "qwen2_5_omni_text",
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": 2 * recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": recipe.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [eighth, eighth + eighth // 2, eighth + eighth // 2],
        },
        "tie_word_embeddings": False,
    }


def _audio_config(recipe: Recipe) -> dict:
    return {
        "model_type": "qwen2_5_omni_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 2,
        "d_model": 64,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "n_window": 100,
        "max_source_positions": 1500,
        "output_dim": recipe.hidden_size,
    }


def _vision_config(recipe: Recipe) -> dict:
    return {
        "model_type": "qwen2_5_omni_vision_encoder",
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "out_hidden_size": recipe.hidden_size,
        "tokens_per_second": 25,
    }


_GAINS = (
    (r"^lm_head", 4.0),
    (r"^model\.layers.*o_proj", 2.0),
    (r"^audio_tower\.conv", 4.0),
    (r"^visual\.merger\.mlp\.2", 1.7),
    (r"", 1.0),
)
"""First pattern that a weight's name matches -> standard deviation of its output for unit input."""

_HEAD_SHARPNESS = (1.0, 2.0, 3.0, 4.0)
"""Standard deviation of the attention logits of a layer's query heads; each layer rotates it."""


def _random_weights(
    thinker_config: "Qwen2_5OmniThinkerConfig", recipe: Recipe, num_text_tokens: int
) -> dict[str, torch.Tensor]:
    """Weights by checkpoint name; each depends on `seed` and its own name and shape only."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config)
    weights = {}
    for name, empty in thinker.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{recipe.seed} {name}".encode()))
        weights[f"thinker.{name}"] = _random_weight(name, empty.shape, generator)

    for layer in range(recipe.num_layers):
        prefix = f"thinker.model.layers.{layer}.self_attn"
        heads = (torch.arange(recipe.num_heads) + layer) % len(_HEAD_SHARPNESS)
        sharpness = torch.tensor(_HEAD_SHARPNESS)[heads].repeat_interleave(recipe.head_dim)
        weights[f"{prefix}.q_proj.weight"] *= sharpness[:, None]
        weights[f"{prefix}.q_proj.bias"] *= sharpness
    # Kernels without mean: the level of silence, alike in all sound, does not reach the tokens.
    kernel = weights["thinker.audio_tower.conv1.weight"]
    kernel -= kernel.mean(dim=(1, 2), keepdim=True)
    # A token lowers its own logit, so that greedy decoding seldom repeats it.
    weights["thinker.lm_head.weight"] -= 0.1 * weights["thinker.model.embed_tokens.weight"]
    # Special tokens and unused rows are never the most likely ones: some text logit is above 0.
    weights["thinker.lm_head.weight"][num_text_tokens:] = 0
    return weights


def _random_weight(name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("bias"):
        # Biases of queries and keys make attention depend on distance as well as on content.
        scale = 0.5 if re.search(r"^model.*[qk]_proj", name) else 0.1
        return scale * torch.randn(size, generator=generator)
    if len(size) == 1:  # normalisation
        return torch.ones(size)
    gain = next(gain for pattern, gain in _GAINS if re.search(pattern, name))
    fan_in = 1 if "embed_tokens" in name else math.prod(size[1:])
    return gain / math.sqrt(fan_in) * torch.randn(size, generator=generator)
