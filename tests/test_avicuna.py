# SPDX-License-Identifier: Apache-2.0
"""AVicuna in transformers: prompts, and each stage against an independent computation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torchvision import transforms
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel, CLIPModel

from tests import tiny_avicuna
from tests.conftest import assert_stage
from tests.tiny_avicuna import AUDIO_TOKEN, VIDEO_TOKEN
from vllm_acckv.hf import kv_policy
from vllm_acckv.models.avicuna.config import AVicunaConfig
from vllm_acckv.models.avicuna.modeling import AVicunaForCausalLM
from vllm_acckv.models.avicuna.processing import AVicunaProcessor, sound_windows

RATE = 48_000
PROMPT = "A chat. USER: {}\n What happens? ASSISTANT:"
# Written out, not computed: the original's insert_freq is round(75 / 26) = 3.
CLIP_WITH_SOUND = "AVVV" * 25
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of a tiny model, and ``model``."""
    folder = tmp_path_factory.mktemp("avicuna")
    tiny_avicuna.build(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> AVicunaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return AVicunaProcessor(tokenizer, AVicunaConfig.from_pretrained(folder / "model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> AVicunaForCausalLM:
    return AVicunaForCausalLM.from_pretrained(folder / "model").eval()


def frames(count: int = 90, seed: int = 0) -> np.ndarray:
    """uint8 ``[count, 48, 64, 3]``."""
    shape = (count, 48, 64, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sound(seconds: float = 13, seed: int = 0) -> np.ndarray:
    """float32 ``[samples]``, some of it too loud, all of it different."""
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (0.3 * samples * np.linspace(0, 2, len(samples))).astype(np.float32)


def kinds(inputs: Any) -> str:
    """V and A of a prompt, a space for each piece of text."""
    letters = {VIDEO_TOKEN: "V", AUDIO_TOKEN: "A"}
    tokens = "".join(letters.get(token, ".") for token in inputs["input_ids"][0].tolist())
    return re.sub(r"\.+", " ", tokens).strip()


# Prompts


@pytest.mark.parametrize(
    ("seconds", "count"),
    [
        (0.5, 1),
        (1, 1),
        (9.9, 1),
        (10, 1),
        (11, 1),
        (11.1, 3),
        (20, 3),
        (21, 3),
        (30, 6),
        (106, 26),
        (120, 28),
    ],
)
def test_windows_of_a_sound(seconds: float, count: int) -> None:
    """Ten seconds every four; up to a second at the end is dropped, more is filled up."""
    waveform = sound(seconds)
    windows = sound_windows(waveform)
    assert windows.shape == (count, 10 * RATE)
    for number, window in enumerate(windows):
        expected = np.zeros(10 * RATE)
        part = waveform[number * 4 * RATE :][: 10 * RATE].astype(float).clip(-1, 1)
        expected[: len(part)] = np.trunc(part * 32767) / 32767
        assert np.abs(window - expected).max() < 4e-5  # a step of 16 bits where rounding decides
        assert np.abs(window - expected).mean() < 1e-7


@pytest.mark.parametrize("waveform", [np.zeros((2, RATE)), np.zeros(0)])
def test_no_windows(waveform: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected one channel"):
        sound_windows(waveform)


@pytest.mark.parametrize(
    ("tags", "clips", "seconds", "expected"),
    [
        ("<|video|><|audio|>", 1, [13], CLIP_WITH_SOUND),
        ("<|video|><|audio|>", 1, [1], CLIP_WITH_SOUND),
        ("<|video|><|audio|>", 1, [120], CLIP_WITH_SOUND),
        ("<|video|>", 1, [], "V" * 100),
        ("<|audio|>", 0, [13], "AAA"),
        ("<|audio|>", 0, [120], "A" * 28),
        (
            "<|video|><|audio|> and <|video|><|audio|>",
            2,
            [13, 30],
            f"{CLIP_WITH_SOUND} {CLIP_WITH_SOUND}",
        ),
        ("<|video|><|audio|><|video|>", 2, [13], CLIP_WITH_SOUND + "V" * 100),
        ("<|video|><|video|><|audio|>", 2, [13], "V" * 100 + CLIP_WITH_SOUND),
        ("<|video|> and <|audio|>", 1, [30], "V" * 100 + " " + "A" * 6),
        ("<|audio|><|video|>", 1, [13], "AAA" + "V" * 100),
        ("<|audio|><|audio|>", 0, [13, 1], "AAAA"),
    ],
)
def test_layouts(
    processor: AVicunaProcessor,
    model: AVicunaForCausalLM,
    tags: str,
    clips: int,
    seconds: list[float],
    expected: str,
) -> None:
    text = PROMPT.format(tags)
    videos = [frames(seed=seed) for seed in range(clips)]
    audio = [sound(length, seed) for seed, length in enumerate(seconds)]
    inputs = processor(text=text, videos=videos, audio=audio)
    assert kinds(inputs) == expected
    assert torch.isfinite(model(**inputs).logits).all()  # tokens and embeddings are as many


def test_sound_of_clips_without_tags(processor: AVicunaProcessor) -> None:
    """transformers' ``use_audio_in_video``."""
    media = {"videos": [frames()], "audio": [sound()]}
    one = processor(text=PROMPT.format("<|video|>"), use_audio_in_video=True, **media)
    other = processor(text=PROMPT.format("<|video|><|audio|>"), **media)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("tags", "videos", "message"),
    [
        ("<|video|>", 2, "1 <|video|> tags for 2"),
        ("<|video|><|audio|>", 1, "1 <|audio|> tags for 0"),
    ],
)
def test_tags_without_media(
    processor: AVicunaProcessor, tags: str, videos: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=PROMPT.format(tags), videos=[frames()] * videos)


def test_prompt_of_other_media(processor: AVicunaProcessor, model: AVicunaForCausalLM) -> None:
    inputs = processor(text=PROMPT.format("<|video|>"), videos=[frames()])
    first = inputs["input_ids"][0].tolist().index(VIDEO_TOKEN)
    with pytest.raises(ValueError, match="99 tokens 448 for media of 100"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, first + 1 :]})


def test_chat(processor: AVicunaProcessor) -> None:
    """vicuna_v1 of the original's conversation.py, and of inference.py "<|video|>\\n " + query."""

    def said(role: str, *parts: str) -> dict[str, Any]:
        content = [
            {"type": part} if part in ("video", "audio") else {"type": "text", "text": part}
            for part in parts
        ]
        return {"role": role, "content": content}

    messages = [
        said("user", "video", "audio", "What happens?"),
        said("assistant", "A cat barks."),
        {"role": "user", "content": "When?"},
    ]
    chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == (
        f"<s>{SYSTEM} USER: <|video|><|audio|>\n What happens? ASSISTANT: A cat barks.</s>"
        "USER: When? ASSISTANT:"
    )
    other = [{"role": "system", "content": "Be brief."}, said("user", "audio", "Who?")]
    chat = processor.apply_chat_template(other, add_generation_prompt=False, tokenize=False)
    assert chat == "<s>Be brief. USER: <|audio|>\n Who? "


def test_text_around_tags_is_tokenized_apart(folder: Path, processor: AVicunaProcessor) -> None:
    """As the original does with SentencePiece: BOS once, a space in front of each piece."""
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "vicuna" / "tokenizer.model"))
    head, tail = PROMPT.split("{}")
    expected = [1, *pieces.encode(head), *[VIDEO_TOKEN] * 100, *pieces.encode(tail)]
    for start in ("", "<s>"):
        text = start + PROMPT.format("<|video|>")
        inputs = processor(text=text, videos=[frames()])
        assert inputs["input_ids"][0].tolist() == expected
        assert inputs["attention_mask"].tolist() == [[1] * len(expected)]
    assert pieces.get_piece_size() == VIDEO_TOKEN == tiny_avicuna.VOCABULARY


