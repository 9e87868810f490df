# SPDX-License-Identifier: Apache-2.0
"""Prompts of VideoLLaMA2.1-7B-AV at full size: how many tokens, of which modality, in which order.

From a request's files through vLLM to its scheduler; the model itself is not made.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.parse import MultiModalDataItems, VideoProcessorItems

from tests import tiny_videollama2
from tests.conftest import QUESTION, Media
from tests.engines import Ask
from tests.native_models.serving import FrontEnd
from vllm_acckv.models.videollama2.config import VideoLLaMA2Config
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, token_modalities
from vllm_acckv.tools import clips

VIDEO_TOKENS, AUDIO_TOKENS = 1352, 1496


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> FrontEnd:
    """The published sizes; tokenizer and decoder are tiny."""
    checkpoint = tiny_videollama2.build(tmp_path_factory.mktemp("videollama2") / "model")
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for name in ("vision_tower_config", "audio_tower_config", "mm_hidden_size", "mm_hidden_size_a"):
        del config[name]
    path.write_text(json.dumps(config))
    return FrontEnd(checkpoint)


def spans(front: FrontEnd, ask: Ask) -> list[tuple[int, int]]:
    """Modality and length of what follows each other in the prompt; by tokens and by features."""
    request = front.request(ask)
    prompt = np.array(request.prompt_token_ids)
    by_token = np.select([prompt == 448, prompt == 449], [VIDEO, AUDIO], TEXT)
    by_feature = token_modalities(request.mm_features, len(prompt))
    assert by_feature.tolist() == by_token.tolist()
    return [(code, len(list(run))) for code, run in groupby(by_token.tolist())]


def without_text(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(code, length) for code, length in found if code != TEXT]


@pytest.mark.parametrize("seconds", [1, 4, 120])
def test_clip_with_sound(front: FrontEnd, media: Media, seconds: int) -> None:
    found = spans(front, media.ask(media.video(seconds=seconds)))
    assert [code for code, _ in found] == [TEXT, VIDEO, AUDIO, TEXT]
    assert without_text(found) == [(VIDEO, VIDEO_TOKENS), (AUDIO, AUDIO_TOKENS)]


def test_layouts(front: FrontEnd, media: Media) -> None:
    mute, clip, sound = media.video(sound=False), media.video(), media.audio()
    video, audio = (VIDEO, VIDEO_TOKENS), (AUDIO, AUDIO_TOKENS)
    assert without_text(spans(front, media.ask(mute))) == [video]
    assert without_text(spans(front, media.ask(sound))) == [audio]
    assert without_text(spans(front, media.ask(mute, sound))) == [video, audio]
    both = (VIDEO, 2 * VIDEO_TOKENS)
    assert without_text(spans(front, media.ask(mute, media.video(seed=1, sound=False)))) == [both]
    two = [video, audio, video, audio]
    assert without_text(spans(front, media.ask(clip, media.video(seed=1)))) == two
    assert without_text(spans(front, media.ask(mute, clip))) == [both, audio]
    assert without_text(spans(front, media.ask(clip, mute))) == [video, audio, video]
    # A part of its own: the clip's sound would be there twice.
    assert without_text(spans(front, media.ask(clip, sound))) == [video, audio]
    # The chat parser of vLLM brings the sound; the setting keeps its meaning.
    assert without_text(spans(front, media.ask(clip, audio_in_video=True))) == [video, audio]


def test_prompt_is_the_original_text(front: FrontEnd, media: Media) -> None:
    """One tag, a line break, the question; in Qwen2's ChatML with its system prompt."""
    request = front.request(media.ask(media.video()))
    tokenizer = front.renderer.mm_processor.info.get_tokenizer()
    ids = [one for one in request.prompt_token_ids if one not in (448, 449)]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n\n{QUESTION}<|im_end|>\n"
    )
    # Text behind the tag is tokenized on its own, as the original does.
    after = tokenizer.encode(f"\n{QUESTION}<|im_end|>\n")
    assert request.prompt_token_ids[-len(after) :] == after


def features(front: FrontEnd, ask: Ask) -> dict[str, Any]:
    return {
        name: value.data
        for feature in front.request(ask).mm_features
        for name, value in feature.data.items()
    }


def test_sixteen_frames_of_the_whole_clip(front: FrontEnd, media: Media, tmp_path: Path) -> None:
    """Each frame of the clip is one shade of grey."""
    shades = np.arange(100, dtype=np.uint8) * 2
    frames = np.broadcast_to(shades[:, None, None, None], (100, 64, 64, 3))
    path = clips.write_clip(tmp_path / "grey.mp4", np.ascontiguousarray(frames), fps=25)
    ask = media.ask({"type": "video_url", "video_url": {"url": path.as_uri()}})
    pixels = features(front, ask)["pixel_values_videos"]
    assert tuple(pixels.shape) == (16, 3, 384, 384)
    found = (pixels.float().mean((1, 2, 3)) + 1) * 127.5 / 2
    expected = [3, 9, 15, 22, 28, 34, 40, 46, 53, 59, 65, 71, 77, 84, 90, 96]
    assert np.abs(found.numpy() - expected).max() < 0.6  # half a shade is lost in H.264


