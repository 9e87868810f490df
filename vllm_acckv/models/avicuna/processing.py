# SPDX-License-Identifier: Apache-2.0
"""Pictures, spectrograms and tokens for AVicuna.

Reference: yunlong10/AVicuna, ``inference.py``, ``test_clap.py`` and ``train/dataset.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import BatchFeature
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vllm_acckv.models.avicuna.config import AVicunaConfig
from vllm_acckv.models.processing import TaggedProcessor, frames_of, listed

SAMPLING_RATE = 48_000
WINDOW, STRIDE = 10 * SAMPLING_RATE, 4 * SAMPLING_RATE
# A remainder of a second or less is dropped; a longer one is filled up with silence.
_DROPPED = SAMPLING_RATE
_FFT, _HOP = 1024, 480
MEL_FRAMES, MEL_BINS = WINDOW // _HOP + 1, 64

# vicuna_v1, with a line break and a space behind the last medium of a message.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions. ' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set media = namespace(last=false) %}"
    "{% for part in message['content'] %}"
    "{% if 'video' in part['type'] %}{{ '<|video|>' }}{% set media.last = true %}"
    "{% elif 'audio' in part['type'] %}{{ '<|audio|>' }}{% set media.last = true %}"
    "{% elif 'text' in part %}"
    "{{ ('\\n ' if media.last else '') + part['text'] }}{% set media.last = false %}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class AVicunaProcessor(TaggedProcessor):
    """Prompts of AVicuna.

    ``<|video|><|audio|>`` is a clip with sound: 25 sound tokens, each in front of three picture
    tokens.
    ``<|video|>`` alone is a clip without: its 100 tokens are all video, and a quarter of them says
    that there is nothing to hear. ``<|audio|>`` alone is one token per window of ten seconds, every
    four seconds. So the model was trained; the original program itself only takes whole clips.
    """

    sampling_rate = SAMPLING_RATE
    default_chat_template = _CHAT_TEMPLATE
    config: AVicunaConfig

    @cached_property
    def _mel_filters(self) -> npt.NDArray[np.float64]:
        """``[513, 64]``."""
        lowest, highest = self.config.mel_range
        filters: npt.NDArray[np.float64] = mel_filter_bank(
            num_frequency_bins=_FFT // 2 + 1,
            num_mel_filters=MEL_BINS,
            min_frequency=lowest,
            max_frequency=highest,
            sampling_rate=SAMPLING_RATE,
            norm=None,
            mel_scale="htk",
        )
        return filters

    def videos_to_tensors(self, videos: Sequence[Any]) -> Mapping[str, torch.Tensor]:
        """``pixel_values_videos``: fp32 ``[clips, frames, 3, side, side]``."""
        clips = []
        for video in videos:
            frames = frames_of(video)
            frames = frames[np.linspace(0, len(frames) - 1, self.config.num_frames, dtype=int)]
            side = self.config.clip.image_size
            clips.append(torch.stack([picture(frame, side) for frame in frames]))
        return {"pixel_values_videos": torch.stack(clips)}

    def sounds_to_tensors(
        self, sounds: Sequence[Any], of_clips: Sequence[bool]
    ) -> Mapping[str, torch.Tensor]:
        """``input_features``: fp32 ``[all windows, 1, 1001, 64]``; ``audio_windows``: int64
        ``[sounds]``, windows of each. Of a clip's sound no more than it has tokens are used."""
        windows = [
            sound_windows(sound)[: self.config.num_audio_tokens if of_clip else None]
            for sound, of_clip in zip(sounds, of_clips, strict=True)
        ]
        mel = torch.stack([self.log_mel(window) for sound in windows for window in sound])
        return {
            "input_features": mel[:, None],
            "audio_windows": torch.tensor([len(sound) for sound in windows]),
        }

    def log_mel(self, window: npt.NDArray[np.float32]) -> torch.Tensor:
        """CLAP's spectrogram of ``[480000]`` samples in dB, fp32 ``[1001, 64]``."""
        features = spectrogram(
            window,
            window_function(_FFT, "hann"),
            frame_length=_FFT,
            hop_length=_HOP,
            power=2.0,
            mel_filters=self._mel_filters,
            log_mel="dB",
        )
        return torch.from_numpy(features.T.astype(np.float32))

    # Text

    def tokens_of_clip(self, with_sound: bool) -> list[int]:
        tokens = [self.video_token_id] * self.config.num_mm_tokens
        for place in self.config.audio_places if with_sound else ():
            tokens[place] = self.audio_token_id
        return tokens

    def pairs(self, ids: Sequence[int]) -> tuple[list[bool], list[bool]]:
        """Of the clips and of the sounds in a prompt, which make a pair: ``<|video|><|audio|>``."""
        video, audio = self.video_token_id, self.audio_token_id
        follower, leader = [*ids[1:], None], [None, *ids[:-1]]
        clips = [after == audio for one, after in zip(ids, follower, strict=True) if one == video]
        sounds = [before == video for before, one in zip(leader, ids, strict=True) if one == audio]
        return clips, sounds

    def expand(self, ids: Sequence[int], windows: Sequence[int] = ()) -> list[int]:
        """``ids`` with every tag, or pair of tags, replaced by the tokens that stand for it.

        Args:
            windows: of every sound.
        """
        video, audio = self.video_token_id, self.audio_token_id
        clips, sounds = map(iter, self.pairs(ids))
        expanded: list[int] = []
        counts = iter(windows)
        for token in ids:
            if token == video:
                expanded += self.tokens_of_clip(next(clips))
            elif token == audio:
                count = next(counts)
                expanded += [] if next(sounds) else [audio] * count
            else:
                expanded.append(token)
        return expanded

    def __call__(
        self,
        text: str | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        use_audio_in_video: bool = False,
        clips_with_sound: Sequence[bool] = (),
        sounds_of_clips: Sequence[bool] = (),
        return_tensors: str = "pt",
        **_: Any,
    ) -> BatchFeature:
        """As of the base class.

        Args:
            clips_with_sound, sounds_of_clips: where there is no ``text`` to tell which clips and
                sounds make pairs; ``[clips]`` and ``[sounds]``.
        """
        videos, audio = listed(videos, dims=4), listed(audio, dims=1)
        ids: list[int] = []
        if text is not None:
            bos = str(self.tokenizer.bos_token)
            ids = self.tokenizer(text, add_special_tokens=not text.startswith(bos))["input_ids"]
            if use_audio_in_video:
                ids = self.add_sound_tags(ids, [True] * len(audio))
            self._check(ids, len(videos), len(audio))
            clips_with_sound, sounds_of_clips = self.pairs(ids)
        data: dict[str, Any] = {}
        if videos:
            data |= self.videos_to_tensors(videos)
            data["clips_with_sound"] = clips_with_sound
        if audio:
            data |= self.sounds_to_tensors(audio, sounds_of_clips)
            data["sounds_of_clips"] = sounds_of_clips
        if text is not None:
            ids = self.expand(ids, [int(count) for count in data.get("audio_windows", ())])
            data |= {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        return BatchFeature(data, tensor_type=return_tensors)


def picture(frame: npt.NDArray[np.uint8], side: int) -> torch.Tensor:
    """The middle of a frame ``[height, width, 3]`` for CLIP, fp32 ``[3, side, side]``.

    Bicubic without antialiasing, as the authors' torchvision 0.13 resized tensors; CLIP's own
    preparation by PIL gives smoother pictures than the model was trained on.
    """
    pixels = torch.from_numpy(frame.copy()).movedim(-1, 0)[None].float() / 255
    short, long = sorted(frame.shape[:2])
    size = [side if edge == short else int(side * long / short) for edge in frame.shape[:2]]
    resized = F.interpolate(pixels, size, mode="bicubic", align_corners=False)[0]
    top, left = (round((edge - side) / 2) for edge in size)
    middle = resized[:, top : top + side, left : left + side]
    mean, std = (torch.tensor(one)[:, None, None] for one in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (middle - mean) / std


def sound_windows(waveform: Any) -> npt.NDArray[np.float32]:
    """Windows of ten seconds, every four, float32 ``[windows, 480000]``, rounded like 16-bit audio.

    Raises:
        ValueError: for what is not one channel of samples.
    """
    waveform = np.asarray(waveform, dtype=np.float32)
    if waveform.ndim != 1 or not len(waveform):
        raise ValueError(
            f"A sound is {list(waveform.shape)}; expected one channel, [samples], that is not "
            "empty."
        )
    rest = len(waveform) % WINDOW
    if len(waveform) > WINDOW and rest <= _DROPPED:
        waveform = waveform[: len(waveform) - rest]
    elif rest:
        waveform = np.pad(waveform, (0, WINDOW - rest))
    waveform = (waveform.clip(-1, 1) * 32767).astype(np.int16).astype(np.float32) / 32767
    every = np.lib.stride_tricks.sliding_window_view(waveform, WINDOW)[::STRIDE]
    return np.ascontiguousarray(every)
