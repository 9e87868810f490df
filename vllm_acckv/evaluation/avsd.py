# SPDX-License-Identifier: Apache-2.0
"""AVSD (Alamri et al., CVPR 2019): dialogues about Charades videos, tasks of DSTC 7, 8 and 10.

A file of dialogues is::

    {"dialogs": [{"image_id": "CGRUM", "caption": ..., "summary": ...,
                  "dialog": [{"question": ..., "answer": ...}, ...]}, ...]}

* Training and validation sets have every answer. In test sets the last one of each dialogue is
  ``__UNDISCLOSED__``, the one that systems give (README of
  https://github.com/hudaAlamri/DSTC7-Audio-Visual-Scene-Aware-Dialog-AVSD-Challenge).
* DSTC 10's published test set, ``test_set4DSTC10-AVSD_multiref+reason.json``, has a list of six
  answers there; its scorer counts the last turns alone, in every metric
  (https://github.com/ankitshah009/AVSD-DSTC10_baseline, ``dstc10avsd_eval``, commit bb00af3).
* For DSTC 7 and 8, references are a file of their own in COCO's caption format,
  ``test_set4DSTC7-AVSD_multiref.json`` of ``dstc7avsd_eval.tgz``:
  ``{"images": [{"name": "VIDEO_TURN", "id": 1}], "annotations": [{"image_id": 1, "caption": ""}]}``
  (``utils/get_annotation.py`` of https://github.com/dialogtekgeek/AudioVisualSceneAwareDialog).

A prompt holds the dialogue so far, without ``caption`` and ``summary``: people wrote those about
the video, and DSTC 10 forbids them at inference.
"""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from vllm_acckv.evaluation.samples import (
    Dataset,
    DatasetError,
    Sample,
    complete,
    locate,
    objects,
    read_json,
    text,
)

UNDISCLOSED = "__UNDISCLOSED__"
FOLDERS = ("", "Charades_v1_480", "Charades_vu17_test_480", "Charades_v1", "Charades_vu17_test")
"""Where videos are looked for: as they come unpacked, the smaller ones first."""


def load(
    dialogs: Path,
    videos: Path,
    references: Path | None = None,
    *,
    turns: Literal["last", "all"] = "last",
    skip_missing: bool = False,
) -> Dataset:
    """Questions of the dialogues in one file.

    Args:
        videos: folder with ``IMAGE_ID.mp4``, or with folders of Charades.
        references: answers to the last questions, in place of those in ``dialogs``.
        turns: the last question of each dialogue, as in the challenges, or every one.
        skip_missing: leave out questions about a video that is not there, and count them.

    Raises:
        DatasetError: for a file that is missing or malformed, a withheld answer without a
            reference, missing videos.
    """
    known = None if references is None else _references(references)
    if known is not None and turns == "all":
        raise DatasetError(f"{references} answers last questions alone; expected turns 'last'.")
    samples = list(_samples(dialogs, videos, known, turns))
    return complete(samples, skip_missing=skip_missing)


def _samples(
    path: Path, videos: Path, known: dict[str, list[str]] | None, turns: str
) -> Iterator[Sample]:
    folders = [videos / folder for folder in FOLDERS]
    for number, entry in enumerate(_list(read_json(path), "dialogs", str(path)), 1):
        where = f"{path}, dialogue {number}"
        video = text(entry, "image_id", where)
        dialog = _turns(_list(entry, "dialog", where), where)
        if known is not None:
            if video not in known:
                raise DatasetError(f"{where}: no reference is named {video + '_TURN'!r}.")
            dialog[-1] = (dialog[-1][0], known[video])
        for turn in range(1, len(dialog) + 1) if turns == "all" else [len(dialog)]:
            question, answers = dialog[turn - 1]
            if not any(answers):
                raise DatasetError(
                    f"{where}: answer {turn} is withheld or empty; give a file of references."
                )
            yield Sample(
                # A video may have several dialogues.
                id=f"avsd/{number}/{video}/{turn}",
                task="avsd",
                video=locate(f"{video}.mp4", folders),
                audio=None,
                start=None,
                end=None,
                question=prompt([(q, a[0]) for q, a in dialog[: turn - 1]], question),
                answers=tuple(filter(None, answers)),
            )


def _list(entry: object, key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(entry, dict) or key not in entry:
        raise DatasetError(f"{where} has no {key!r}.")
    return objects(entry[key], f"{where}: {key!r}")


def _turns(dialog: list[dict[str, Any]], where: str) -> list[tuple[str, list[str]]]:
    """Questions with their answers; one that is withheld, the last at most, is empty."""
    turns = []
    for number, turn in enumerate(dialog, 1):
        place = f"{where}, turn {number}"
        answers = _answers(turn, place)
        if UNDISCLOSED in answers:
            if number < len(dialog):
                raise DatasetError(f"{place}: 'answer' is withheld; only the last may be.")
            answers = [""]
        turns.append((text(turn, "question", place), answers))
    return turns


def _answers(turn: dict[str, Any], where: str) -> list[str]:
    value = turn.get("answer")
    if not isinstance(value, list):
        return [text(turn, "answer", where, empty=True).strip()]
    if not value or not all(isinstance(one, str) for one in value):
        raise DatasetError(f"{where}: 'answer' is {reprlib.repr(value)}; expected texts.")
    return [one.strip() for one in value]


def _references(path: Path) -> dict[str, list[str]]:
    """Reference answers by video. Test sets ask once about a video, so its turn is not needed."""
    content = read_json(path)
    videos: dict[object, str] = {}
    for number, image in enumerate(_list(content, "images", str(path)), 1):
        where = f"{path}, image {number}"
        video = text(image, "name", where).rpartition("_")[0]
        if not video:
            raise DatasetError(f"{where}: 'name' is {image['name']!r}; expected 'VIDEO_TURN'.")
        if video in videos.values():
            raise DatasetError(f"{where}: 'name' is {image['name']!r}; expected a video just once.")
        videos[_number(image, "id", where)] = video
    answers = defaultdict(list)
    for number, annotation in enumerate(_list(content, "annotations", str(path)), 1):
        where = f"{path}, annotation {number}"
        image_id = _number(annotation, "image_id", where)
        if image_id not in videos:
            raise DatasetError(f"{where}: 'image_id' is {image_id}; expected the id of an image.")
        answers[videos[image_id]].append(text(annotation, "caption", where, empty=True).strip())
    return dict(answers)


def _number(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DatasetError(f"{where}: {key!r} is {reprlib.repr(value)}; expected a whole number.")
    return value


def prompt(history: Sequence[tuple[str, str]], question: str) -> str:
    """The user's turn: questions and answers so far, then the one that is asked."""
    before = [line for q, a in history for line in (f"Question: {q}", f"Answer: {a}")]
    last = "Answer the last question about the video in one sentence."
    return "\n".join([*before, f"Question: {question}", last])
