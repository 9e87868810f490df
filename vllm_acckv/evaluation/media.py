# SPDX-License-Identifier: Apache-2.0
"""Pictures and sound of files, and the parts of videos that questions are about."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from vllm_acckv.evaluation.samples import DatasetError, Sample
from vllm_acckv.tools.clips import SAMPLE_RATE

FOLDER_FPS = 3
"""Pictures a second of a video that comes as a folder of them, as MVBench's authors count."""


def frames(path: Path) -> tuple[np.ndarray, float]:
    """Every picture of a video, RGB uint8 ``[n, height, width, 3]``, and how many make a second.

    Args:
        path: a file, or a folder of jpg files.

    Raises:
        DatasetError: for one without pictures that can be decoded.
    """
    with _opened(path) as container:
        stream = _pictures_of(container, path)
        pictures = [one.to_ndarray(format="rgb24") for one in _upright(container, stream, path)]
        return np.stack(pictures), float(_rate(stream))


def sound(path: Path, rate: int) -> np.ndarray:
    """The sound of a file, mono float32 ``[n]``, ``rate`` samples a second; empty if it has none.

    Raises:
        DatasetError: for a file that cannot be decoded.
    """
    return _sound(path, rate)[0]


def cut(sample: Sample, folder: Path) -> Sample:
    """The same question about a file that holds no more than the part of the video it is about.

    The pictures are those with ``start <= time < end``, or, if there is none, the one on show at
    ``start``. They are encoded again, with a small loss, because only from a key frame on a video
    can be copied. The sound begins with the first of them.

    Args:
        sample: its video may be a folder of jpg files; all of it is made an mp4, too.
        folder: where such files are written, and found the next time.

    Raises:
        DatasetError: if the video cannot be decoded, or ends before ``start``.
    """
    video = sample.video
    if video is None or (sample.start is None and sample.end is None and video.is_file()):
        return sample
    start, end = sample.start or 0.0, math.inf if sample.end is None else sample.end
    path = folder / _name(video, f"{start} {end}", "mp4")
    _once(path, lambda partial: _write_part(video, start, end, partial))
    return replace(sample, video=path, start=None, end=None)


