# SPDX-License-Identifier: Apache-2.0
"""The sound of clips' files: scaled, mixed down and mended as by ``ffmpeg -ac 1``."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.conftest import Media
from tests.own_models import path_of
from vllm_acckv.models.sound import clip_sound

SECONDS, AMPLITUDE = 2, 0.5


def write(path: Path, codec: str, rate: int, layout: str, seconds: int = SECONDS) -> Path:
    """A tone of half scale, the same in every channel."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        container.metadata["title"] = "XXXXXXXX"
        if seconds:
            time = np.arange(seconds * rate) / rate
            tone = (AMPLITUDE * np.sin(2 * np.pi * 220 * time)).astype(np.float32)
            channels = np.tile(tone, (stream.layout.nb_channels, 1))
            frame = av.AudioFrame.from_ndarray(channels, "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            size = stream.codec_context.frame_size or 1024
            cut = av.AudioResampler(stream.format.name, layout, rate, frame_size=size)
            for part in [*cut.resample(frame), *cut.resample(None)]:
                container.mux(stream.encode(part))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize(
    ("codec", "ending"), [("pcm_s16le", "mkv"), ("flac", "mkv"), ("aac", "mp4")]
)
def test_every_kind_keeps_its_scale(
    tmp_path: Path, codec: str, ending: str, rate: int, layout: str
) -> None:
    sound = clip_sound(write(tmp_path / f"clip.{ending}", codec, rate, layout), 16_000)
    assert sound is not None and sound.dtype == np.float32
    assert abs(len(sound) - SECONDS * 16_000) < 2048  # AAC fills its last frame
    middle = sound[4000:28_000]
    # Equal channels add up to one of them; a low frequency channel is left out.
    assert np.sqrt(2) * middle.std() == pytest.approx(AMPLITUDE, rel=0.03)


def test_integer_samples_stay_what_they_are(tmp_path: Path) -> None:
    sound = clip_sound(write(tmp_path / "clip.mkv", "pcm_s16le", 16_000, "mono"), 16_000)
    time = np.arange(SECONDS * 16_000) / 16_000
    assert sound is not None
    assert np.abs(sound - AMPLITUDE * np.sin(2 * np.pi * 220 * time)).max() < 2 / 2**15


def test_what_is_damaged_is_left_out(media: Media) -> None:
    file = path_of(media.video(seconds=8)).read_bytes()
    whole = clip_sound(file, 16_000)
    begin, end = len(file) // 3, len(file) // 3 + 2000
    damaged = file[:begin] + bytes(end - begin) + file[end:]
    found = clip_sound(damaged, 16_000)
    assert whole is not None and found is not None
    assert 0 < len(found) <= len(whole)
    assert clip_sound(file[: len(file) // 2], 16_000) is None  # its index is gone
    assert clip_sound(b"no clip at all", 16_000) is None


def test_text_in_other_encodings_does_not_matter(tmp_path: Path) -> None:
    file = write(tmp_path / "clip.mkv", "pcm_s16le", 16_000, "mono").read_bytes()
    assert b"XXXXXXXX" in file
    sound = clip_sound(file.replace(b"XXXXXXXX", "Ça été!X".encode("latin-1")), 16_000)
    assert sound is not None and len(sound) == SECONDS * 16_000


def test_no_sound(tmp_path: Path, media: Media) -> None:
    assert clip_sound(path_of(media.video(sound=False)), 16_000) is None
    assert clip_sound(write(tmp_path / "clip.mkv", "pcm_s16le", 16_000, "mono", 0), 16_000) is None


def test_long_sound_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "clip.mkv", "pcm_s16le", 16_000, "mono")
    with pytest.raises(ValueError, match="longer than 1 s"):
        clip_sound(file, 16_000, max_seconds=1)
