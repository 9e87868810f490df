# SPDX-License-Identifier: Apache-2.0
"""Data sets in the formats of their owners, and what is said about files that are not."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_acckv.evaluation import avsd, mvbench
from vllm_acckv.evaluation.samples import DatasetError


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def refused(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(DatasetError) as error:
        call(*args, **options)
    return str(error.value)


# MVBench

INTERACTION = {  # an entry of object_interaction.json, as printed in Ask-Anything's issue 127
    "video": "K9UXS.mp4",
    "question": "Which object was tidied up by the person?",
    "candidates": ["The table.", "The clothes.", "The towel.", "The blanket."],
    "answer": "The blanket.",
    "start": 2.65134176537509,
    "end": 30.34865823462491,
    "accurate_start": 22,
    "accurate_end": 31,
}
COUNT = {
    "video": "video_8686.mp4",
    "question": "How many times did the person repeat the action in the last set?",
    "candidates": ["2", "3", "5", "4"],
    "answer": "4",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two tasks of two entries, unpacked as the archives of MVBench are."""
    second = INTERACTION | {"video": "EDXBD.mp4", "start": -0.5, "end": 7}
    write(tmp_path / "json/object_interaction.json", [INTERACTION, second])
    write(tmp_path / "json/action_count.json", [COUNT, COUNT])
    write(tmp_path / "video/star/Charades_v1_480/K9UXS.mp4", "")
    write(tmp_path / "video/data0613/star/Charades_v1_480/EDXBD.mp4", "")
    write(tmp_path / "video/perception/videos/video_8686.mp4", "")
    return tmp_path


BOTH = ("object_interaction", "action_count")


def test_mvbench(root: Path) -> None:
    data = mvbench.load(root, BOTH)
    assert data.skipped == 0
    first, second, third, fourth = data.samples
    assert first.id == "mvbench/object_interaction/1"
    assert first.task == second.task == "mvbench/object_interaction"
    assert first.video == root / "video/star/Charades_v1_480/K9UXS.mp4"
    assert (first.start, first.end) == (2.65134176537509, 30.34865823462491)
    assert first.answers == ("The blanket.",)
    assert first.choices == ("The table.", "The clothes.", "The towel.", "The blanket.")
    assert first.question == (
        "Question: Which object was tidied up by the person?\n"
        "Options:\n"
        "(A) The table.\n"
        "(B) The clothes.\n"
        "(C) The towel.\n"
        "(D) The blanket.\n"
        "Answer with the full text of the best option, without its letter."
    )
    assert second.video == root / "video/data0613/star/Charades_v1_480/EDXBD.mp4"
    assert (second.start, second.end) == (0, 7)
    assert (third.id, fourth.id) == ("mvbench/action_count/1", "mvbench/action_count/2")
    assert (third.audio, third.start, third.end) == (None, None, None)
    assert third.answers == ("4",)


def test_mvbench_unpacked_beside_json(root: Path) -> None:
    (root / "video/perception").rename(root / "perception")
    data = mvbench.load(root, ["action_count"])
    assert data.samples[0].video == root / "perception/videos/video_8686.mp4"


def test_mvbench_has_the_tasks_of_the_paper(tmp_path: Path) -> None:
    assert [task.short for task in mvbench.TASKS.values()] == (
        ["AS", "AP", "UA", "OI", "OS", "AL", "ST", "AC", "SC", "CO"]
    )
    for name, task in mvbench.TASKS.items():
        write(tmp_path / f"json/{name}.json", [INTERACTION])
        write(tmp_path / "video" / task.folder / "K9UXS.mp4", "")
    samples = mvbench.load(tmp_path).samples
    assert len(samples) == len({sample.id for sample in samples}) == 10
    bounded = [sample.task.split("/")[1] for sample in samples if sample.start is not None]
    assert bounded == [
        "action_sequence",
        "action_prediction",
        "object_interaction",
        "action_localization",
    ]


