# SPDX-License-Identifier: Apache-2.0
"""Which modality every prompt token belongs to.

The scheduler and the worker both call :func:`token_modalities` on the request's multimodal
features and must come to the same answer, so it is a pure function of its arguments. Masks are
used throughout instead of ``[start, end)`` ranges: audio inside video interleaves the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TEXT, VIDEO, AUDIO = 0, 1, 2
MODALITY_NAMES = {TEXT: "text", VIDEO: "video", AUDIO: "audio"}

Modalities = npt.NDArray[np.int8]


class Placeholder(Protocol):
    """Structural type of ``vllm.multimodal.inputs.PlaceholderRange``."""

    offset: int
    length: int
    is_embed: Any | None


class Feature(Protocol):
    """Structural type of ``vllm.multimodal.inputs.MultiModalFeatureSpec``."""

    modality: str

    @property
    def mm_position(self) -> Placeholder: ...


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the modalities of a prompt are: everything that is known before any attention.

    Attributes:
        modalities: int8 ``[l]`` of ``TEXT``, ``VIDEO`` or ``AUDIO``.
    """

    modalities: Modalities

    @cached_property
    def length(self) -> int:
        """Number of tokens (l of the papers)."""
        return len(self.modalities)

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        """Text, video and audio tokens, indexed by the modality codes."""
        text, video, audio = np.bincount(self.modalities, minlength=3)[:3].tolist()
        return text, video, audio

    @property
    def text(self) -> int:
        return self.counts[TEXT]

    @property
    def av(self) -> int:
        """Audio-video tokens (N)."""
        return self.counts[VIDEO] + self.counts[AUDIO]

    @property
    def present(self) -> tuple[int, ...]:
        """Codes of the modalities that have tokens, video first."""
        return tuple(code for code in (VIDEO, AUDIO) if self.counts[code])

    @cached_property
    def text_start(self) -> int:
        """First token after the last audio-video token (t0 of AccKV); ``length`` without text
        there, 0 without any audio or video."""
        av = np.flatnonzero(self.modalities)
        return int(av[-1]) + 1 if len(av) else 0

    @property
    def trailing_text(self) -> int:
        """Tokens after the last audio-video token (n_t)."""
        return self.length - self.text_start

    def text_before(self, position: int) -> int:
        """Text tokens in front of ``position``."""
        return position - int(np.count_nonzero(self.modalities[:position]))


# (modalities [P], prompt token ids [P], Hugging Face config) -> modalities [P]
SpanHook = Callable[[Modalities, Sequence[int], Any], Modalities]


def audio_pads_inside_video(modalities: Modalities, token_ids: Sequence[int], config: Any) -> Any:
    """Span hook for MiMo-V2, which reports a clip with sound as one ``video`` feature.

    Its audio positions are those that carry the audio placeholder token.
    """
    audio = config.processor_config["audio_token_id"]
    relabelled = modalities.copy()
    relabelled[(modalities == VIDEO) & (np.asarray(token_ids) == audio)] = AUDIO
    return relabelled


# Exceptions by Hugging Face ``model_type``; a model whose features already say it all needs none.
SPAN_HOOKS: dict[str, SpanHook] = {"mimo_v2": audio_pads_inside_video}


def token_modalities(
    features: Iterable[Feature],
    num_tokens: int,
    *,
    image_as: str = "video",
    hook: Callable[[Modalities], Modalities] | None = None,
) -> Modalities:
    """Modality of every prompt token.

    Args:
        features: the request's multimodal features; positions are absolute in the prompt.
        num_tokens: prompt length P.
        image_as: ``"video"`` or ``"text"``.
        hook: the model's exception, already bound to the request's token ids and the config.

    Returns:
        int8 array ``[P]`` of ``TEXT``, ``VIDEO`` or ``AUDIO``. Positions inside a placeholder
        that receive no embedding (begin/end markers, timestamps) are text.
    """
    codes = {"video": VIDEO, "audio": AUDIO, "image": VIDEO if image_as == "video" else TEXT}
    modalities = np.zeros(num_tokens, dtype=np.int8)
    for feature in features:
        code = codes.get(feature.modality, TEXT)
        if code == TEXT:
            continue
        where = feature.mm_position
        span = modalities[where.offset : where.offset + where.length]
        if where.is_embed is None:
            span[:] = code
        else:
            span[np.asarray(where.is_embed, dtype=bool)[: len(span)]] = code
    return modalities if hook is None else hook(modalities)