def test_ratios() -> None:
    assert AVicunaConfig().insert_freq == 3
    assert AVicunaConfig().audio_places == list(range(0, 100, 4))
    config = AVicunaConfig(audio_ratio=0.1)
    assert (config.num_frames, config.num_audio_tokens, config.insert_freq) == (90, 10, 8)
    assert config.audio_places == list(range(0, 90, 9))
    for ratio in (0.0, 0.39, 1.0):
        with pytest.raises(ValueError, match=f"audio_ratio {ratio} of num_mm_tokens 100"):
            AVicunaConfig(audio_ratio=ratio)


# Stages


@pytest.mark.parametrize("size", [(30, 40), (72, 50), (28, 28), (301, 200)])
def test_frames_and_pixels(processor: AVicunaProcessor, size: tuple[int, int]) -> None:
    """75 frames from the first to the last, some twice in a short clip; by torchvision alone."""
    prepare = transforms.Compose(
        [
            transforms.Resize(28, transforms.InterpolationMode.BICUBIC, antialias=False),
            transforms.CenterCrop(28),
            transforms.Normalize(
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            ),
        ]
    )
    for count, picked in ((90, [0, 1, 2, 3, 4, 6]), (149, [0, 2, 4]), (5, [0] * 19 + [1])):
        clip = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
        pixels = processor(videos=[clip])["pixel_values_videos"]
        assert pixels.shape == (1, 75, 3, 28, 28)
        for place, index in [*enumerate(picked), (74, count - 1)]:
            expected = prepare(torch.from_numpy(clip[index]).movedim(-1, 0) / 255.0)
            assert (pixels[0, place] - expected).abs().max() < 1e-5


