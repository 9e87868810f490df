# SPDX-License-Identifier: Apache-2.0
"""AVicuna in vLLM against the same checkpoint in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from tests import tiny_avicuna
from tests.conftest import Media
from tests.engines import TWO_CORES, TWO_STAGES, Ask, Engine
from tests.native_models.serving import FrontEnd
from tests.own_models import (
    OwnModel,
    assert_like_transformers,
    layouts,
    path_of,
    with_policy,
)
from tests.test_engine_policies import NO_MEMORY, POLICIES
from tests.tiny_avicuna import AUDIO_TOKEN, VIDEO_TOKEN
from vllm_acckv.evaluation import media as decoding
from vllm_acckv.models.processing import AUDIO_TAG, VIDEO_TAG
from vllm_acckv.models.sound import clip_sound
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, token_modalities
from vllm_acckv.tools import clips

OPTIONS: dict[str, Any] = {
    "additional_config": {"kv_policy": "acckv"},
    "limit_mm_per_prompt": {"video": 4, "audio": 4},
}
WITH_SOUND, MUTE = "AVVV" * 25, "V" * 100


class AVicuna(OwnModel):
    def prepare(self, ask: Ask) -> dict[str, Any]:
        """Inputs of the model for a request; a clip's own sound only where no other is given."""
        key = repr(ask.messages)
        if key not in self._prepared:
            (message,) = ask.messages
            parts = [part for part in message["content"] if part["type"] != "text"]
            videos = [path_of(part) for part in parts if part["type"] == "video_url"]
            audio = [path_of(part) for part in parts if part["type"] == "audio_url"]
            text = self.processor.apply_chat_template(
                ask.messages, add_generation_prompt=True, tokenize=False
            )
            rate = self.processor.sampling_rate
            sounds = [decoding.sound(path, rate) for path in audio]
            if not audio:
                own = [clip_sound(path, rate) for path in videos]
                tags = iter(VIDEO_TAG + AUDIO_TAG * (sound is not None) for sound in own)
                text = re.sub(re.escape(VIDEO_TAG), lambda _: next(tags), text)
                sounds = [sound for sound in own if sound is not None]
            self._prepared[key] = self.processor(
                text=text,
                videos=[decoding.frames(path)[0] for path in videos],
                audio=sounds,
            )
        return self._prepared[key]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_avicuna.build(tmp_path_factory.mktemp("avicuna"))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Media]:
    """Clips of 48 kHz: resamplers differ in what is next to silent, which decibels tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "SAMPLE_RATE", 48_000)
        yield Media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine(checkpoint, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> AVicuna:
    return AVicuna(checkpoint)


@pytest.fixture(scope="module")
def front(checkpoint: Path) -> FrontEnd:
    return FrontEnd(checkpoint)


def requests(media: Media) -> dict[str, tuple[Ask, str]]:
    """Those of all models and a few more, with their picture and sound tokens."""
    mute, other = media.video(sound=False), media.video(seconds=2, seed=3, sound=False)
    expected = {
        "clip with sound": WITH_SOUND,
        "clip without sound": MUTE,
        "clip and recording": WITH_SOUND,
        "recording": "A",
        "two clips": WITH_SOUND + WITH_SOUND,
        "two clips, one mute": MUTE + WITH_SOUND,
        "short clip": WITH_SOUND,
    }
    asks = {name: (ask, expected[name]) for name, ask in layouts(media).items()}
    words = {"type": "text", "text": "And what is this?"}
    long = media.audio(seconds=23, seed=1)
    asks["clip, then recording"] = media.ask(mute, words, long), MUTE + " " + "A" * 6
    asks["two pairs"] = (
        media.ask(mute, media.audio(), words, other, long),
        f"{WITH_SOUND} {WITH_SOUND}",
    )
    asks["pair and recording"] = (
        media.ask(mute, media.audio(), words, media.audio(seed=2)),
        f"{WITH_SOUND} A",
    )
    return asks


def test_every_layout(engine: Engine, own: AVicuna, media: Media) -> None:
    asks = [with_policy(ask, "full") for ask, _ in requests(media).values()]
    trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own)
    assert len({tuple(answer.tokens) for answer in trace.answers}) == len(asks)


@pytest.mark.parametrize("layout", ["clip with sound", "two clips, one mute"])
def test_every_policy(engine: Engine, own: AVicuna, media: Media, layout: str) -> None:
    ask = layouts(media)[layout]
    asks = [
        with_policy(ask, name, **{"budget": 0.2, **options}) for name, options in POLICIES.values()
    ]
    trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own)
    freed = [min(one["freed_blocks"] for one in layers.values()) for layers in trace.kept.values()]
    assert len(freed) >= len(POLICIES) - len(NO_MEMORY) and all(freed)
    assert trace.free_before == trace.free_after


@pytest.mark.parametrize("scope", ["av", "total"])
def test_budgets_of_the_paper(engine: Engine, own: AVicuna, media: Media, scope: str) -> None:
    """Of the audio-video tokens, and of the whole cache.

    (Not LOOK-M: to which of the equal tokens of a sound it merges may be a matter of rounding.)
    """
    ask = layouts(media)["two clips"]
    asks = [
        with_policy(ask, policy, budget=budget, budget_scope=scope)
        for policy in ("acckv", "h2o", "snapkv")
        for budget in (0.2, 0.1, 160, 120)
    ]
    trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own)
    assert len(trace.kept) == len(asks)


def test_chunks(checkpoint: Path, own: AVicuna, media: Media) -> None:
    """Prompts in chunks of 64 tokens, which begin and end anywhere among pictures and sounds."""
    asks = [
        with_policy(ask, policy, budget=0.2)
        for ask in (layouts(media)["clip with sound"], layouts(media)["two clips, one mute"])
        for policy in ("full", "acckv", "h2o")
    ]
    with Engine(checkpoint, max_num_batched_tokens=64, **OPTIONS) as chunked:
        trace = chunked.run(*asks)
    assert_like_transformers(trace, asks, own)


@pytest.mark.parametrize("ranks", ["tensor", "pipeline"])
def test_two_ranks(checkpoint: Path, own: AVicuna, media: Media, ranks: str) -> None:
    asks = [
        with_policy(layouts(media)["clip with sound"], policy, budget=0.2)
        for policy in ("full", "acckv", "snapkv")
    ]
    how = {"tensor_parallel_size": 2} if ranks == "tensor" else TWO_STAGES
    with Engine(checkpoint, TWO_CORES, **OPTIONS, **how) as engine:
        trace = engine.run(*asks)
    assert_like_transformers(trace, asks, own, first_heads=True)


def test_lora(checkpoint: Path, media: Media, tmp_path: Path) -> None:
    """An adapter of the decoder, on top of those that were merged."""
    tiny_avicuna.write_lora(tmp_path / "adapter", 8, safetensors=True)
    ask = with_policy(layouts(media)["clip with sound"], "acckv", budget=0.2)
    adapted = replace(ask, lora=tmp_path / "adapter")
    with Engine(checkpoint, enable_lora=True, max_lora_rank=8, **OPTIONS) as engine:
        traces = [engine.run(one) for one in (adapted, ask)]
    own = AVicuna(checkpoint)
    assert_like_transformers(traces[1], [ask], own)
    own = AVicuna(checkpoint)
    own.model = peft.PeftModel.from_pretrained(own.model, tmp_path / "adapter").merge_and_unload()
    assert_like_transformers(traces[0], [adapted], own)


# Before the scheduler


def test_spans(front: FrontEnd, media: Media) -> None:
    """Sound tokens in front of every third picture, told apart by features and by tokens alike."""
    cases = requests(media)
    for seconds in (1, 120):
        cases[f"{seconds} s"] = media.ask(media.video(seconds=seconds)), WITH_SOUND
    for name, (ask, expected) in cases.items():
        request = front.request(ask)
        prompt = np.array(request.prompt_token_ids)
        by_feature = token_modalities(request.mm_features, len(prompt))
        found = "".join({TEXT: " ", VIDEO: "V", AUDIO: "A"}[code] for code in by_feature)
        assert re.sub(" +", " ", found).strip() == expected, name
        by_token = np.select([prompt == VIDEO_TOKEN, prompt == AUDIO_TOKEN], [VIDEO, AUDIO], TEXT)
        assert by_feature.tolist() == by_token.tolist()


def identifiers(front: FrontEnd, ask: Ask) -> list[str]:
    return [feature.identifier for feature in front.request(ask).mm_features]


def test_what_caches_tell_apart(front: FrontEnd, media: Media) -> None:
    """A clip alone and with a sound are other tokens, and so is a sound; other clips of the
    request make no difference."""
    mute, sound = media.video(sound=False), media.audio()
    pair = identifiers(front, media.ask(mute, sound))
    assert identifiers(front, media.ask(mute, sound)) == pair
    alone = identifiers(front, media.ask(mute)) + identifiers(front, media.ask(sound))
    assert not set(pair) & set(alone)
    words = {"type": "text", "text": "and"}
    both = identifiers(front, media.ask(mute, sound, words, media.audio(seed=1)))
    assert both[:2] == pair


def test_cached_items(front: FrontEnd, media: Media) -> None:
    """The second request finds one of its clips in the processor's cache, but not the other."""
    words = {"type": "text", "text": "and"}
    known, mute = media.video(seconds=5, seed=9, sound=False), media.video(seed=8, sound=False)
    sound = media.audio(seed=9)
    front.request(media.ask(known))
    prompt = front.request(media.ask(known, words, mute, sound)).prompt_token_ids
    letters = {VIDEO_TOKEN: "V", AUDIO_TOKEN: "A"}
    found = "".join(letters.get(token, " ") for token in prompt)
    assert re.sub(" +", " ", found).strip() == f"{MUTE} {WITH_SOUND}"


def test_75_frames_of_the_whole_clip(front: FrontEnd, media: Media, tmp_path: Path) -> None:
    """Each frame of the clip is one shade of grey."""
    shades = np.arange(120, dtype=np.uint8) * 2
    frames = np.broadcast_to(shades[:, None, None, None], (120, 64, 64, 3))
    path = clips.write_clip(tmp_path / "grey.mp4", np.ascontiguousarray(frames), fps=25)
    ask = media.ask({"type": "video_url", "video_url": {"url": path.as_uri()}})
    (feature,) = front.request(ask).mm_features
    pixels = feature.data["pixel_values_videos"].data
    assert tuple(pixels.shape) == (75, 3, 28, 28)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    found = (pixels.mean((2, 3)) * deviation + mean).mean(1) * 255 / 2
    expected = [place * 119 // 74 for place in range(75)]
    assert np.abs(found.numpy() - expected).max() < 0.8  # half a shade is lost in H.264


@pytest.mark.parametrize("question", ["What is <|video|>?", "<|audio|> and <|audio|>?"])
def test_tags_in_the_question_are_refused(front: FrontEnd, media: Media, question: str) -> None:
    with pytest.raises(ValueError, match="do not write <"):
        front.request(media.ask(media.video(), question=question))
