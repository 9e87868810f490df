# SPDX-License-Identifier: Apache-2.0
"""AVicuna in transformers, for the runner in :mod:`vllm_acckv.hf`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM

from vllm_acckv.models.avicuna.config import AVicunaConfig
from vllm_acckv.models.avicuna.media import Media
from vllm_acckv.models.placing import placed


class AVicunaForCausalLM(LlamaForCausalLM):
    """``generate(**processor(text=..., videos=..., audio=...))``."""

    config_class = AVicunaConfig
    # Mel spectrograms in decibels lose too much in 16 bits, and CLAP is small.
    _keep_in_fp32_modules_strict = ("clap",)

    def __init__(self, config: AVicunaConfig) -> None:
        super().__init__(config)
        self.media = Media(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        clips_with_sound: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_windows: torch.Tensor | None = None,
        sounds_of_clips: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of Llama; media take the places of their tokens in ``input_ids``.

        Args:
            pixel_values_videos: ``[clips, frames, 3, side, side]``.
            clips_with_sound: bool ``[clips]``.
            input_features: fp32 ``[all windows, 1, 1001, 64]``.
            audio_windows: int64 ``[sounds]``, windows of each.
            sounds_of_clips: bool ``[sounds]``.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.model.embed_tokens(input_ids)
            if pixel_values_videos is not None and clips_with_sound is not None:
                clips = self.media.embed_videos(pixel_values_videos, clips_with_sound.tolist())
                inputs_embeds = placed(clips, inputs_embeds, input_ids, self.config.video_token_id)
            if (
                input_features is not None
                and audio_windows is not None
                and sounds_of_clips is not None
            ):
                sounds = self.media.embed_audio(
                    input_features, audio_windows.tolist(), sounds_of_clips.tolist()
                )
                inputs_embeds = placed(sounds, inputs_embeds, input_ids, self.config.audio_token_id)
            input_ids = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