def clip_vectors(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """``[frames, 40]`` by transformers' whole CLIP."""
    clip = CLIPModel.from_pretrained(folder / "clip").eval()
    return clip.get_image_features(pixel_values=pixels).pooler_output


def clap_vectors(folder: Path, waveform: np.ndarray) -> torch.Tensor:
    """``[windows, 24]`` by transformers' own extractor and whole CLAP."""
    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14_000)
    inputs = extractor(list(sound_windows(waveform)), sampling_rate=RATE, return_tensors="pt")
    clap = ClapModel.from_pretrained(folder / "clap").eval()
    shorter = torch.zeros_like(inputs["is_longer"])
    mel = inputs["input_features"].float()
    return clap.get_audio_features(input_features=mel, is_longer=shorter).pooler_output


@torch.inference_mode()
def test_towers_and_projectors(
    folder: Path, processor: AVicunaProcessor, model: AVicunaForCausalLM
) -> None:
    clip, waveform = frames(), sound(30)
    inputs = processor(videos=[clip], audio=[waveform], sounds_of_clips=[False])
    seen = clip_vectors(folder, inputs["pixel_values_videos"][0])
    heard = clap_vectors(folder, waveform)
    assert heard.shape == (6, 24)
    for vectors in (seen, heard):
        assert vectors.std(0).min() > 1e-3  # inputs matter
    media = model.media
    one_by_one = media.clip(pixel_values=inputs["pixel_values_videos"][0]).image_embeds
    assert_stage("AVicuna, CLIP", one_by_one, seen)
    for vectors, file, tokens in (
        (seen, "mm_projector", media.embed_videos(inputs["pixel_values_videos"], [True])),
        (heard, "mm_projector_a", media.embed_audio(inputs["input_features"], [6], [False])),
    ):
        trained = torch.load(folder / f"{file}.bin", weights_only=True)
        projected = vectors @ trained[f"model.{file}.weight"].T + trained[f"model.{file}.bias"]
        assert_stage(f"AVicuna, {file}", tokens[0], projected)


@torch.inference_mode()
def test_sounds_are_repeated_in_order(model: AVicunaForCausalLM) -> None:
    mel = torch.randn(37, 1, 1001, 64, generator=torch.Generator().manual_seed(0)) * 10 - 30
    parts = [3, 30, 4]
    alone = model.media.embed_audio(mel, parts, [False] * 3)
    assert [len(part) for part in alone] == parts
    short, long, other = model.media.embed_audio(mel, parts, [True, True, False])
    assert torch.equal(short, alone[0][[0] * 9 + [1] * 8 + [2] * 8])
    assert torch.equal(long, alone[1][:25])
    assert torch.equal(other, alone[2])


@torch.inference_mode()
def test_clip_without_sound(processor: AVicunaProcessor, model: AVicunaForCausalLM) -> None:
    """The original trains with zero vectors where sound would be; projected, they are the bias."""
    pixels = processor(videos=[frames()])["pixel_values_videos"]
    (whole,), (seen,) = (model.media.embed_videos(pixels, [sounding]) for sounding in (False, True))
    silence = list(range(0, 100, 4))
    assert torch.equal(whole[silence], model.media.mm_projector_a.bias.expand(25, -1))
    assert torch.equal(whole[[place for place in range(100) if place % 4]], seen)


