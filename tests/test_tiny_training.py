# SPDX-License-Identifier: Apache-2.0
"""Training of the tiny audio-video model: its batches, and going on where it stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_acckv.hf import kv_policy
from vllm_acckv.policies import make_policy
from vllm_acckv.spans import Layout

FOLDER = Path(__file__).parent.parent / "evaluation" / "tiny"


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        import train

        yield train
    finally:
        sys.path.remove(str(FOLDER))


def test_packed_questions_are_separate_prompts(train: ModuleType, tmp_path: Path) -> None:
    """Logits of each question in a row equal those of transformers for that prompt alone."""
    settings = train.Settings(layers=2, heads=2, kv_heads=2, slots=3)
    folder = tmp_path / "model"
    train.write_settings(folder, settings)
    maker = train.Maker(folder, settings.slots, 0)
    model = train.Tiny(folder, maker, 0).eval()
    batch = maker.batch(0, 2, held_out=True)
    with torch.inference_mode():
        packed = model(batch)[0]
        for row in range(2):
            prefix = batch.tokens[row, : len(maker.prefix)]
            for slot in range(settings.slots):
                mine = batch.slot[row] == slot
                alone = model.thinker(
                    input_ids=torch.cat([prefix, batch.tokens[row, mine]])[None],
                    attention_mask=torch.ones(1, len(prefix) + int(mine.sum()), dtype=torch.long),
                    pixel_values_videos=batch.pixels[row],
                    video_grid_thw=maker.grid,
                    input_features=batch.mel[row, None],
                    feature_attention_mask=torch.ones(1, batch.mel.shape[2], dtype=torch.long),
                    video_second_per_grid=torch.tensor([2 / train.tiny_av.FPS]),
                    use_audio_in_video=False,
                ).logits[0, len(prefix) :]
                torch.testing.assert_close(packed[row, mine], alone, atol=1e-4, rtol=1e-4)


def test_labels_are_the_answers(train: ModuleType, tmp_path: Path) -> None:
    settings = train.Settings(slots=4)
    train.write_settings(tmp_path / "model", settings)
    maker = train.Maker(tmp_path / "model", 4, 0)
    batch = maker.batch(3, 2)
    for row in range(2):
        for slot in range(4):
            mine = batch.slot[row] == slot
            labels = batch.labels[row, mine]
            told = maker.tokenizer.decode(labels[labels != train.IGNORED].tolist())
            whole = maker.tokenizer.decode(batch.tokens[row, mine].tolist())
            assert whole.endswith(f"<|im_start|>assistant\n{told}") and told.endswith("<|im_end|>")
            place = int(batch.last[row, slot])
            assert batch.labels[row, place] == labels[labels != train.IGNORED][0]


def test_some_searches_see_a_part_of_the_clip(train: ModuleType, tmp_path: Path) -> None:
    settings = train.Settings(slots=6)
    train.write_settings(tmp_path / "model", settings)
    maker = train.Maker(tmp_path / "model", 6, 0)
    assert maker.batch(0, 4, held_out=True).visible.all()
    batch = maker.batch(0, 4)
    tasks, length = list(train.tiny_av.TASKS), len(maker.prefix)
    searches = (batch.task == tasks.index("see")) | (batch.task == tasks.index("hear"))
    hidden = ~batch.visible.all(-1)
    assert (
        (searches & hidden).any() and (searches & ~hidden).any() and not (~searches & hidden).any()
    )
    assert batch.visible.any(-1).all()
    mask = batch.mask()[:, 0]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert (mask[:, :length, :length] == causal).all()
    for row in range(4):
        for slot in range(6):
            seen = mask[row, batch.slot[row] == slot, :length]
            clip = batch.second >= 0
            expected = batch.visible[row, slot, batch.second[clip]]
            assert (seen[:, clip] == expected).all() and seen[:, ~clip].all()
            # The second in the answer of a search is among them.
            mine = (batch.slot[row] == slot) & (batch.labels[row] != train.IGNORED)
            told = maker.tokenizer.decode(batch.labels[row, mine].tolist())
            if searches[row, slot]:
                numbers = train.tiny_av.NUMBERS
                (asked,) = [numbers.index(word) for word in told.split() if word in numbers]
                assert batch.visible[row, slot, asked - 1]


def test_training_goes_on_where_it_stopped(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes to the same weights."""
    settings = train.Settings(
        layers=2, heads=2, kv_heads=2, steps=4, encoder_steps=2, batch=1, slots=2
    )

    def run(name: str, settings: Any) -> dict[str, float]:
        device = torch.device("cpu")
        return train.train(
            train.Run(tmp_path / name, settings, device, workers=0, save_every=2, clips=8)
        )

    assert set(run("one", settings)) == {*train.tiny_av.TASKS, "find"}
    step = train.train_step

    def stopped(model: Any, optimizers: Any, batch: Any, number: int) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return step(model, optimizers, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("two", settings)
    run("two", settings)
    one, two = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("one", "two")
    )
    assert one["step"] == two["step"] == 4
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    with pytest.raises(SystemExit, match="other settings"):
        run("two", replace(settings, rate=1.0))


