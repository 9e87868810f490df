# SPDX-License-Identifier: Apache-2.0
"""Clips and questions of the tiny world as tensors.

A row holds one clip and several questions about it, each of which sees the clip and itself. That
equals as many separate prompts and costs a fraction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_acckv import cpu_media
from vllm_acckv.evaluation import tiny_av

cpu_media.fix()  # in front of the first import of transformers

IGNORED = -100
SHARES = {
    "colours": 1,
    "shapes": 1,
    "sounds": 1,
    "second": 1,
    "see": 2,
    "hear": 2,
    "count": 1,
    "find": 2,
}
"""How often each task is asked, against the others. ``find`` is for training only."""
HIDDEN = 0.5
"""Share of the questions that search for a second which see a part of the clip only."""


@dataclass(frozen=True)
class Batch:
    """Rows of ``L`` tokens, the first ``P`` of which are the clip.

    Attributes:
        pixels: fp32 ``[B, patches, values]``; mel: fp32 ``[B, 128, frames]``.
        tokens: int64 ``[B, L]``; labels: the same where an answer is learnt, shifted by one.
        slot: int64 ``[B, L]``, -1 for the clip, the number of the question behind it.
        position: int64 ``[3, B, L]``, rotary positions.
        task: int64 ``[B, slots]``, place in ``tiny_av.TASKS``, behind all for ``find``.
        last: int64 ``[B, slots]``, the token of a prompt that the first word follows.
        colour, shape, sound: int64 ``[B, seconds]``, what there is.
        second: int64 ``[P]``, of each token of the clip, -1 for text.
        visible: bool ``[B, slots, seconds]``, what of the clip each question sees.
    """

    pixels: torch.Tensor
    mel: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    task: torch.Tensor
    last: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    sound: torch.Tensor
    second: torch.Tensor
    visible: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        moved = {one.name: getattr(self, one.name).to(device) for one in fields(self)}
        return replace(self, **moved)

    def mask(self) -> torch.Tensor:
        """bool ``[B, 1, L, L]``: what each token sees."""
        length = self.tokens.shape[1]
        order = torch.arange(length, device=self.tokens.device)
        same = self.slot[:, None, :, None] == self.slot[:, None, None, :]
        clip = self.slot[:, None, None, :] == -1
        seen = (order[:, None] >= order) & (same | clip)
        # Whether each question sees each token of the clip, and so each row that is part of it.
        there = self.visible[:, :, self.second.clamp(min=0)] | (self.second < 0)
        rows = self.slot.clamp(min=0)[..., None].expand(-1, -1, len(self.second))
        there = there.gather(1, rows) | (self.slot < 0)[..., None]
        seen[:, 0, :, : len(self.second)] &= there
        return seen


class Maker:
    """Makes batches with the checkpoint's own tokenizer and processors."""

    def __init__(self, checkpoint: Path, slots: int, seed: int) -> None:
        from transformers import Qwen2_5OmniProcessor

        self.processor = Qwen2_5OmniProcessor.from_pretrained(checkpoint)
        self.processor.feature_extractor.n_samples = tiny_av.SECONDS * tiny_av.SAMPLE_RATE
        self.slots, self.seed = slots, seed
        clip = tiny_av.make_clip(np.random.default_rng(0))
        content = [{"type": "video"}, {"type": "audio"}, {"type": "text", "text": "QUESTION"}]
        template = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        before, _, self._behind = template.partition("QUESTION")
        whole = self.processor(
            text=before,
            videos=[tiny_av.frames(clip)],
            audio=[tiny_av.sound(clip)],
            fps=tiny_av.FPS,
            do_sample_frames=False,
            return_tensors="pt",
        )
        self.prefix: list[int] = torch.as_tensor(whole["input_ids"])[0].tolist()
        self.grid = torch.as_tensor(whole["video_grid_thw"])
        self.second = self._seconds()

    def _seconds(self) -> torch.Tensor:
        """int64 ``[P]``, the second of each token of the clip, -1 for text."""
        tokens = torch.tensor(self.prefix)
        seconds = torch.full_like(tokens, -1)
        for name in ("<|VIDEO|>", "<|AUDIO|>"):
            (places,) = (tokens == self.tokenizer.convert_tokens_to_ids(name)).nonzero(
                as_tuple=True
            )
            each = len(places) // tiny_av.SECONDS
            seconds[places] = torch.arange(tiny_av.SECONDS).repeat_interleave(each)
        return seconds

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def batch(self, step: int, size: int, held_out: bool = False) -> Batch:
        """The same for the same arguments; ``held_out`` clips are never learnt from."""
        rng = np.random.default_rng([self.seed, int(held_out), step])
        clips = [tiny_av.make_clip(rng) for _ in range(size)]
        rows = []
        for clip in clips:
            asked = [_question(clip, rng) for _ in range(self.slots)]
            rows.append(self._row(asked, rng, hide=not held_out))
        return self._batch(clips, rows)

    def about(
        self, clip: tiny_av.Clip, questions: Sequence[tiny_av.Question]
    ) -> tuple[Batch, list[tuple[int, int, int]]]:
        """One row, and of each question where it starts and where its answer starts and ends."""
        row = self._row(questions, np.random.default_rng(0), hide=False)
        slot, places = torch.tensor(row["slot"]), list[tuple[int, int, int]]()
        for number, last in enumerate(row["last"]):
            (mine,) = (slot == number).nonzero(as_tuple=True)
            places.append((int(mine[0]), last + 1, int(mine[-1]) + 1))
        return self._batch([clip], [row]), places

    def _batch(self, clips: Sequence[tiny_av.Clip], rows: Sequence[dict[str, Any]]) -> Batch:
        size = len(clips)
        video = self.processor.video_processor(
            videos=[np.moveaxis(tiny_av.frames(clip), -1, 1) for clip in clips],
            return_tensors="pt",
            do_sample_frames=False,
        )
        sound = self.processor.feature_extractor(
            [tiny_av.sound(clip) for clip in clips],
            sampling_rate=tiny_av.SAMPLE_RATE,
            padding="max_length",
            return_tensors="pt",
        )
        length = max(len(row["tokens"]) for row in rows)

        def padded(name: str, fill: int) -> torch.Tensor:
            made = [row[name] + [fill] * (length - len(row["tokens"])) for row in rows]
            return torch.tensor(made)

        def seen(name: str, words: list[str]) -> torch.Tensor:
            return torch.tensor(
                [[words.index(getattr(one, name)) for one in clip] for clip in clips]
            )

        offset = padded("offset", 0)
        return Batch(
            video["pixel_values_videos"].unflatten(0, (size, -1)),
            sound["input_features"],
            padded("tokens", self.tokenizer.pad_token_id),
            padded("labels", IGNORED),
            padded("slot", -2),
            offset.expand(3, -1, -1),
            torch.tensor([row["task"] for row in rows]),
            torch.tensor([row["last"] for row in rows]),
            seen("colour", list(tiny_av.COLOURS)),
            seen("shape", list(tiny_av.SHAPES)),
            seen("sound", list(tiny_av.SOUNDS)),
            self.second,
            torch.tensor(np.array([row["visible"] for row in rows])),
        )

    def _row(
        self, questions: Sequence[tiny_av.Question], rng: np.random.Generator, hide: bool
    ) -> dict[str, Any]:
        """Tokens behind the prefix; ``offset`` counts from the end of the prefix."""
        prefix, tasks = len(self.prefix), list(tiny_av.TASKS)
        tokens, labels, slot, offset = (
            [*self.prefix],
            [IGNORED] * prefix,
            [-1] * prefix,
            [0] * prefix,
        )
        tasks.append("find")
        row: dict[str, Any] = {"task": [], "last": [], "visible": []}
        for number, question in enumerate(questions):
            asked = self.tokenizer.encode(question.text + self._behind)
            answer = self.tokenizer.encode(question.answer + "<|im_end|>")
            row["task"].append(tasks.index(question.task))
            row["last"].append(len(tokens) + len(asked) - 1)
            row["visible"].append(_visible(question, rng, hide))
            tokens += asked + answer
            labels += [IGNORED] * (len(asked) - 1) + answer + [IGNORED]
            slot += [number] * (len(asked) + len(answer))
            offset += range(len(asked) + len(answer))
        return {**row, "tokens": tokens, "labels": labels, "slot": slot, "offset": offset}