def without(entry: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[\n  {"video": "a.mp4",\n   "question" "what"}\n]',
            ", line 3: Expecting ':' delimiter; ",
        ),
        ("version https://git-lfs.github.com/spec/v1\n", ", line 1: Expecting value; expected"),
        ({}, " is {}; expected a list of objects."),
        ([], " is []; expected a list of objects."),
        ([INTERACTION, "two"], ", entry 2 is 'two'; expected an object."),
        ([without(INTERACTION, "video")], ", entry 1 has no 'video'."),
        ([without(INTERACTION, "question")], ", entry 1 has no 'question'."),
        ([without(INTERACTION, "answer")], ", entry 1 has no 'answer'."),
        ([INTERACTION | {"question": 3}], ", entry 1: 'question' is 3; expected text."),
        ([INTERACTION | {"question": " "}], ", entry 1: 'question' is ' '; expected text."),
        (
            [without(INTERACTION, "candidates")],
            ", entry 1: 'candidates' is None; expected 2 to 26 texts.",
        ),
        (
            [INTERACTION, INTERACTION | {"candidates": ["The blanket."]}],
            ", entry 2: 'candidates' is ['The blanket.']; expected 2 to 26 texts.",
        ),
        (
            [INTERACTION | {"candidates": ["The blanket.", 2]}],
            ", entry 1: 'candidates' is ['The blanket.', 2]; expected 2 to 26 texts.",
        ),
        (
            [INTERACTION | {"answer": "D"}],
            ", entry 1: 'answer' is 'D'; expected one of the candidates.",
        ),
        ([without(INTERACTION, "start")], ", entry 1: 'start' is None; expected seconds."),
        ([INTERACTION | {"end": "30"}], ", entry 1: 'end' is '30'; expected seconds."),
        ([INTERACTION | {"end": True}], ", entry 1: 'end' is True; expected seconds."),
        ([INTERACTION | {"end": float("nan")}], ", entry 1: 'end' is nan; expected seconds."),
        (
            [INTERACTION | {"start": 5, "end": 5.0}],
            ", entry 1: 'end' is 5; expected more than the start, 5.",
        ),
    ],
)
def test_malformed_mvbench(root: Path, content: Any, said: str) -> None:
    path = write(root / "json/object_interaction.json", content)
    message = refused(mvbench.load, root, BOTH)
    assert message.startswith(f"{path}{said}")


def test_unreadable_files(root: Path) -> None:
    path = root / "json/action_count.json"
    path.write_bytes(b'["\xff"]')
    assert refused(mvbench.load, root, BOTH) == f"{path} is not UTF-8 text."
    path.unlink()
    assert refused(mvbench.load, root, BOTH) == f"{path} does not exist."
    path.mkdir()
    assert refused(mvbench.load, root, BOTH) == f"{path} cannot be read: Is a directory."


def test_unknown_mvbench_task(root: Path) -> None:
    message = refused(mvbench.load, root, ["action_sequences"])
    assert message.startswith("MVBench task 'action_sequences' is none of action_sequence, ")
    assert message.endswith(", character_order.")


def test_missing_videos(root: Path) -> None:
    names = [f"X{number}.mp4" for number in range(5)]
    entries = [INTERACTION, *(INTERACTION | {"video": name} for name in names + names)]
    write(root / "json/object_interaction.json", entries)
    folder = root / "video/star/Charades_v1_480"
    named = ", ".join(str(folder / name) for name in names[:3])
    assert refused(mvbench.load, root, ["object_interaction"]) == (
        f"5 of 6 videos are missing: {named} and 2 more. "
        "Add them, or skip the questions about them."
    )
    data = mvbench.load(root, ["object_interaction"], skip_missing=True)
    assert [sample.id for sample in data.samples] == ["mvbench/object_interaction/1"]
    assert data.skipped == 10
    (folder / "K9UXS.mp4").unlink()
    write(root / "json/object_interaction.json", [INTERACTION])
    assert refused(mvbench.load, root, ["object_interaction"], skip_missing=True) == (
        f"1 of 1 videos are missing: {folder / 'K9UXS.mp4'}."
    )


# AVSD

FIRST = {
    "question": "hello . did someone come to the door ?",
    "answer": "no and it is a window that he is standing in front of .",
}
SECOND = {"question": "is he looking at something outside the window ?", "answer": "yes , he is ."}
WITHHELD = SECOND | {"answer": "__UNDISCLOSED__"}
SIX = ["a little bit", "i can see it", "he appears to be", "yes he is", "yes but", "no i can 't"]


def dialog(image_id: str, *turns: dict[str, Any]) -> dict[str, Any]:
    return {"image_id": image_id, "caption": "c", "summary": "s", "dialog": list(turns)}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    write(tmp_path / "charades/Charades_v1_480/CGRUM.mp4", "")
    write(tmp_path / "charades/Charades_vu17_test_480/007YF.mp4", "")
    return tmp_path / "charades"


def dialogs(folder: Path, *entries: Any) -> Path:
    content = {"type": "dialog", "version": "1.0", "dialogs": list(entries)}
    return write(folder / "set4DSTC7-AVSD.json", content)


def references(folder: Path, names: list[str], *, count: int = 6) -> Path:
    """As ``utils/get_annotation.py`` of the challenge writes them."""
    images = [{"name": name, "id": number} for number, name in enumerate(names, 1)]
    annotations = [
        {"image_id": image["id"], "id": 10 * number, "caption": f"{image['name']} {number} ."}
        for number in range(count)
        for image in images
    ]
    content = {"info": {}, "licenses": [], "type": "captions"}
    content |= {"images": images, "annotations": annotations}
    return write(folder / "test_set4DSTC7-AVSD_multiref.json", content)


