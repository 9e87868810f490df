# SPDX-License-Identifier: Apache-2.0
"""The sound of a clip, as the models' authors get it: ``ffmpeg -ac 1 -ar RATE -acodec pcm_s16le``.

vLLM's own reader is for recordings: it leaves integer samples unscaled, adds stereo channels up
to more than full scale, and gives up at the first damaged packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt


def clip_sound(
    file: bytes | Path, rate: int, max_seconds: float | None = None
) -> npt.NDArray[np.float32] | None:
    """Mono float32 ``[samples]`` in [-1, 1], or ``None`` without a track that holds sound.

    What is damaged is left out.

    Args:
        rate: Hz.

    Raises:
        ValueError: if it is longer than ``max_seconds``.
    """
    parts, samples = [], 0
    for part in _resampled(file, rate):
        parts.append(part)
        samples += part.shape[1]
        if max_seconds is not None and samples > max_seconds * rate:
            raise ValueError(f"The clip's sound is longer than {max_seconds:.0f} s.")
    if not samples:
        return None
    return np.concatenate(parts, axis=1)[0].astype(np.float32) / 2**15


def _resampled(file: bytes | Path, rate: int) -> Iterator[npt.NDArray[np.int16]]:
    """Pieces ``[1, samples]``; mixing down to 16 bits keeps within full scale."""
    resampler = av.AudioResampler("s16", "mono", rate)
    for frame in _frames(file):
        yield from (part.to_ndarray() for part in resampler.resample(frame))
    yield from (part.to_ndarray() for part in resampler.resample(None))


def _frames(file: bytes | Path) -> Iterator[Any]:
    opened = BytesIO(file) if isinstance(file, bytes) else str(file)
    try:
        with av.open(opened, metadata_errors="ignore") as container:
            if not container.streams.audio:
                return
            for packet in container.demux(container.streams.audio[0]):
                try:
                    yield from packet.decode()
                except av.InvalidDataError:
                    continue
    except av.FFmpegError:  # the file ends early, or only vLLM's reader of pictures knows it
        return
