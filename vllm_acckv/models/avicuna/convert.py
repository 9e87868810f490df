# SPDX-License-Identifier: Apache-2.0
"""Make one Hugging Face directory of what AVicuna's authors publish in pieces.

Reference: yunlong10/AVicuna, ``model/builder.py``: base, projectors, then each stage's LoRA merged
before the next is put on top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, ClapConfig, CLIPConfig, GenerationConfig, PreTrainedConfig

from vllm_acckv.models.avicuna.config import AVicunaConfig
from vllm_acckv.models.avicuna.modeling import AVicunaForCausalLM
from vllm_acckv.models.avicuna.processing import AVicunaProcessor
from vllm_acckv.models.avicuna.weight_files import (
    ConversionError,
    Lora,
    Weights,
    model_name,
    read_json,
    save_shards,
)
from vllm_acckv.models.processing import AUDIO_TAG, VIDEO_TAG

SHARD_BYTES = 2 * 2**30

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# Beginning of our names -> the piece they come from. The first that fits counts.
_ORIGINS = {
    "media.mm_projector.": "stage1",
    "media.mm_projector_a.": "stage2",
    "media.clip.": "clip",
    "media.clap.": "clap",
    "": "base",
}
_TOWERS = ("clip", "clap")
# Buffers of older files, the other half of CLIP and CLAP, and, in a file of one projector, the
# other one, which was not trained yet or not any more.
_UNUSED = {
    "base": r".*\.rotary_emb\.inv_freq",
    "stage1": r"media\.mm_projector_a\..*",
    "stage2": r"media\.mm_projector\..*",
    "clip": r"(text_model|text_projection)\..*|logit_scale|.*\.position_ids",
    "clap": r"(text_model|text_projection)\..*|logit_scale_[at]",
}
# Of a base's config.json, what does not describe the decoder.
_FOREIGN = ("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype")


@dataclass(frozen=True)
class Pieces:
    """Where the pieces are.

    Attributes:
        base: folder of lmsys/vicuna-7b-v1.5.
        stage1, stage2: files ``mm_projector.bin`` and ``mm_projector_a.bin``.
        stage3, stage4: folders of LoRAs.
        clip, clap: folders of openai/clip-vit-large-patch14 and laion/clap-htsat-fused.
    """

    base: Path
    stage1: Path
    stage2: Path
    stage3: Path
    stage4: Path
    clip: Path
    clap: Path


def convert(pieces: Pieces, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Merge in fp32 and write ``output``, the decoder in the precision of the base.

    Args:
        shard_bytes: size of a file; about as much memory is needed.

    Raises:
        ConversionError: if the pieces do not fit together; nothing is written then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} already exists; choose a new folder.")
    llama = _described(pieces.base, "llama")
    tokenizer = _tokenizer(pieces.base)
    config = _config(llama, pieces, tokenizer)
    merged = _Merged(config, pieces, llama["vocab_size"])
    output.mkdir(parents=True, exist_ok=True)
    save_shards(output, merged.tensors(), merged.sizes(), shard_bytes)
    config.dtype = merged.dtype
    config.save_pretrained(output)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.05,  # as in the original's inference.py
    ).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # Is not saved, although it decides how text behind a tag is tokenized.
    file = output / "tokenizer_config.json"
    file.write_text(json.dumps({**read_json(file), "legacy": True}, indent=2))


def _tokenizer(base: Path) -> Any:
    """Vicuna's with the tags.

    The original tokenizes what is in front of a tag and behind it apart, and each piece gets a
    space in front; with ``legacy`` so does what is between special tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, legacy=True)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConversionError(f"{base} has no tokenizer: {first}") from None
    tokenizer.add_tokens([VIDEO_TAG, AUDIO_TAG], special_tokens=True)
    tokenizer.chat_template = AVicunaProcessor.default_chat_template
    return tokenizer


def _described(folder: Path, model_type: str) -> dict[str, Any]:
    """What a folder's ``config.json`` says of its model."""
    found = read_json(folder / "config.json")
    if found.get("model_type") != model_type:
        raise ConversionError(
            f"{folder} holds a model of type {found.get('model_type')!r}; expected {model_type!r}."
        )
    return {name: value for name, value in found.items() if name not in _FOREIGN}


