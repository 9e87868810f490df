# SPDX-License-Identifier: Apache-2.0
"""Pictures and sound of files: is a part cut out with the frames and the samples it has?"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import soundfile

from vllm_acckv.evaluation import media
from vllm_acckv.evaluation.samples import DatasetError, Sample
from vllm_acckv.tools import clips

FPS, SECONDS = 8, 6
RATE = clips.SAMPLE_RATE
AAC_FRAME = 1024
"""Decoded sound is filled up to whole frames of AAC; that of a part that ends with it, twice."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=SECONDS, fps=FPS)


@pytest.fixture(scope="module")
def source(clip: Path) -> np.ndarray:
    """Pictures as PyAV decodes them, int ``[n, height, width, 3]``."""
    with av.open(str(clip)) as container:
        return np.stack([one.to_ndarray(format="rgb24") for one in container.decode(video=0)])


def about(video: Path, start: float | None = None, end: float | None = None) -> Sample:
    return Sample("id", "task", video, None, start, end, "what", ("that",))


def numbers(pictures: np.ndarray, source: np.ndarray) -> list[int]:
    """Which pictures of the source these are, although they were encoded again."""
    found = []
    for picture in pictures.astype(int):
        differences = np.abs(source.astype(int) - picture).mean((1, 2, 3))
        found.append(int(differences.argmin()))
        assert differences.min() < 0.5 * np.partition(differences, 1)[1]
    return found


def assert_sound_of(clip: Path, heard: np.ndarray, start: float, seconds: float) -> None:
    """``heard`` are these seconds of the clip, not one sample earlier or later."""
    assert 0 <= len(heard) - round(seconds * RATE) <= AAC_FRAME
    whole, first, edge = media.sound(clip, RATE), round(start * RATE), 50
    inside = heard[edge : round(seconds * RATE) - edge]

    def likeness(shift: int) -> float:
        other = whole[first + edge + shift :][: len(inside)]
        return float(np.corrcoef(inside, other)[0, 1])

    assert likeness(0) > 0.97
    assert likeness(0) > max(likeness(-1), likeness(1))


def test_frames_and_sound(clip: Path, source: np.ndarray) -> None:
    pictures, fps = media.frames(clip)
    assert fps == FPS and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, source)
    wave = media.sound(clip, RATE)
    made = clips.make_tones(SECONDS, 0)
    assert wave.dtype == np.float32 and 0 <= len(wave) - len(made) <= AAC_FRAME
    assert np.corrcoef(wave[: len(made)], made)[0, 1] > 0.99
    assert len(media.sound(clip, 8000)) == pytest.approx(len(wave) / 2, abs=2)


def test_sound_of_a_stereo_recording(tmp_path: Path) -> None:
    made = clips.make_tones(2, 1)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([made, made], 1), RATE, subtype="PCM_16")
    assert np.abs(media.sound(path, RATE) - made).max() < 1e-3


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (2.5, 4.0, range(20, 32)),  # both on a frame
        (1.3, 2.05, range(11, 17)),
        (0.0, 3.0, range(24)),
        (3.0, 100.0, range(24, 48)),  # the end lies behind the video's
        (4.0, None, range(32, 48)),
        (2.01, 2.02, [16]),  # no frame begins there: the one on show
        (5.9, 9.0, [47]),
    ],
)
def test_cut(
    clip: Path,
    source: np.ndarray,
    tmp_path: Path,
    start: float,
    end: float | None,
    expected: range | list[int],
) -> None:
    sample = about(clip, start, end)
    part = media.cut(sample, tmp_path)
    assert part.video is not None and part.video.parent == tmp_path
    assert part == replace(sample, video=part.video, start=None, end=None)
    pictures, fps = media.frames(part.video)
    assert fps == FPS
    assert numbers(pictures, source) == list(expected)
    with av.open(str(part.video)) as container:
        times = [one.time for one in container.decode(video=0)]
    assert times == pytest.approx([n / FPS for n in range(len(times))], abs=1e-3)
    begin = max(start, expected[0] / FPS)
    seconds = min(SECONDS if end is None else end, SECONDS) - begin
    heard = media.sound(part.video, RATE)
    assert 0 <= len(heard) - round(seconds * RATE) < 2 * AAC_FRAME
    if seconds > 0.5 and (end is None or end <= SECONDS):
        assert_sound_of(clip, heard, begin, seconds)


