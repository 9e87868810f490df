# SPDX-License-Identifier: Apache-2.0
"""VideoLLaMA2.1-7B-AV in transformers, for the runner in :mod:`vllm_acckv.hf`.

Modules bear the names of the published checkpoint, so ``from_pretrained`` loads it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2ForCausalLM, Qwen2Model, SiglipVisionModel

from vllm_acckv.models.beats import Beats
from vllm_acckv.models.placing import placed
from vllm_acckv.models.videollama2.config import VideoLLaMA2Config
from vllm_acckv.models.videollama2.connector import STCConnector, audio_projector


class VisionTower(nn.Module):
    """SigLIP up to the selected layer; nested like the checkpoint's keys."""

    def __init__(self, config: VideoLLaMA2Config) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = SiglipVisionModel(config.vision_tower)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 3, side, side]`` to ``[n, patches, channels]``, without the final norm."""
        siglip: Any = self.vision_tower.vision_model
        patches: torch.Tensor = siglip.encoder(siglip.embeddings(pixels)).last_hidden_state
        return patches


class VideoLLaMA2Model(Qwen2Model):
    """Decoder, towers and projectors."""

    config_class = VideoLLaMA2Config

    def __init__(self, config: VideoLLaMA2Config) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config)
        self.mm_projector = STCConnector(config.mm_hidden_size, config.hidden_size)
        if config.audio_tower is not None:
            self.audio_tower = Beats(config.audio_tower)
            self.mm_projector_a = audio_projector(config)

    def embed_videos(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[clips, T, 3, side, side]`` to ``[clips, video tokens, hidden]``."""
        patches = self.vision_tower(pixels.flatten(0, 1).to(self.dtype))
        tokens: torch.Tensor = self.mm_projector(patches.unflatten(0, pixels.shape[:2]))
        return tokens

    def embed_audio(self, features: torch.Tensor) -> torch.Tensor:
        """``[sounds, 2998, 128]`` to ``[sounds, audio tokens, hidden]``."""
        tokens: torch.Tensor = self.mm_projector_a(self.audio_tower(features))
        return tokens


class Videollama2Qwen2ForCausalLM(Qwen2ForCausalLM):
    """``generate(**processor(text=..., videos=..., audio=...))``."""

    config_class = VideoLLaMA2Config
    # The layers of SigLIP behind the selected one, its pooling head, and the classifier of BEATs.
    _keys_to_ignore_on_load_unexpected = (
        r"vision_tower\.vision_model\.(encoder\.layers|head)\.",
        r"audio_tower\.predictor\.",
        r"audio_tower\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.",
    )

    def __init__(self, config: VideoLLaMA2Config) -> None:
        super().__init__(config)
        self.model = VideoLLaMA2Model(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of Qwen2; media take the places of their tokens in ``input_ids``.

        Args:
            pixel_values_videos: ``[clips, T, 3, side, side]``.
            input_features: ``[sounds, 2998, 128]``.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.model.embed_tokens(input_ids)
            if pixel_values_videos is not None:
                tokens = self.model.embed_videos(pixel_values_videos)
                inputs_embeds = placed(tokens, inputs_embeds, input_ids, self.config.video_token_id)
            if input_features is not None:
                tokens = self.model.embed_audio(input_features)
                inputs_embeds = placed(tokens, inputs_embeds, input_ids, self.config.audio_token_id)
            input_ids = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
