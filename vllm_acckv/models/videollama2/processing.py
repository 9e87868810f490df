# SPDX-License-Identifier: Apache-2.0
"""Frames, filter banks and tokens for VideoLLaMA2.1-7B-AV."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vllm_acckv.models.processing import TaggedProcessor, frames_of
from vllm_acckv.models.videollama2.config import VideoLLaMA2Config

SAMPLING_RATE = 16_000
SECONDS = 30
_FRAME, _HOP, _MEL_BINS = 400, 160, 128
FBANK_FRAMES = 1 + (SECONDS * SAMPLING_RATE - _FRAME) // _HOP  # 2998

# ChatML as in Qwen2's own template, with a tag for every medium and, as the original has it, a
# line break between the last medium and the text.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set media = namespace(last=false) %}"
    "{% for part in message['content'] %}"
    "{% if 'video' in part['type'] %}{{ '<|video|>' }}{% set media.last = true %}"
    "{% elif 'audio' in part['type'] %}{{ '<|audio|>' }}{% set media.last = true %}"
    "{% elif 'text' in part %}"
    "{{ ('\\n' if media.last else '') + part['text'] }}{% set media.last = false %}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class VideoLLaMA2Processor(TaggedProcessor):
    """Prompts of VideoLLaMA2.1-7B-AV: ``[video tokens][audio tokens]`` per clip with sound.

    Where the original crops at random, sound longer than 30 s keeps its first 30 s here.
    """

    sampling_rate = SAMPLING_RATE
    default_chat_template = _CHAT_TEMPLATE
    config: VideoLLaMA2Config

    @cached_property
    def _images(self) -> SiglipImageProcessorPil:
        side = self.config.vision_tower.image_size
        half = [0.5] * 3
        return SiglipImageProcessorPil(
            size={"height": side, "width": side}, image_mean=half, image_std=half
        )

    @property
    def video_tokens(self) -> int:
        return self.config.video_tokens

    @property
    def audio_tokens(self) -> int:
        tower = self.config.audio_tower
        if tower is None:
            raise ValueError(
                "This VideoLLaMA2 checkpoint has no audio tower (mm_audio_tower is not set); send "
                "video only."
            )
        return tower.num_tokens(FBANK_FRAMES)

    def videos_to_tensors(self, videos: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        """``pixel_values_videos``: fp32 ``[clips, T, 3, side, side]``."""
        wanted = self.config.num_frames
        clips = []
        for video in videos:
            frames = frames_of(video)
            if len(frames) != wanted:
                frames = frames[middle_frames(len(frames), wanted)]
            pixels = self._images(images=list(frames), return_tensors="pt")["pixel_values"]
            clips.append(pixels)
        return {"pixel_values_videos": torch.stack(clips)}

    def audio_to_tensors(
        self, audio: Sequence[Any], *, of_video: bool
    ) -> Mapping[str, torch.Tensor]:
        """``input_features``: fp32 ``[sounds, 2998, 128]``."""
        sample = sampled_sound if of_video else np.asarray
        return {"input_features": torch.stack([fbank(thirty_seconds(sample(a))) for a in audio])}

    def expand(self, ids: Sequence[int]) -> list[int]:
        expanded: list[int] = []
        for token in ids:
            count = 1
            if token == self.video_token_id:
                count = self.video_tokens
            elif token == self.audio_token_id:
                count = self.audio_tokens
            expanded += [token] * count
        return expanded


def middle_frames(total: int, wanted: int) -> npt.NDArray[np.int64]:
    """Indices of the frames in the middle of ``wanted`` equal parts, int64 ``[wanted]``.

    Parts divide the time from the first frame to the last, so a clip with fewer frames than
    wanted repeats some.
    """
    part = (total - 1) / wanted
    # The original's guard against halves that are a little too small to be rounded up.
    return np.round(part * (np.arange(wanted) + 0.5) + 1e-6).astype(np.int64)


def sampled_sound(waveform: Any) -> npt.NDArray[np.float32]:
    """Of a clip's sound, 8 pieces of 2 s, joined; float32 ``[at most 16 s]``.

    Piece i begins after i/8 of what is not the last 2 s (pytorchvideo 0.1.5's
    ``ConstantClipsPerVideoSampler``), so short clips repeat themselves.
    """
    pieces, seconds = 8, 2
    waveform = np.asarray(waveform, dtype=np.float32)
    duration = len(waveform) / SAMPLING_RATE
    step = Fraction(max(duration - seconds, 0)) / pieces
    starts = [index * step for index in range(pieces)]
    return np.concatenate(
        [
            waveform[int(start * SAMPLING_RATE) : int((start + seconds) * SAMPLING_RATE)]
            for start in starts
        ]
    )


def thirty_seconds(waveform: Any) -> npt.NDArray[np.float32]:
    """The first 30 s, or the sound and silence up to 30 s; float32 ``[480000]``."""
    samples = SECONDS * SAMPLING_RATE
    waveform = np.asarray(waveform, dtype=np.float32)
    if waveform.ndim != 1:
        raise ValueError(f"A sound is {list(waveform.shape)}; expected one channel, [samples].")
    return np.pad(waveform[:samples], (0, max(samples - len(waveform), 0)))


def fbank(waveform: npt.NDArray[np.float32]) -> torch.Tensor:
    """Kaldi filter bank of a waveform in [-1, 1], rounded to bf16 as in training.

    Returns:
        fp32 ``[1 + (samples - 400) // 160, 128]``.
    """
    features = kaldi_fbank(waveform * 2.0**15)
    return torch.from_numpy(features).to(torch.bfloat16).float()


def kaldi_fbank(waveform: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Kaldi's logarithmic filter bank with torchaudio's defaults: 25 ms frames every 10 ms, Povey
    window, pre-emphasis 0.97, no dither, Mel bins from 20 Hz to 8 kHz; ``[frames, 128]``."""
    window, filters = _kaldi_tables()
    features: npt.NDArray[np.float64] = spectrogram(
        waveform,
        window,
        frame_length=_FRAME,
        hop_length=_HOP,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=filters,
        mel_floor=float(np.finfo(np.float32).eps),
        log_mel="log",
        dtype=np.float64,
    )
    return features.T


@cache
def _kaldi_tables() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Window ``[400]`` and Mel filters ``[257, 128]``."""
    with warnings.catch_warnings():
        # The lowest filters are narrower than a frequency bin and stay empty, in Kaldi as well.
        warnings.filterwarnings("ignore", "At least one mel filter has all zero values")
        filters = mel_filter_bank(
            num_frequency_bins=257,
            num_mel_filters=_MEL_BINS,
            min_frequency=20,
            max_frequency=SAMPLING_RATE // 2,
            sampling_rate=SAMPLING_RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
    return window_function(_FRAME, "povey", periodic=False), filters