def test_sound_of_clips_and_recordings(front: FrontEnd, media: Media) -> None:
    """A clip's sound is sampled, a recording's first 30 s are taken; files of any rate."""
    soundtrack = features(front, media.ask(media.video(seconds=40)))["input_features"]
    recording = features(front, media.ask(media.audio(seconds=40)))["input_features"]
    assert soundtrack.shape == recording.shape == (2998, 128)
    # 16 s of sound, then silence. (bf16 knows -15.94 as -15.94.)
    silent = (soundtrack < -15).all(1)
    assert not silent[:1590].any() and silent[1605:].all()
    assert not (recording < -15).all(1).any()


def test_settings_of_requests(front: FrontEnd, media: Media) -> None:
    """``use_audio_in_video`` of the server: false, and true for a clip without sound."""
    config = front.config.model_config.get_multimodal_config()
    video, audio = (VIDEO, VIDEO_TOKENS), (AUDIO, AUDIO_TOKENS)
    try:
        config.mm_processor_kwargs = {"use_audio_in_video": False}
        assert without_text(spans(front, media.ask(media.video()))) == [video]
        config.mm_processor_kwargs = {"use_audio_in_video": True}
        assert without_text(spans(front, media.ask(media.video(sound=False)))) == [video, audio]
        asks = media.ask(media.video(), media.audio()), media.ask(media.video())
        given, of_clip = (front.request(one).mm_features[1].identifier for one in asks)
        assert given != of_clip  # what a client sends is heard
        with pytest.raises(ValueError, match="one sound for every clip"):
            front.request(media.ask(media.video(), media.audio(), media.audio(seed=1)))
    finally:
        config.mm_processor_kwargs = None


@pytest.mark.parametrize("question", ["What is <|video|>?", "And <|audio|>?", "<|audio|><|audio|>"])
def test_tags_in_the_question_are_refused(front: FrontEnd, media: Media, question: str) -> None:
    with pytest.raises(ValueError, match="do not write <"):
        front.request(media.ask(media.video(), question=question))


def test_tags_are_text_where_there_are_no_media(front: FrontEnd, media: Media) -> None:
    """And other models' tags always are."""
    assert spans(front, media.text("What is <|video|>?"))[0][0] == TEXT
    assert without_text(spans(front, media.text("What is <|video|>?"))) == []
    found = spans(front, media.ask(media.video(), question="What is <video>, what <audio>?"))
    assert without_text(found) == [(VIDEO, VIDEO_TOKENS), (AUDIO, AUDIO_TOKENS)]


def test_the_sound_of_a_clip_does_not_change_its_pictures(front: FrontEnd, media: Media) -> None:
    """So the encoder and prefix caches know them again."""
    config = front.config.model_config.get_multimodal_config()
    with_sound = front.request(media.ask(media.video())).mm_features
    try:
        config.mm_processor_kwargs = {"use_audio_in_video": False}
        (pictures,) = front.request(media.ask(media.video())).mm_features
    finally:
        config.mm_processor_kwargs = None
    assert pictures.identifier == with_sound[0].identifier


def offline(front: FrontEnd, **media: Any) -> Any:
    processor = front.renderer.get_mm_processor()
    items = processor.info.parse_mm_data(media)
    return processor("<|video|><|audio|>"[: 18 if "audio" in media else 9], items)


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ({"video": np.zeros((4, 64, 64, 1), np.uint8)}, r"A clip is uint8 \[4, 64, 64, 1\]"),
        ({"video": np.ones((4, 64, 64, 3))}, r"A clip is float64 \[4, 64, 64, 3\]"),
        ({"audio": (np.full(16_000, np.nan), 16_000)}, r"A sound is float64 \[16000\]; expected"),
        ({"audio": (np.ones(16_000, np.int16), 16_000)}, r"A sound is int16 \[16000\]; expected"),
        ({"audio": (np.ones(0), 16_000)}, r"A sound is float64 \[0\]; expected"),
    ],
)
def test_media_that_cannot_be_right(front: FrontEnd, media: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        offline(front, **media)


def test_pictures_of_any_mode(front: FrontEnd) -> None:
    pictures = [Image.new(mode, (64, 48)) for mode in ("RGBA", "L", "RGB")]
    found = front.renderer.get_mm_processor().info.processor(videos=[pictures])
    assert found["pixel_values_videos"].shape == (1, 16, 3, 384, 384)


def test_a_clip_named_by_its_uuid(front: FrontEnd) -> None:
    with pytest.raises(ValueError, match="named by its uuid only brings no sound; send the clip"):
        front.renderer.get_mm_processor()._sound_of_clips(
            MultiModalDataItems({"video": VideoProcessorItems([None])}), silence=False
        )


def test_profiling_does_not_ask_for_sound(front: FrontEnd) -> None:
    config = front.config.model_config.get_multimodal_config()
    try:
        config.mm_processor_kwargs = {"use_audio_in_video": True}
        found = front.renderer.get_mm_processor().get_dummy_mm_inputs({"video": 1, "audio": 0})
    finally:
        config.mm_processor_kwargs = None
    assert found["prompt_token_ids"].count(448) == VIDEO_TOKENS


def test_other_numbers_of_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="num_frames is 8; only 16"):
        VideoLLaMA2Config(num_frames=8)


def test_equal_clips_are_processed_once(front: FrontEnd, media: Media) -> None:
    """And so share blocks of the prefix cache; not with the same clip without its sound."""
    first, second = (
        [feature.identifier for feature in front.request(media.ask(media.video())).mm_features]
        for _ in range(2)
    )
    assert first == second
    (other,) = front.request(media.ask(media.video(sound=False))).mm_features
    assert other.identifier not in first