def test_avsd(tmp_path: Path, videos: Path) -> None:
    path = dialogs(tmp_path, dialog("CGRUM", FIRST, SECOND), dialog("007YF", FIRST))
    first, second = avsd.load(path, videos).samples
    assert first.id == "avsd/1/CGRUM/2"
    assert first.task == "avsd"
    assert first.video == videos / "Charades_v1_480/CGRUM.mp4"
    assert (first.audio, first.start, first.end, first.choices) == (None, None, None, ())
    assert first.answers == ("yes , he is .",)
    assert first.question == (
        "Question: hello . did someone come to the door ?\n"
        "Answer: no and it is a window that he is standing in front of .\n"
        "Question: is he looking at something outside the window ?\n"
        "Answer the last question about the video in one sentence."
    )
    assert second.id == "avsd/2/007YF/1"
    assert second.video == videos / "Charades_vu17_test_480/007YF.mp4"


def test_every_turn_of_avsd(tmp_path: Path, videos: Path) -> None:
    path = dialogs(tmp_path, dialog("CGRUM", FIRST, SECOND), dialog("CGRUM", SECOND))
    samples = avsd.load(path, videos, turns="all").samples
    assert [one.id for one in samples] == ["avsd/1/CGRUM/1", "avsd/1/CGRUM/2", "avsd/2/CGRUM/1"]
    assert samples[0].question == (
        "Question: hello . did someone come to the door ?\n"
        "Answer the last question about the video in one sentence."
    )
    assert samples[1] == avsd.load(path, videos).samples[0]


def test_references_of_dstc7(tmp_path: Path, videos: Path) -> None:
    path = dialogs(tmp_path, dialog("CGRUM", FIRST, WITHHELD), dialog("007YF", WITHHELD))
    # The order of references is not that of dialogues.
    known = references(tmp_path, ["007YF_0", "CGRUM_1"])
    first, second = avsd.load(path, videos, known).samples
    assert first.answers == tuple(f"CGRUM_1 {number} ." for number in range(6))
    assert second.answers == tuple(f"007YF_0 {number} ." for number in range(6))


def test_references_of_dstc10(tmp_path: Path, videos: Path) -> None:
    reason = [{"timestamp": [0.0, 23.744], "sentence": "he is in is house"}]
    last = {"question": "can you see what he is watching ?", "answer": SIX, "reason": reason}
    path = dialogs(tmp_path, {"image_id": "CGRUM", "dialog": [FIRST, last]})
    (sample,) = avsd.load(path, videos).samples
    assert sample.answers == tuple(SIX)
    assert (sample.start, sample.end) == (None, None)


def test_missing_avsd_videos(tmp_path: Path, videos: Path) -> None:
    path = dialogs(tmp_path, dialog("CGRUM", FIRST), dialog("XXXXX", FIRST, SECOND))
    assert refused(avsd.load, path, videos) == (
        f"1 of 2 videos are missing: {videos / 'XXXXX.mp4'}. "
        "Add them, or skip the questions about them."
    )
    data = avsd.load(path, videos, turns="all", skip_missing=True)
    assert [sample.id for sample in data.samples] == ["avsd/1/CGRUM/1"]
    assert data.skipped == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"dialogs": [\n', ", line 2: Expecting value; expected JSON."),
        ([], " has no 'dialogs'."),
        ({"Dialogs": []}, " has no 'dialogs'."),
        ({"dialogs": {}}, ": 'dialogs' is {}; expected a list of objects."),
        ({"dialogs": [1]}, ": 'dialogs', entry 1 is 1; expected an object."),
        ({"dialogs": [{"dialog": [FIRST]}]}, ", dialogue 1 has no 'image_id'."),
        ({"dialogs": [{"image_id": "CGRUM"}]}, ", dialogue 1 has no 'dialog'."),
        (
            {"dialogs": [dialog("CGRUM", FIRST), dialog("CGRUM")]},
            ", dialogue 2: 'dialog' is []; expected a list of objects.",
        ),
        (
            {"dialogs": [dialog("CGRUM", FIRST, {"question": "why ?"})]},
            ", dialogue 1, turn 2 has no 'answer'.",
        ),
        (
            {"dialogs": [dialog("CGRUM", FIRST | {"question": None})]},
            ", dialogue 1, turn 1: 'question' is None; expected text.",
        ),
        (
            {"dialogs": [dialog("CGRUM", FIRST | {"answer": 3})]},
            ", dialogue 1, turn 1: 'answer' is 3; expected text.",
        ),
        (
            {"dialogs": [dialog("CGRUM", FIRST | {"answer": []})]},
            ", dialogue 1, turn 1: 'answer' is []; expected texts.",
        ),
        (
            {"dialogs": [dialog("CGRUM", FIRST | {"answer": ["yes", 1]})]},
            ", dialogue 1, turn 1: 'answer' is ['yes', 1]; expected texts.",
        ),
        (
            {"dialogs": [dialog("CGRUM", WITHHELD, SECOND)]},
            ", dialogue 1, turn 1: 'answer' is withheld; only the last may be.",
        ),
        (
            {"dialogs": [dialog("CGRUM", FIRST, WITHHELD)]},
            ", dialogue 1: answer 2 is withheld or empty; give a file of references.",
        ),
        (
            {"dialogs": [dialog("CGRUM", FIRST | {"answer": ""})]},
            ", dialogue 1: answer 1 is withheld or empty; give a file of references.",
        ),
    ],
)
def test_malformed_avsd(tmp_path: Path, videos: Path, content: Any, said: str) -> None:
    path = write(tmp_path / "dialogs.json", content)
    assert refused(avsd.load, path, videos) == f"{path}{said}"