def _config(llama: dict[str, Any], pieces: Pieces, tokenizer: Any) -> AVicunaConfig:
    clip = CLIPConfig(**_described(pieces.clip, "clip"))
    clap = ClapConfig(**_described(pieces.clap, "clap"))
    clip.vision_config.projection_dim = clip.projection_dim
    if not clap.audio_config.enable_fusion:
        raise ConversionError(
            f"{pieces.clap} is a CLAP without fusion, which hears something else; take "
            "laion/clap-htsat-fused."
        )
    general = PreTrainedConfig().to_dict()
    towers = {
        f"{name}_config": {key: one for key, one in tower.to_dict().items() if key not in general}
        for name, tower in (("clip", clip.vision_config), ("clap", clap.audio_config))
    }
    hearing = pieces.clap / "preprocessor_config.json"
    heard = read_json(hearing) if hearing.is_file() else {}
    mel_range = [
        heard.get(name, default)
        for name, default in zip(
            ("frequency_min", "frequency_max"), AVicunaConfig.mel_range, strict=True
        )
    ]
    video, audio = tokenizer.convert_tokens_to_ids([VIDEO_TAG, AUDIO_TAG])
    own = {
        "architectures": [AVicunaForCausalLM.__name__],
        "mel_range": mel_range,
        "vocab_size": max(llama["vocab_size"], video + 1, audio + 1),
        "video_token_id": video,
        "audio_token_id": audio,
    }
    return AVicunaConfig(**{**llama, **towers, **own})


class _Merged:
    """The weights of the converted model, made one by one.

    Attributes:
        dtype: of the decoder and the projectors. Towers keep theirs.
    """

    def __init__(self, config: AVicunaConfig, pieces: Pieces, base_rows: int) -> None:
        """
        Raises:
            ConversionError: for weights that are missing, unknown or of another shape.
        """
        with torch.device("meta"):
            model = AVicunaForCausalLM(config)
        self._shapes = {name: empty.shape for name, empty in model.state_dict().items()}
        self._found: dict[str, tuple[Weights, str]] = {}
        expected = dict(self._shapes)
        for name in _TABLES:
            expected[name] = torch.Size((base_rows, config.hidden_size))
        for prefix, piece in _ORIGINS.items():
            self._read(piece, prefix, Weights(getattr(pieces, piece)), expected)
        for name in self._shapes:
            if name not in self._found:
                prefix, piece = _origin(name)
                key = name.removeprefix(prefix if piece in _TOWERS else "media.")
                raise ConversionError(f"{getattr(pieces, piece)} has no {key}, which is needed.")
        self._stages = [Lora.read(pieces.stage3), Lora.read(pieces.stage4)]
        for stage in self._stages:
            for name, shape in stage.shapes():
                _check_shape(name, shape, expected.get(name), stage.folder)
        self.dtype = self._original("lm_head.weight").dtype

    def _read(
        self, piece: str, prefix: str, weights: Weights, expected: dict[str, torch.Size]
    ) -> None:
        """Note where the weights of a piece are, after a look at their names and shapes."""
        tower = prefix if piece in _TOWERS else ""
        for key in weights:
            name = model_name(key)
            if re.fullmatch(_UNUSED[piece], name):
                continue
            name = tower + name
            fits = _origin(name)[1] == piece
            shape = expected.get(name) if fits else None
            _check_shape(key, weights.shape(key), shape, weights.path)
            self._found[name] = weights, key

    def _original(self, name: str) -> torch.Tensor:
        weights, key = self._found[name]
        return weights[key]

    def sizes(self) -> dict[str, int]:
        """Bytes of each weight, in the order of `tensors`."""
        return {
            name: shape.numel() * self._dtype(name).itemsize for name, shape in self._shapes.items()
        }

    def _dtype(self, name: str) -> torch.dtype:
        tower = _origin(name)[1] in _TOWERS
        return self._original(name).dtype if tower else self.dtype

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and weights, contiguous and with memory of their own."""
        for name, shape in self._shapes.items():
            weight = self._original(name)
            if weight.is_floating_point():
                weight = weight.float()
                for stage in self._stages:
                    weight = stage.apply(name, weight)
            yield name, _with_rows(weight, shape).to(self._dtype(name), copy=True).contiguous()


def _with_rows(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A table of tokens with rows for the tags, each the mean of the others.

    What stands there is never looked up. As a logit, the mean is never the largest, and its
    probability is at most the mean of the others' (Jensen): 1/32000.
    """
    more = (shape[0] - len(weight)) if shape else 0
    if not more:
        return weight
    return torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(more, -1)])


def _origin(name: str) -> tuple[str, str]:
    """Beginning of our name of a weight, and the piece it comes from."""
    return next(pair for pair in _ORIGINS.items() if name.startswith(pair[0]))


def _check_shape(key: str, shape: torch.Size, expected: torch.Size | None, where: Path) -> None:
    if expected is None:
        raise ConversionError(f"{where} has {key}, which AVicuna does not have.")
    if shape != expected:
        raise ConversionError(
            f"{key} of {where} is {list(shape)}; the configurations expect {list(expected)}."
        )
