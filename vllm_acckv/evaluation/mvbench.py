# SPDX-License-Identifier: Apache-2.0
"""MVBench (Li et al., CVPR 2024, https://arxiv.org/abs/2311.17005): multiple choice about videos.

Files as in https://huggingface.co/datasets/OpenGVLab/MVBench, branch ``main``: ``json/TASK.json``
and ``video/*.zip``. An annotation file is a list of::

    {"video": "K9UXS.mp4", "question": "Which object was tidied up by the person?",
     "candidates": ["The table.", "The clothes.", "The towel.", "The blanket."],
     "answer": "The blanket.", "start": 2.65, "end": 30.35, ...}

Fields, folders and which tasks have bounds are those of the authors' ``mvbench.ipynb``
(https://github.com/OpenGVLab/Ask-Anything, ``video_chat2``, commit 4631cd6, ``data_list`` and
``MVBench_dataset``); the example is from issue 127 there. ``start`` and ``end`` say what a model is
shown; ``accurate_start`` and ``accurate_end``, where present, are where the answer is and not used.
"""

from __future__ import annotations

import math
import reprlib
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Task:
    """One annotation file.

    Attributes:
        short: the AccKV paper's abbreviation.
        folder: of the videos, below the one that archives are unpacked in.
        bounded: whether a part of the video is asked about.
    """

    short: str
    folder: str
    bounded: bool = False


_STAR, _PERCEPTION = "star/Charades_v1_480", "perception/videos"
TASKS = {
    "action_sequence": Task("AS", _STAR, bounded=True),
    "action_prediction": Task("AP", _STAR, bounded=True),
    "unexpected_action": Task("UA", "FunQA_test/test"),
    "object_interaction": Task("OI", _STAR, bounded=True),
    "object_shuffle": Task("OS", _PERCEPTION),
    "action_localization": Task("AL", "sta/sta_video", bounded=True),
    "scene_transition": Task("ST", "scene_qa/video"),
    "action_count": Task("AC", _PERCEPTION),
    "state_change": Task("SC", _PERCEPTION),
    "character_order": Task("CO", _PERCEPTION),
}
"""The 10 of 20 that the AccKV paper evaluates; all are video files, none a folder of frames."""


def load(root: Path, tasks: Sequence[str] = tuple(TASKS), *, skip_missing: bool = False) -> Dataset:
    """Questions of some tasks.

    Args:
        root: folder with ``json/`` and ``video/``, the archives unpacked.
        skip_missing: leave out questions about a video that is not there, and count them.

    Raises:
        DatasetError: for an unknown task, a file that is missing or malformed, missing videos.
    """
    for task in tasks:
        if task not in TASKS:
            raise DatasetError(f"MVBench task {task!r} is none of {', '.join(TASKS)}.")
    samples = [sample for task in tasks for sample in _task(root, task)]
    return complete(samples, skip_missing=skip_missing)


def _task(root: Path, task: str) -> Iterator[Sample]:
    path = root / "json" / f"{task}.json"
    for number, entry in enumerate(objects(read_json(path), str(path)), 1):
        where = f"{path}, entry {number}"
        candidates, answer = _choices(entry, where)
        start, end = _bounds(entry, where) if TASKS[task].bounded else (None, None)
        yield Sample(
            id=f"mvbench/{task}/{number}",
            task=f"mvbench/{task}",
            video=locate(text(entry, "video", where), _folders(root, TASKS[task].folder)),
            audio=None,
            start=start,
            end=end,
            question=prompt(text(entry, "question", where), candidates),
            answers=(answer,),
            choices=candidates,
        )


def _folders(root: Path, folder: str) -> list[Path]:
    # data0613.zip, which replaced some videos in 2024, unpacks to a tree of its own.
    return [base / folder for base in (root / "video", root / "video" / "data0613", root)]


def _choices(entry: dict[str, Any], where: str) -> tuple[tuple[str, ...], str]:
    candidates, answer = entry.get("candidates"), text(entry, "answer", where)
    if (
        not isinstance(candidates, list)
        or not 2 <= len(candidates) <= len(string.ascii_uppercase)
        or not all(isinstance(one, str) and one.strip() for one in candidates)
    ):
        raise DatasetError(
            f"{where}: 'candidates' is {reprlib.repr(candidates)}; expected 2 to 26 texts."
        )
    if answer not in candidates:
        raise DatasetError(f"{where}: 'answer' is {answer!r}; expected one of the candidates.")
    return tuple(candidates), answer


def _bounds(entry: dict[str, Any], where: str) -> tuple[float, float]:
    """Seconds; a start before the video counts as 0, as for the authors."""
    for key in ("start", "end"):
        value = entry.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise DatasetError(f"{where}: {key!r} is {reprlib.repr(value)}; expected seconds.")
    start, end = max(0.0, float(entry["start"])), float(entry["end"])
    if start >= end:
        raise DatasetError(f"{where}: 'end' is {end:g}; expected more than the start, {start:g}.")
    return start, end


def prompt(question: str, choices: Sequence[str]) -> str:
    """The user's turn. Options are laid out as by the authors, who then ask for just the option
    and begin the answer with a bracket; here it is asked for in words, because compression after
    prefill cannot change an answer of one token.
    """
    options = [
        f"({letter}) {choice}"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    ]
    last = "Answer with the full text of the best option, without its letter."
    return "\n".join([f"Question: {question}", "Options:", *options, last])
