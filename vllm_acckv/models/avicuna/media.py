# SPDX-License-Identifier: Apache-2.0
"""Pictures and sounds to tokens of AVicuna: CLIP, CLAP and a linear layer behind each.

Shared by the transformers class and the vLLM class. Reference: yunlong10/AVicuna,
``model/avicuna_arch.py``, ``inference.py`` and ``test_clap.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ClapAudioModelWithProjection, CLIPVisionModelWithProjection

from vllm_acckv.models.avicuna.config import AVicunaConfig


class Media(nn.Module):
    """Towers and projectors; CLAP may be of a higher precision than the rest."""

    def __init__(self, config: AVicunaConfig) -> None:
        super().__init__()
        self.clip = CLIPVisionModelWithProjection(config.clip)
        self.clap = ClapAudioModelWithProjection(config.clap)
        self.mm_projector = nn.Linear(config.clip.projection_dim, config.hidden_size)
        self.mm_projector_a = nn.Linear(config.clap.projection_dim, config.hidden_size)
        self.num_audio_tokens = config.num_audio_tokens
        self.audio_places = config.audio_places
        self.video_places = config.video_places

    def embed_videos(self, pixels: Tensor, with_sound: Sequence[bool]) -> list[Tensor]:
        """Tokens of clips, each ``[frames, hidden]``, or ``[frames + sounds, hidden]`` for a clip
        without sound: where sound would be, it has the projection of a zero vector, as in training.

        Args:
            pixels: ``[clips, frames, 3, side, side]``.
            with_sound: which clips have their sound tokens elsewhere.
        """
        frames = self.clip(pixel_values=pixels.flatten(0, 1).to(self.clip.dtype)).image_embeds
        tokens = self.mm_projector(frames).unflatten(0, pixels.shape[:2])
        return [
            clip if sounding else self._with_silence(clip)
            for clip, sounding in zip(tokens, with_sound, strict=True)
        ]

    def _with_silence(self, clip: Tensor) -> Tensor:
        whole = clip.new_empty(len(self.audio_places) + len(clip), clip.shape[1])
        whole[self.video_places] = clip
        whole[self.audio_places] = self.mm_projector_a.bias.to(clip.dtype)
        return whole

    def embed_audio(
        self, mel: Tensor, windows: Sequence[int], of_clips: Sequence[bool]
    ) -> list[Tensor]:
        """Tokens of sounds, each ``[windows, hidden]``, or as many as a clip's sound has.

        Args:
            mel: fp32 ``[all windows, 1, 1001, 64]``.
            windows: how many of them each sound has.
            of_clips: which sounds belong to a clip.
        """
        # No window is longer than CLAP's ten seconds. (laion_clap 1.1.4 and transformers' feature
        # extractor take a random one for longer if none is, which is for training.)
        longer = torch.zeros(len(mel), 1, dtype=torch.bool, device=mel.device)
        heard = self.clap(input_features=mel.to(self.clap.dtype), is_longer=longer).audio_embeds
        # Unlike CLIP's, the vectors that the projector was trained on are normalised.
        heard = F.normalize(heard, dim=-1).to(self.mm_projector_a.weight.dtype)
        tokens = self.mm_projector_a(heard).split(list(windows))
        return [
            filled(sound, self.num_audio_tokens) if of_clip else sound
            for sound, of_clip in zip(tokens, of_clips, strict=True)
        ]


def filled(tokens: Tensor, count: int) -> Tensor:
    """``[n, hidden]`` repeated in order to ``[count, hidden]``, the first ones once more than the
    last where ``n`` does not divide ``count``; of more than ``count``, the first."""
    every, more = divmod(count, len(tokens))
    times = torch.full((len(tokens),), every, device=tokens.device)
    times[:more] += 1
    return tokens.repeat_interleave(times, dim=0, output_size=count)