def own_sound(sample: Sample, folder: Path) -> Sample:
    """The same question with the video's own sound, if it has any, as a file beside it.

    vLLM hears a video's own sound only if told to in each request, which servers may not allow.

    Args:
        sample: about all of its video.
        folder: as for :func:`cut`.

    Raises:
        DatasetError: if the sound cannot be decoded.
    """
    video = sample.video
    if video is None or sample.audio is not None or not _has_sound(video):
        return sample
    path = folder / _name(video, "sound", "wav")

    def write(partial: Path) -> None:
        samples = np.clip(sound(video, SAMPLE_RATE), -1, 1)
        soundfile.write(partial, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")

    _once(path, write)
    return replace(sample, audio=path)


def _name(video: Path, what: str, suffix: str) -> str:
    digest = hashlib.sha256(f"{video.resolve()} {what}".encode()).hexdigest()[:12]
    return f"{video.stem}-{digest}.{suffix}"


def _once(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file, unless it is there. Whoever finds one finds it complete: two
    evaluations may share the folder, and either may be stopped."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# Reading


def _opened(path: Path) -> Any:
    try:
        if path.is_dir():
            options = {"pattern_type": "glob", "framerate": str(FOLDER_FPS)}
            return av.open(f"{glob.escape(str(path))}/*.jpg", format="image2", options=options)
        return av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from None


def _has_sound(path: Path) -> bool:
    with _opened(path) as container:
        return bool(container.streams.audio)


def _pictures_of(container: Any, path: Path) -> Any:
    """The stream of pictures."""
    if not container.streams.video:
        raise DatasetError(f"{path} has no pictures.")
    return container.streams.video[0]


def _rate(stream: Any) -> Fraction:
    """Pictures a second."""
    return stream.average_rate or stream.guessed_rate


def _decoded(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """Frames in the order of their time; at least one."""
    frame = None
    try:
        for frame in container.decode(stream):
            yield frame
    except av.FFmpegError as error:
        raise DatasetError(f"{path} cannot be decoded: {error.strerror}.") from None
    if frame is None:
        raise DatasetError(f"{path} holds no {stream.type} that can be decoded.")


def _upright(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """Frames as a player shows them: telephones store pictures lying on their side."""
    for frame in _decoded(container, stream, path):
        if not frame.rotation:
            yield frame
            continue
        picture = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        turned = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        turned.pts, turned.time_base = frame.pts, frame.time_base
        turned.duration = frame.duration
        yield turned


def _sound(path: Path, rate: int) -> tuple[np.ndarray, float]:
    """As :func:`sound`, and the time in seconds of the first sample."""
    with _opened(path) as container:
        if not container.streams.audio:
            return np.zeros(0, np.float32), 0.0
        resampler, parts, begin = av.AudioResampler("fltp", rate=rate), list[Any](), None
        for frame in _decoded(container, container.streams.audio[0], path):
            begin = frame.time if begin is None else begin
            parts += resampler.resample(frame)
        parts += resampler.resample(None)
    # Not by the resampler, which makes two equal channels louder by 3 dB.
    mono = [part.to_ndarray().mean(0) for part in parts]
    return np.concatenate(mono), begin or 0.0


# Cutting


def _write_part(video: Path, start: float, end: float, path: Path) -> None:
    """Write an mp4 of what is seen and heard from ``start`` to ``end``, in seconds."""
    with _opened(video) as source, av.open(str(path), "w", format="mp4") as container:
        stream = _pictures_of(source, video)
        part = _part(_upright(source, stream, video), start, end)
        first = next(part, None)
        if first is None:
            raise DatasetError(f"{video} ends before {start:g} s, where a question begins.")
        samples = _between(*_sound(video, SAMPLE_RATE), max(start, first.time), end)
        shown = container.add_stream("libx264", rate=_rate(stream))
        shown.width, shown.height = first.width // 2 * 2, first.height // 2 * 2
        shown.pix_fmt, shown.codec_context.time_base = "yuv420p", stream.time_base
        # The preset: see tools/clips.py.
        shown.options = {"preset": "ultrafast", "crf": "16", "threads": "1"}
        # Every stream has to be there before the first frame is written.
        heard = len(samples) and container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        origin = first.pts
        for frame in itertools.chain([first], part):
            picture = frame.reformat(shown.width, shown.height, "yuv420p")
            picture.pts, picture.time_base = frame.pts - origin, frame.time_base
            picture.duration = frame.duration
            container.mux(shown.encode(picture))
        container.mux(shown.encode())
        if heard:
            wave = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            wave.sample_rate, wave.pts, wave.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(heard.encode(wave))
            container.mux(heard.encode())


def _part(pictures: Iterator[Any], start: float, end: float) -> Iterator[Any]:
    """Those from ``start`` to ``end``, or the one on show at ``start``; none if all end before."""
    before, found = None, False
    for picture in pictures:
        if picture.time < start:
            before = picture
        elif picture.time < end:
            found = True
            yield picture
        else:
            if not found:
                yield before or picture
            return
    if not found and before and start < before.time + before.duration * before.time_base:
        yield before


def _between(samples: np.ndarray, first: float, start: float, end: float) -> np.ndarray:
    """Samples at SAMPLE_RATE from ``start`` to ``end``; silence where they begin later, ``first``
    being the time of the first. All times in seconds."""
    begin = round((start - first) * SAMPLE_RATE)
    stop = None if math.isinf(end) else max(0, round((end - start) * SAMPLE_RATE))
    silence = np.zeros(max(0, -begin), np.float32)
    return np.concatenate([silence, samples[max(0, begin) :]])[:stop]
