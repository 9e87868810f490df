# SPDX-License-Identifier: Apache-2.0
"""A world small enough to be learnt in minutes: clips of moving coloured shapes and of sounds, and
questions whose answers need both.

In each second of a clip one shape moves and one sound is heard. The first word of an answer is the
same for every clip, because compression after prefill cannot change it; what matters comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from vllm_acckv.evaluation.samples import Dataset, Sample
from vllm_acckv.tools.clips import SAMPLE_RATE, write_clip

SECONDS = 8
_HELD_OUT = 0x7E57
"""In the seed of clips for tests; see evaluation/tiny/data.py for those of training."""
SIZE = 84
"""Height and width of a frame: 3 x 3 tokens each second."""
FPS = 2

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 190, 50),
    "blue": (40, 60, 230),
    "yellow": (240, 220, 40),
    "white": (245, 245, 245),
    "pink": (240, 90, 200),
}
SHAPES = ("circle", "frame", "cross", "bar")
NUMBERS = (
    *("no", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
"""Words, because tokenizers part a digit from the space in front of it: what is looked up for a
number would have to be looked up for the space."""
SOUNDS = ("horn", "bell", "drum", "bird", "siren", "rain", "buzz", "beep", "hum", "flute")


@dataclass(frozen=True)
class Second:
    """What is seen and heard in one second.

    Attributes:
        start, end: centre of the shape ``(row, column)`` at the beginning and at the end, as parts
            of the frame.
        variant: seed of the small things: pitch, loudness, shade.
    """

    colour: str
    shape: str
    sound: str
    start: tuple[float, float]
    end: tuple[float, float]
    variant: int


Clip = tuple[Second, ...]


@dataclass(frozen=True)
class Question:
    """A question about a clip and its one right answer.

    Attributes:
        needs: modalities without which it can only be guessed.
    """

    task: str
    text: str
    answer: str
    needs: frozenset[str]


def make_clip(rng: np.random.Generator, seconds: int = SECONDS) -> Clip:
    """Colours and shapes come again, a sound does not while there are others."""
    rounds = -(-seconds // len(SOUNDS))
    sounds = [str(one) for _ in range(rounds) for one in rng.permutation(SOUNDS)][:seconds]
    return tuple(
        Second(
            str(rng.choice(list(COLOURS))),
            str(rng.choice(SHAPES)),
            sound,
            _place(rng),
            _place(rng),
            int(rng.integers(1 << 30)),
        )
        for sound in sounds
    )


def _place(rng: np.random.Generator) -> tuple[float, float]:
    row, column = rng.uniform(0.3, 0.7, 2)
    return float(row), float(column)


# Pictures


def frames(clip: Clip) -> np.ndarray:
    """RGB pictures uint8 ``[seconds * FPS, SIZE, SIZE, 3]``."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    pictures = np.empty((len(clip) * FPS, SIZE, SIZE, 3), np.uint8)
    for number, second in enumerate(clip):
        rng = np.random.default_rng([second.variant, 0])
        colour = np.clip(np.array(COLOURS[second.colour]) + rng.normal(0, 8, 3), 0, 255)
        background, radius = rng.uniform(0, 60), rng.uniform(0.24, 0.28)
        for step in range(FPS):
            part = step / max(1, FPS - 1)
            row, column = (
                first + part * (last - first)
                for first, last in zip(second.start, second.end, strict=True)
            )
            inside = _inside(second.shape, (rows - row) / radius, (columns - column) / radius)
            picture = np.where(inside[..., None], colour, background)
            noise = rng.normal(0, 3, picture.shape)
            pictures[number * FPS + step] = np.clip(picture + noise, 0, 255)
    return pictures