def test_nothing_is_random(processor: AVicunaProcessor, model: AVicunaForCausalLM) -> None:
    """transformers' extractor takes a random window for one longer than ten seconds."""
    text, media = PROMPT.format("<|video|><|audio|>"), {"videos": [frames()], "audio": [sound(50)]}
    logits = []
    for seed in range(3):
        np.random.seed(seed)
        logits.append(model(**processor(text=text, **media)).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


# The whole


@torch.inference_mode()
def test_first_logits(folder: Path, processor: AVicunaProcessor, model: AVicunaForCausalLM) -> None:
    """From the files' tensors alone, without transformers' Llama or this package's classes."""
    inputs = processor(text=PROMPT.format("<|video|><|audio|>"), videos=[frames()], audio=[sound()])
    weights: dict[str, torch.Tensor] = {}
    for file in (folder / "model").glob("*.safetensors"):
        weights |= {name: weight.double() for name, weight in load_file(file).items()}
    ids = inputs["input_ids"][0]
    rows = weights["model.embed_tokens.weight"][ids]
    pixels = inputs["pixel_values_videos"][0]
    seen = iter(projected(weights, "mm_projector", clip_vectors(folder, pixels)))
    heard = projected(weights, "mm_projector_a", clap_vectors(folder, sound()))
    order = iter([0] * 9 + [1] * 8 + [2] * 8)
    for place, token in enumerate(ids.tolist()):
        if token == VIDEO_TOKEN:
            rows[place] = next(seen)
        elif token == AUDIO_TOKEN:
            rows[place] = heard[next(order)]
    expected = llama(weights, rows)
    assert next(seen, None) is None and next(order, None) is None
    found = model(**inputs).logits[0]
    assert expected.std() > 1
    assert_stage("AVicuna, logits", found, expected)


def projected(weights: dict[str, torch.Tensor], name: str, vectors: torch.Tensor) -> torch.Tensor:
    return vectors.double() @ weights[f"media.{name}.weight"].T + weights[f"media.{name}.bias"]


def llama(weights: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """fp64 logits ``[l, vocabulary]`` of embeddings ``[l, 256]``: 4 layers, 4 heads of 64."""
    length, future = len(rows), torch.full((len(rows),) * 2, -torch.inf).triu(1)
    frequencies = 10_000 ** -(torch.arange(0, 64, 2).double() / 64)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(length, 4, 64).transpose(0, 1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        y = torch.complex(*heads(x).contiguous().split(32, -1)) * turn
        return torch.cat([y.real, y.imag], -1)

    for layer in range(4):
        name = f"model.layers.{layer}"
        x = norm(rows, f"{name}.input_layernorm")
        q, k, v = (x @ weights[f"{name}.self_attn.{part}_proj.weight"].T for part in "qkv")
        attention = (rotated(q) @ rotated(k).mT / 8 + future).softmax(-1) @ heads(v)
        joined = attention.transpose(0, 1).reshape(length, -1)
        rows = rows + joined @ weights[f"{name}.self_attn.o_proj.weight"].T
        x = norm(rows, f"{name}.post_attention_layernorm")
        gate, up = (x @ weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        rows = rows + (gate * gate.sigmoid() * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    return norm(rows, "model.norm") @ weights["lm_head.weight"].T


@torch.inference_mode()
def test_policies(processor: AVicunaProcessor, model: AVicunaForCausalLM) -> None:
    """``generate`` under a policy, which tells modalities by the configuration's token ids."""
    text = PROMPT.format("<|video|><|audio|>")
    inputs = processor(text=text, videos=[frames()], audio=[sound()])
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    full = model.generate(**inputs, **greedy)
    with kv_policy(model, "full"):
        assert torch.equal(model.generate(**inputs, **greedy), full)
    text_tokens = inputs["input_ids"].shape[1] - 100
    with kv_policy(model, "acckv", budget=0.2, tau=-1, strict_budget="entries") as run:
        assert not torch.equal(model.generate(**inputs, **greedy), full)
    assert {layer.length for layer in run.layers} == {text_tokens + 20}
    for policy, gone in (("drop_audio", AUDIO_TOKEN), ("drop_video", VIDEO_TOKEN)):
        with kv_policy(model, policy, budget=0.75 if gone == AUDIO_TOKEN else 0.25) as run:
            model.generate(**inputs, **greedy)
        kept = inputs["input_ids"][0][run.layers[0].positions[0]].tolist()
        others = {VIDEO_TOKEN, AUDIO_TOKEN} - {gone}
        assert gone not in kept and others <= set(kept)


def test_clap_stays_in_full_precision(folder: Path) -> None:
    half = AVicunaForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    assert half.media.clap.dtype == torch.float32
    assert {half.media.clip.dtype, half.model.dtype, half.lm_head.weight.dtype} == {torch.bfloat16}