IMAGE, CAPTION = {"name": "CGRUM_1", "id": 1}, {"image_id": 1, "caption": "yes"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"annotations": [CAPTION]}, " has no 'images'."),
        ({"images": [IMAGE]}, " has no 'annotations'."),
        (
            {"images": [{"name": "CGRUM", "id": 1}], "annotations": [CAPTION]},
            ", image 1: 'name' is 'CGRUM'; expected 'VIDEO_TURN'.",
        ),
        (
            {"images": [IMAGE, {"name": "CGRUM_2", "id": 2}], "annotations": [CAPTION]},
            ", image 2: 'name' is 'CGRUM_2'; expected a video just once.",
        ),
        (
            {"images": [IMAGE | {"id": "1"}], "annotations": [CAPTION]},
            ", image 1: 'id' is '1'; expected a whole number.",
        ),
        (
            {"images": [IMAGE], "annotations": [CAPTION, CAPTION | {"image_id": 2}]},
            ", annotation 2: 'image_id' is 2; expected the id of an image.",
        ),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1}]},
            ", annotation 1 has no 'caption'.",
        ),
    ],
)
def test_malformed_references(tmp_path: Path, videos: Path, content: Any, said: str) -> None:
    path = dialogs(tmp_path, dialog("CGRUM", FIRST, WITHHELD))
    known = write(tmp_path / "multiref.json", content)
    assert refused(avsd.load, path, videos, known) == f"{known}{said}"


def test_references_that_do_not_fit(tmp_path: Path, videos: Path) -> None:
    path = dialogs(tmp_path, dialog("CGRUM", WITHHELD), dialog("007YF", WITHHELD))
    known = references(tmp_path, ["CGRUM_0"])
    assert refused(avsd.load, path, videos, known) == (
        f"{path}, dialogue 2: no reference is named '007YF_TURN'."
    )
    assert refused(avsd.load, path, videos, known, turns="all") == (
        f"{known} answers last questions alone; expected turns 'last'."
    )


# Anything else

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@st.composite
def spoilt(draw: st.DrawFn, document: Any) -> Any:
    """The document with anything at one place in it, or without that place."""
    document = copy.deepcopy(document)
    place, key = {"": document}, ""
    while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
        place = place[key]
        key = draw(st.sampled_from([*place] if isinstance(place, dict) else range(len(place))))
    if draw(st.booleans()) and key != "":
        del place[key]
    else:
        place[key] = draw(anything)
    return place[""] if key == "" else document


@given(spoilt([INTERACTION, INTERACTION]))
@settings(max_examples=200, deadline=None)
def test_mvbench_never_fails_otherwise(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DatasetError):
        write(Path(folder, "json/object_interaction.json"), content)
        write(Path(folder, "video/star/Charades_v1_480/K9UXS.mp4"), "")
        samples = mvbench.load(Path(folder), ["object_interaction"], skip_missing=True).samples
        assert all(sample.answers[0] in sample.choices for sample in samples)


@given(
    spoilt(
        [
            {"dialogs": [dialog("CGRUM", FIRST, WITHHELD)]},
            {"images": [IMAGE], "annotations": [CAPTION]},
        ]
    )
)
@settings(max_examples=200, deadline=None)
def test_avsd_never_fails_otherwise(contents: Any) -> None:
    if not isinstance(contents, list) or len(contents) != 2:
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DatasetError):
        first, second = (
            write(Path(folder, f"{number}.json"), json.dumps(one))
            for number, one in enumerate(contents)
        )
        write(Path(folder, "CGRUM.mp4"), "")
        samples = avsd.load(first, Path(folder), second, skip_missing=True).samples
        assert all(sample.answers for sample in samples)