def _question(clip: tiny_av.Clip, rng: np.random.Generator) -> tiny_av.Question:
    """One of a task by its share; a clip that allows none gets one of another task."""
    names, shares = list(SHARES), np.array([*SHARES.values()])
    while True:
        task = str(rng.choice(names, p=shares / shares.sum()))
        question = find(clip, rng) if task == "find" else tiny_av.TASKS[task](clip, rng)
        if question is not None:
            return question


def find(clip: tiny_av.Clip, rng: np.random.Generator) -> tiny_av.Question:
    """Searches for as many seconds as there are: what "see" and "hear" do once in an answer is
    learnt from this, or not at all."""
    looks = [f"{one.colour} {one.shape}" for one in clip]
    sounds = [one.sound for one in clip]
    several = sounds if rng.random() < 0.5 else looks
    alone = [number for number, one in enumerate(several) if several.count(one) == 1]
    order = rng.permutation(alone)
    text = f"find {' '.join(several[number] for number in order)}"
    answer = (
        f"it is {' '.join(f'{several[number]} {tiny_av.NUMBERS[number + 1]}' for number in order)}"
    )
    return tiny_av.Question("find", text, answer, tiny_av.VIDEO | tiny_av.AUDIO)


def _visible(question: tiny_av.Question, rng: np.random.Generator, hide: bool) -> np.ndarray:
    """Seconds that a question sees, bool ``[seconds]``.

    Questions that search for a second are not learnt while there are eight to choose from, and
    soon if they sometimes see a few only, the one that is asked about among them.
    """
    seen = np.ones(tiny_av.SECONDS, bool)
    if hide and question.task in ("see", "hear") and rng.random() < HIDDEN:
        (asked,) = [
            tiny_av.NUMBERS.index(word)
            for word in question.answer.split()
            if word in tiny_av.NUMBERS
        ]
        seen[rng.permutation(tiny_av.SECONDS)[: rng.integers(tiny_av.SECONDS)]] = False
        seen[asked - 1] = True
    return seen


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Batches of the steps from ``start`` on, to be made in other processes."""

    def __init__(self, checkpoint: Path, slots: int, seed: int, size: int, start: int) -> None:
        self.arguments, self.size, self.start = (checkpoint, slots, seed), size, start

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        maker, step = Maker(*self.arguments), self.start + number
        while True:
            yield maker.batch(step, self.size)
            step += count