def test_cut_once(clip: Path, tmp_path: Path) -> None:
    first = media.cut(about(clip, 1.0, 2.0), tmp_path).video
    assert first is not None
    written = first.stat().st_mtime_ns
    assert media.cut(about(clip, 1.0, 2.0), tmp_path).video == first
    assert first.stat().st_mtime_ns == written
    assert media.cut(about(clip, 1.0, 2.5), tmp_path).video != first
    assert len(list(tmp_path.iterdir())) == 2  # and nothing half done


def test_nothing_to_cut(clip: Path, tmp_path: Path) -> None:
    for sample in (about(clip), replace(about(clip), video=None, audio=clip)):
        assert media.cut(sample, tmp_path) == sample
    assert not list(tmp_path.iterdir())


def test_silent_video(tmp_path: Path) -> None:
    silent = clips.make_clip(tmp_path / "silent.mp4", seconds=2, sound=False)
    assert media.sound(silent, RATE).shape == (0,)
    part = media.cut(about(silent, 0.5, 1.5), tmp_path / "cut")
    assert part.video is not None and media.sound(part.video, RATE).shape == (0,)
    assert media.own_sound(part, tmp_path / "cut") == part


@pytest.mark.parametrize("start", [float(SECONDS), 7.5])
def test_start_behind_the_end(clip: Path, tmp_path: Path, start: float) -> None:
    with pytest.raises(DatasetError) as raised:
        media.cut(about(clip, start, 9.0), tmp_path)
    assert str(raised.value) == f"{clip} ends before {start:g} s, where a question begins."
    assert not list(tmp_path.iterdir())


def test_folder_of_frames(source: np.ndarray, tmp_path: Path) -> None:
    """MVBench's TVQA has such, 3 a second. A bracket in a name is no pattern."""
    folder = tmp_path / "frames [1]"
    folder.mkdir()
    for number, picture in enumerate(source[:12], 1):
        options = [cv2.IMWRITE_JPEG_QUALITY, 100]
        cv2.imwrite(str(folder / f"{number:05}.jpg"), picture[..., ::-1], options)
    pictures, fps = media.frames(folder)
    assert fps == 3 and numbers(pictures, source) == list(range(12))
    whole = media.cut(about(folder), tmp_path / "cut").video
    assert whole is not None and whole.is_file()
    pictures, fps = media.frames(whole)
    assert fps == 3 and numbers(pictures, source) == list(range(12))
    part = media.cut(about(folder, 1.0, 2.0), tmp_path / "cut").video
    assert part is not None and numbers(media.frames(part)[0], source) == [3, 4, 5]


def test_video_on_its_side(clip: Path, tmp_path: Path) -> None:
    """Shown as OpenCV, which vLLM reads videos with, does; a part is stored upright."""
    content, one = clip.read_bytes(), 1 << 16
    before = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    after = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    place = content.index(before, content.index(b"tkhd"))
    path = tmp_path / "turned.mp4"
    path.write_bytes(content[:place] + after + content[place + len(after) :])
    pictures, _ = media.frames(path)
    capture = cv2.VideoCapture(str(path))
    np.testing.assert_array_equal(pictures[0], capture.read()[1][..., ::-1])
    assert pictures.shape[1:3] == (112, 84)
    part = media.cut(about(path, 1.0, 2.0), tmp_path / "cut").video
    assert part is not None and numbers(media.frames(part)[0], pictures) == list(range(8, 16))


def test_own_sound(clip: Path, tmp_path: Path) -> None:
    sample = media.own_sound(about(clip), tmp_path)
    assert sample.audio is not None and sample.audio.suffix == ".wav"
    samples, rate = soundfile.read(sample.audio)
    assert rate == RATE
    np.testing.assert_allclose(samples, media.sound(clip, RATE), atol=1e-4)
    assert media.own_sound(sample, tmp_path) == sample
    assert media.own_sound(about(clip), tmp_path) == sample


@pytest.mark.parametrize("what", ["missing", "nonsense", "half", "wav", "empty folder"])
def test_unreadable(clip: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "video.mp4"
    if what == "nonsense":
        path.write_bytes(b"these bytes are no movie" * 99)
    elif what == "half":
        path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    elif what == "wav":
        clips.make_wav(path, seconds=1)
    elif what == "empty folder":
        path.mkdir()
    for read in (media.frames, lambda path: media.cut(about(path, 1.0, 2.0), tmp_path / "cut")):
        with pytest.raises(DatasetError, match=str(path)):
            read(path)  # type: ignore[operator]
