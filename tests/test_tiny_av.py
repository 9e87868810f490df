# SPDX-License-Identifier: Apache-2.0
"""The world of the tiny trained model: clips, and questions with one right answer."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from vllm_acckv.evaluation import tiny_av

CLIPS = [tiny_av.make_clip(np.random.default_rng(seed)) for seed in range(20)]


def asked(task: str, clip: tiny_av.Clip) -> list[tiny_av.Question]:
    rng = np.random.default_rng(1)
    try:
        return [tiny_av.ask(clip, rng, task) for _ in range(10)]
    except ValueError:
        return []


NUMBER = "|".join(tiny_av.NUMBERS[1:])


@pytest.mark.parametrize("clip", CLIPS[:5])
def test_answers_are_right(clip: tiny_av.Clip) -> None:
    """Read back from the words alone."""
    for task, word in (("colours", "colour"), ("shapes", "shape"), ("sounds", "sound")):
        (question, *_) = asked(task, clip)
        listed = re.findall(rf"({NUMBER}) (\w+)", question.answer)
        assert [name for _, name in listed] == [getattr(one, word) for one in clip]
        assert [number for number, _ in listed] == list(tiny_av.NUMBERS[1 : len(clip) + 1])
    for question in asked("second", clip):
        one = clip[tiny_av.NUMBERS.index(question.text.split()[-1]) - 1]
        assert question.answer.split()[3:] == [one.colour, one.shape, "and", "a", one.sound]
    for question in asked("see", clip):
        sound = question.text.split()[-1]
        (one,) = [one for one in clip if one.sound == sound]
        number = tiny_av.NUMBERS[clip.index(one) + 1]
        assert question.answer == f"the {sound} {number} is a {one.colour} {one.shape}"
    for question in asked("hear", clip):
        *_, colour, shape = question.text.split()
        (one,) = [one for one in clip if (one.colour, one.shape) == (colour, shape)]
        number = tiny_av.NUMBERS[clip.index(one) + 1]
        assert question.answer == f"the {colour} {shape} {number} is a {one.sound}"
    for question in asked("count", clip):
        colour = question.text.split()[3]
        listed = re.findall(rf"({NUMBER}) (red|green|blue|yellow|white|pink|no)", question.answer)
        seen = [colour if one.colour == colour else "no" for one in clip]
        assert listed == [(tiny_av.NUMBERS[place], word) for place, word in enumerate(seen, 1)]
        assert question.answer.endswith(f" so {tiny_av.NUMBERS[seen.count(colour)]} times")


def test_the_first_word_says_nothing() -> None:
    """It is computed before compression."""
    first = {
        (question.task, question.answer.split()[0])
        for clip in CLIPS
        for task in tiny_av.TASKS
        for question in asked(task, clip)
    }
    assert len(first) == len(tiny_av.TASKS)


def test_clips_are_reproducible_and_differ() -> None:
    again = tiny_av.make_clip(np.random.default_rng(0))
    assert again == CLIPS[0] and len(set(CLIPS)) == len(CLIPS)
    assert np.array_equal(tiny_av.frames(again), tiny_av.frames(CLIPS[0]))
    assert np.array_equal(tiny_av.sound(again), tiny_av.sound(CLIPS[0]))
    longer = tiny_av.make_clip(np.random.default_rng(0), seconds=12)
    assert len(longer) == 12 and len({one.sound for one in longer[:10]}) == 10


def test_files_hold_the_clip(tmp_path: Path) -> None:
    """Video survives compression nearly, sound exactly as far as 16 bits go."""
    tiny_av.write(CLIPS[0], tmp_path / "clip.mp4", tmp_path / "clip.wav")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pictures = tiny_av.frames(CLIPS[0])
    assert np.shape(decoded) == pictures.shape
    assert np.abs(np.array(decoded, float) - pictures).mean() < 12
    samples, rate = soundfile.read(tmp_path / "clip.wav")
    assert rate == tiny_av.SAMPLE_RATE
    assert np.abs(samples - tiny_av.sound(CLIPS[0])).max() < 1e-4


def test_a_task_the_clip_does_not_allow() -> None:
    same = tuple(CLIPS[0][:1] * 2)
    with pytest.raises(ValueError, match="no question of task hear"):
        tiny_av.ask(same, np.random.default_rng(0), "hear")


def test_data_set(tmp_path: Path) -> None:
    """Files are made once, and more questions begin with the same ones."""
    few, many = (tiny_av.load(tmp_path, number).samples for number in (9, 16))
    assert many[:9] == few and len({sample.id for sample in many}) == 16
    assert all(sample.video and sample.video.exists() for sample in many)
    assert {sample.task for sample in many} == {f"tiny-av/{task}" for task in tiny_av.TASKS}
    other = tiny_av.load(tmp_path, 9, seed=1).samples
    assert not {sample.answers for sample in few} & {sample.answers for sample in other}