def _inside(shape: str, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Where a shape of radius 1 around the origin is."""
    across, along = np.abs(row), np.abs(column)
    if shape == "circle":
        return row**2 + column**2 < 1
    if shape == "frame":
        return (np.maximum(across, along) < 1) & (np.maximum(across, along) > 0.6)
    if shape == "cross":
        return ((across < 0.25) & (along < 1.1)) | ((along < 0.25) & (across < 1.1))
    return (across < 0.35) & (along < 1.2)  # a bar


# Sound


def sound(clip: Clip) -> np.ndarray:
    """Samples float32 ``[seconds * SAMPLE_RATE]`` in [-1, 1]."""
    return np.concatenate([_second_of_sound(second) for second in clip]).astype(np.float32)


def _second_of_sound(second: Second) -> np.ndarray:
    rng = np.random.default_rng([second.variant, 1])
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    pitch = float(rng.uniform(0.94, 1.06))
    wave = _WAVES[second.sound](time, pitch, rng)
    noise = rng.normal(0, 0.003, SAMPLE_RATE)
    return np.clip(rng.uniform(0.4, 0.7) * wave / np.abs(wave).max() + noise, -1, 1)


def _tone(time: np.ndarray, *pitches: float) -> np.ndarray:
    return sum((np.sin(2 * np.pi * pitch * time) for pitch in pitches), np.zeros_like(time))


def _pulses(time: np.ndarray, rate: float, fall: float) -> np.ndarray:
    return np.exp(-fall * ((time * rate) % 1))


_Wave = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
_WAVES: dict[str, _Wave] = {
    "horn": lambda t, p, rng: np.sum([_tone(t, 220 * p * n) / n for n in range(1, 8)], 0),
    "bell": lambda t, p, rng: _tone(t, 880 * p, 1214 * p, 2094 * p) * _pulses(t, 2, 6),
    "drum": lambda t, p, rng: (
        _tone(t, 80 * p) * _pulses(t, 4, 9) + 0.1 * rng.normal(size=t.shape) * _pulses(t, 4, 20)
    ),
    "bird": lambda t, p, rng: np.sin(2 * np.pi * 3200 * p * t + 12 * np.sin(2 * np.pi * 9 * t)),
    "siren": lambda t, p, rng: np.sin(2 * np.pi * 700 * p * t + 90 * np.sin(2 * np.pi * t)),
    "rain": lambda t, p, rng: rng.normal(size=t.shape),
    "buzz": lambda t, p, rng: np.sign(_tone(t, 110 * p)),
    "beep": lambda t, p, rng: _tone(t, 1000 * p) * ((t * 5) % 1 < 0.5),
    "hum": lambda t, p, rng: _tone(t, 150 * p),
    "flute": lambda t, p, rng: _tone(t, 587 * p) * (1 + 0.3 * np.sin(2 * np.pi * 6 * t)),
}


# Questions

VIDEO, AUDIO = frozenset({"video"}), frozenset({"audio"})


def _listed(words: Sequence[str]) -> str:
    return "it is " + " ".join(f"{NUMBERS[place]} {word}" for place, word in enumerate(words, 1))


def _colours(clip: Clip, rng: np.random.Generator) -> Question:
    answer = _listed([second.colour for second in clip])
    return Question("colours", "list the colours", answer, VIDEO)


def _shapes(clip: Clip, rng: np.random.Generator) -> Question:
    return Question("shapes", "list the shapes", _listed([one.shape for one in clip]), VIDEO)


def _sounds(clip: Clip, rng: np.random.Generator) -> Question:
    return Question("sounds", "list the sounds", _listed([one.sound for one in clip]), AUDIO)


def _second(clip: Clip, rng: np.random.Generator) -> Question:
    number = int(rng.integers(len(clip)))
    one = clip[number]
    answer = f"it is a {one.colour} {one.shape} and a {one.sound}"
    return Question(
        "second", f"what happens at second {NUMBERS[number + 1]}", answer, VIDEO | AUDIO
    )


def _see(clip: Clip, rng: np.random.Generator) -> Question:
    number = int(rng.integers(len(clip)))
    one = clip[number]
    answer = f"the {one.sound} {NUMBERS[number + 1]} is a {one.colour} {one.shape}"
    return Question("see", f"what do you see with the {one.sound}", answer, VIDEO | AUDIO)


def _hear(clip: Clip, rng: np.random.Generator) -> Question | None:
    looks = [(one.colour, one.shape) for one in clip]
    alone = [number for number, look in enumerate(looks) if looks.count(look) == 1]
    if not alone:
        return None
    number = int(rng.choice(alone))
    one = clip[number]
    answer = f"the {one.colour} {one.shape} {NUMBERS[number + 1]} is a {one.sound}"
    text = f"what do you hear with the {one.colour} {one.shape}"
    return Question("hear", text, answer, VIDEO | AUDIO)


def _count(clip: Clip, rng: np.random.Generator) -> Question:
    colour = str(rng.choice(sorted({one.colour for one in clip})))
    seen = [colour if one.colour == colour else "no" for one in clip]
    answer = f"{_listed(seen)} so {NUMBERS[seen.count(colour)]} times"
    return Question("count", f"how often is {colour} seen", answer, VIDEO)


TASKS: dict[str, Callable[[Clip, np.random.Generator], Question | None]] = {
    "colours": _colours,
    "shapes": _shapes,
    "sounds": _sounds,
    "second": _second,
    "see": _see,
    "hear": _hear,
    "count": _count,
}


def ask(clip: Clip, rng: np.random.Generator, task: str | None = None) -> Question:
    """A question of a task, or of any."""
    while True:
        chosen = task or str(rng.choice(list(TASKS)))
        question = TASKS[chosen](clip, rng)
        if question is not None:
            return question
        if task is not None:
            raise ValueError(f"The clip allows no question of task {task}.")


def corpus() -> str:
    """Every word that questions and answers are made of, for a tokenizer."""
    rng = np.random.default_rng(0)
    lines = ["system", "user", "assistant", "You are a helpful assistant."] * 100
    for _ in range(300):
        clip = make_clip(rng)
        for _ in TASKS:
            question = ask(clip, rng)
            lines += [question.text, question.answer]
    return "\n".join(lines)


def load(folder: Path, questions: int, seed: int = 0) -> Dataset:
    """Questions about clips that no training has seen, one of each task per clip, and their files.

    Args:
        questions: how many; the first ones of a larger number are the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, samples, number = np.random.default_rng([_HELD_OUT, seed]), list[Sample](), 0
    while len(samples) < questions:
        clip = make_clip(rng)
        video, audio = folder / f"{seed}-{number}.mp4", folder / f"{seed}-{number}.wav"
        if not (video.exists() and audio.exists()):
            write(clip, video, audio)
        for task, make in TASKS.items():
            question = make(clip, rng)
            if question is not None:
                name = f"tiny-av/{task}"
                samples.append(
                    Sample(
                        id=f"{name}/{seed}-{number}",
                        task=name,
                        video=video,
                        audio=audio,
                        start=None,
                        end=None,
                        question=question.text,
                        answers=(question.answer,),
                    )
                )
        number += 1
    return Dataset(tuple(samples[:questions]), 0)


def write(clip: Clip, video: Path, audio: Path) -> None:
    """The clip as files: an mp4 without sound, and a wav of 16-bit samples."""
    write_clip(video, frames(clip), FPS)
    soundfile.write(audio, sound(clip), SAMPLE_RATE, subtype="PCM_16", format="WAV")
