# SPDX-License-Identifier: Apache-2.0
"""Configuration of AVicuna (``model_type`` ``avicuna``) as ``vllm-acckv convert`` writes it.

The authors publish no configuration of the whole model. Their ``AVicuna``, which the folders of
their LoRAs name, is not taken as ``model_type``: such a folder is no checkpoint of its own.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ClapAudioConfig, CLIPVisionConfig, LlamaConfig

# openai/clip-vit-large-patch14
_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
# laion/clap-htsat-fused, the transformers form of 630k-fusion-best.pt
_CLAP = {"enable_fusion": True, "projection_dim": 512}


@strict
class AVicunaConfig(LlamaConfig):
    """Fields of Llama, and what is in front of it.

    Attributes:
        num_mm_tokens: tokens of a clip, sound included.
        audio_ratio: share of them that is sound; the default is that of the published weights.
        clip_config: overrides of CLIP ViT-L/14@224.
        clap_config: overrides of CLAP HTSAT-fused.
        mel_range: lowest and highest frequency in Hz that CLAP hears.
        video_token_id, audio_token_id: ids of ``<|video|>`` and ``<|audio|>``, which are added to
            the tokenizer; the defaults are the first two that Vicuna's does not have.
    """

    model_type = "avicuna"

    vocab_size: int = 32_002
    num_mm_tokens: int = 100
    audio_ratio: float = 0.25
    clip_config: dict[str, Any] | None = None
    clap_config: dict[str, Any] | None = None
    mel_range: list[int] | tuple[int, ...] = (50, 14_000)
    video_token_id: int = 32_000
    audio_token_id: int = 32_001

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # A step that rounds up too far leaves no place for the last sounds.
        if not 0 < self.num_audio_tokens == len(self.audio_places) < self.num_mm_tokens:
            raise ValueError(
                f"audio_ratio {self.audio_ratio} of num_mm_tokens {self.num_mm_tokens} cannot be "
                "spread among the pictures; published weights use 0.25 of 100."
            )

    @property
    def num_audio_tokens(self) -> int:
        """Sound tokens of a clip."""
        return int(self.num_mm_tokens * self.audio_ratio)

    @property
    def num_frames(self) -> int:
        """Pictures, hence picture tokens, of a clip."""
        return self.num_mm_tokens - self.num_audio_tokens

    @property
    def insert_freq(self) -> int:
        """Pictures behind each sound token."""
        return round(self.num_frames / (self.num_audio_tokens + 1))

    @property
    def audio_places(self) -> list[int]:
        """Where among a clip's tokens its sound is: 0, 4, ..., 96 of 100."""
        every = range(0, self.num_mm_tokens, self.insert_freq + 1)
        return list(every[: self.num_audio_tokens])

    @property
    def video_places(self) -> list[int]:
        """Where its pictures are."""
        sound = set(self.audio_places)
        return [place for place in range(self.num_mm_tokens) if place not in sound]

    @property
    def clip(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(**{**_CLIP, **(self.clip_config or {})})

    @property
    def clap(self) -> ClapAudioConfig:
        return ClapAudioConfig(**{**_CLAP, **(self.clap_config or {})})