@pytest.mark.parametrize("name", ["full", "snapkv", "acckv", "acckv_plus", "acckv corrected"])
def test_teacher_forcing_tells_what_greedy_decoding_says(
    train: ModuleType, tmp_path: Path, name: str
) -> None:
    """The model's own answer under a policy counts as right, and no other."""
    import forced

    train.write_settings(tmp_path / "model", train.Settings(layers=2, heads=2, kv_heads=2))
    maker = train.Maker(tmp_path / "model", 1, 0)
    model = train.Tiny(tmp_path / "model", maker, 0).eval()
    name, _, preset = name.partition(" ")
    policy = make_policy(name, preset=preset) if preset else make_policy(name)
    (question, *_) = forced.record(maker, model, 1, "dev")
    length = len(question.modality)
    text, said = model.thinker.model, [int(question.tokens[0])]
    with torch.inference_mode(), kv_policy(model.thinker, make_policy("recent", budget=1.0)):
        cache = forced._compressed(model, question, policy, None)
        for place in range(5):
            state = text(
                inputs_embeds=text.embed_tokens(torch.tensor([said[-1:]])),
                position_ids=question.positions[:, :, length + place : length + place + 1],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            said.append(int(model.thinker.lm_head(state)[0, -1].argmax()))
    mine = replace(question, tokens=torch.tensor(said))
    found, entries = forced.right(model, [mine], policy)
    assert found == [True]
    if name != "acckv":  # whose filter may drop more
        expected = length if name == "full" else policy.capacity(Layout(question.modality))
        assert entries == expected
    for place in range(1, 6):
        other = torch.tensor(said)
        other[place] ^= 1
        assert forced.right(model, [replace(mine, tokens=other)], policy)[0] == [False]


def test_an_oracle_sees_the_answer(train: ModuleType, tmp_path: Path) -> None:
    """Its scores are the attention of the answer's rows in the whole sequence."""
    import forced

    train.write_settings(tmp_path / "model", train.Settings(layers=2, heads=4, kv_heads=2))
    maker = train.Maker(tmp_path / "model", 1, 0)
    model = train.Tiny(tmp_path / "model", maker, 0).eval()
    for question in forced.record(maker, model, 1, "dev")[:2]:
        scores = forced.answered_rows(question, 1)
        prompt, answer = question.prompt[1], question.answer[1]
        key = torch.cat([prompt.key, answer.key], 1).repeat_interleave(2, 0)
        logits = answer.query @ key.transpose(1, 2) * key.shape[-1] ** -0.5
        rows, columns = logits.shape[1:]
        later = torch.ones(rows, columns).triu(columns - rows + 1).bool()
        attention = logits.masked_fill(later, -torch.inf).softmax(-1).sum(1)
        expected = attention.unflatten(0, (2, 2)).mean(1)[:, : prompt.key.shape[1]]
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
