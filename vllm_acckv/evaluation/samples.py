# SPDX-License-Identifier: Apache-2.0
"""Questions about clips, whatever file they were read from, and what can be wrong with the file."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DatasetError(ValueError):
    """A data set that is incomplete or not in its official format; the message names the place."""


@dataclass(frozen=True)
class Sample:
    """One question about one clip.

    Attributes:
        id: unique within a data set and the same each time it is read, to pair two policies.
        task: such as ``tiny-av/see``, ``mvbench/action_sequence``, ``avsd``.
        video: a file, or ``None`` if there is only sound.
        audio: a file, or ``None`` for the video's own sound, if it has any.
        start, end: seconds, the part of the video that is asked about, or ``None`` for all of it.
            The end may lie behind the video's.
        question: text of the user's turn, choices included.
        answers: right answers, at least one; references for ROUGE.
        choices: what a multiple-choice question offers, without letters.
    """

    id: str
    task: str
    video: Path | None
    audio: Path | None
    start: float | None
    end: float | None
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """What was read.

    Attributes:
        samples: in the order of the files.
        skipped: questions left out because their video is not there.
    """

    samples: tuple[Sample, ...]
    skipped: int = 0


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        DatasetError: if it is missing, unreadable, not UTF-8 or not JSON (naming the line).
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist.") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {error.lineno}: {error.msg}; expected JSON.") from None


def objects(value: object, where: str) -> list[dict[str, Any]]:
    """``value``, if it is a list of JSON objects and not empty.

    Raises:
        DatasetError: otherwise; entries count from 1.
    """
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where} is {reprlib.repr(value)}; expected a list of objects.")
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise DatasetError(
                f"{where}, entry {number} is {reprlib.repr(entry)}; expected an object."
            )
    return value


def text(entry: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    """Text at ``key``; ``empty`` text counts only on request.

    Raises:
        DatasetError: if there is none.
    """
    if key not in entry:
        raise DatasetError(f"{where} has no {key!r}.")
    value = entry[key]
    if not isinstance(value, str) or not (value.strip() or empty):
        raise DatasetError(f"{where}: {key!r} is {reprlib.repr(value)}; expected text.")
    return value


def locate(name: str, folders: Sequence[Path]) -> Path:
    """The file in the first folder that has it; if none has, where it should be."""
    places = [folder / name for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def complete(samples: Iterable[Sample], *, skip_missing: bool) -> Dataset:
    """A data set of which every video is there.

    Args:
        skip_missing: leave out questions about a video that is not, and count them.

    Raises:
        DatasetError: if videos are missing and may not be, or if all are.
    """
    samples = list(samples)
    videos = dict.fromkeys(sample.video for sample in samples if sample.video is not None)
    missing = {video: None for video in videos if not video.is_file()}
    kept = tuple(sample for sample in samples if sample.video not in missing)
    if missing and (not skip_missing or not kept):
        named = ", ".join(map(str, [*missing][:3]))
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        advice = " Add them, or skip the questions about them." if kept else ""
        raise DatasetError(
            f"{len(missing)} of {len(videos)} videos are missing: {named}{more}.{advice}"
        )
    return Dataset(kept, len(samples) - len(kept))
