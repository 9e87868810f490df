# SPDX-License-Identifier: Apache-2.0
"""Synthetic clips with sound, and recordings, that differ with their seed."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

SAMPLE_RATE = 16_000
"""Hz. What the audio encoders expect, so that no resampler is needed."""

_NUM_SHAPES = 3


def make_clip(
    path: Path,
    *,
    seconds: int = 4,
    size: tuple[int, int] = (112, 84),
    fps: int = 8,
    sound: bool = True,
    seed: int = 0,
) -> Path:
    """Write an mp4 with H.264 video of `size` (width, height; both even) and mono AAC sound.

    Rectangles of changing colours cross a background that changes every second. With the default
    size every pair of sampled frames is 4 x 3 vision tokens and needs no resizing.
    """
    samples = make_tones(seconds, seed) if sound else None
    return write_clip(path, _frames(seconds, size, fps, seed), fps, samples)


def write_clip(path: Path, frames: np.ndarray, fps: int, samples: np.ndarray | None = None) -> Path:
    """Write an mp4 with H.264 video and, if there are samples, mono AAC sound.

    Args:
        frames: RGB uint8 [number, height, width, 3], height and width even.
        samples: float32 [number] in [-1, 1] at SAMPLE_RATE.
    """
    path = Path(path)
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        # The slower presets were seen to encode the same pictures differently now and then, even
        # with one thread (x264's macroblock tree, frames this small); this one leaves that out.
        video.options = {"preset": "ultrafast", "crf": "12", "threads": "1"}
        audio = None
        if samples is not None:
            audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None and samples is not None:
            _encode_sound(container, audio, samples)
    return path


def make_wav(path: Path, *, seconds: int = 3, seed: int = 0) -> Path:
    """Write the tones of `make_tones` as a mono wav of 16-bit samples at 16 kHz."""
    path = Path(path)
    soundfile.write(path, make_tones(seconds, seed), SAMPLE_RATE, subtype="PCM_16", format="WAV")
    return path


def make_tones(seconds: int, seed: int) -> np.ndarray:
    """Samples [seconds * SAMPLE_RATE], float32 in [-1, 1]: each second a new chord.

    Loudness pulses a few times per second and a little noise lies below, so that neighbouring
    audio tokens differ too.
    """
    rng = np.random.default_rng([seed, 1])
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    chords = []
    for _ in range(seconds):
        pitches = np.exp(rng.uniform(np.log(110), np.log(6000), size=3))
        chord = np.sin(2 * np.pi * pitches[:, None] * time + rng.uniform(0, 6, (3, 1))).mean(0)
        pulse = 0.55 + 0.45 * np.sin(2 * np.pi * rng.uniform(2, 9) * time)
        chords.append(0.8 * chord * pulse + 0.01 * rng.standard_normal(SAMPLE_RATE))
    return np.clip(np.concatenate(chords), -1, 1).astype(np.float32)


def _frames(seconds: int, size: tuple[int, int], fps: int, seed: int) -> np.ndarray:
    """RGB pictures [seconds * fps, height, width, 3], uint8."""
    rng = np.random.default_rng([seed, 0])
    width, height = size
    frames = np.empty((seconds * fps, height, width, 3), dtype=np.uint8)
    frames[:] = np.repeat(rng.integers(0, 256, (seconds, 1, 1, 3)), fps, axis=0)
    for _ in range(_NUM_SHAPES):
        colours = np.repeat(rng.integers(0, 256, (seconds, 3)), fps, axis=0)
        box = (rng.uniform(0.2, 0.5, 2) * (height, width)).astype(int)
        start = rng.uniform(0, 1, 2)
        velocity = rng.uniform(-0.6, 0.6, 2)  # frame sizes per second
        for index, frame in enumerate(frames):
            place = (start + velocity * index / fps) % 1
            top, left = (place * (height - box[0], width - box[1])).astype(int)
            frame[top : top + box[0], left : left + box[1]] = colours[index]
    return frames


def _encode_sound(
    container: av.container.OutputContainer, stream: av.AudioStream, samples: np.ndarray
) -> None:
    """Encode `samples` (float32 [n], mono) into `stream`, one AAC frame of 1024 at a time."""
    frame_length = 1024
    for start in range(0, len(samples), frame_length):
        frame = av.AudioFrame.from_ndarray(
            samples[None, start : start + frame_length], format="fltp", layout="mono"
        )
        frame.sample_rate = SAMPLE_RATE
        frame.pts = start
        frame.time_base = Fraction(1, SAMPLE_RATE)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
