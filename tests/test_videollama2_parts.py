# SPDX-License-Identifier: Apache-2.0
"""Stages of VideoLLaMA2.1-7B-AV against independent implementations, fp32, random weights.

BEATs has a file of its own: :mod:`tests.test_beats`.
"""

from __future__ import annotations

import importlib.util
import site
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests import tiny_videollama2
from tests.conftest import Media, assert_stage
from tests.own_models import OwnModel, layouts
from tests.test_beats import openbeats, oracle_with  # noqa: F401
from vllm_acckv.models.beats import Beats
from vllm_acckv.models.videollama2.processing import (
    SAMPLING_RATE,
    fbank,
    kaldi_fbank,
    middle_frames,
    sampled_sound,
    thirty_seconds,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # openbeats uses old torch names


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_videollama2.build(tmp_path_factory.mktemp("videollama2") / "model")


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> OwnModel:
    return OwnModel(checkpoint)


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Weights whose names begin with ``prefix``, without it."""
    return {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }


def siglip(weights: dict[str, torch.Tensor]) -> SiglipVisionModel:
    """All layers of the vision tower, as the original makes it."""
    sizes = tiny_videollama2.CONFIG["vision_tower_config"]
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, patch_size=14, vision_use_head=False))
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower = {k: v for k, v in below(weights, prefix).items() if not k.startswith("head.")}
    model.load_state_dict(tower)
    return model.eval()


def connect(weights: dict[str, torch.Tensor], patches: torch.Tensor) -> torch.Tensor:
    """STC connector v35 of timm's stages: ``[T, patches, channels]`` to ``[tokens, hidden]``."""
    weights = below(weights, "model.mm_projector.")
    (frames, patch_count, channels), hidden = patches.shape, weights["readout.0.bias"].numel()
    side = round(patch_count**0.5)

    def stage(name: str, inputs: int) -> nn.Module:
        made = RegStage(
            depth=4,
            in_chs=inputs,
            out_chs=hidden,
            stride=1,
            dilation=1,
            act_layer=nn.SiLU,
            norm_layer=LayerNorm2d,
        )
        made.load_state_dict(below(weights, f"{name}."))
        return made.eval()

    x = stage("s1", channels)(patches.transpose(1, 2).reshape(frames, channels, side, side))
    kernel, bias = weights["sampler.0.weight"], weights["sampler.0.bias"]
    x = F.silu(F.conv3d(x.transpose(0, 1)[None], kernel, bias, stride=2))[0]
    x = stage("s2", hidden)(x.transpose(0, 1)).permute(0, 2, 3, 1).reshape(-1, hidden)
    return mlp(below(weights, "readout."), x)


def mlp(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    inner = F.gelu(F.linear(x, weights["0.weight"], weights["0.bias"]))
    return F.linear(inner, weights["2.weight"], weights["2.bias"])


def beats(module: ModuleType, weights: dict[str, torch.Tensor], own: OwnModel) -> nn.Module:
    config = own.model.config.audio_tower
    model = Beats(config)
    keys = below(weights, "model.audio_tower.")
    model.load_state_dict({k: v for k, v in keys.items() if not k.startswith("predictor.")})
    return oracle_with(module, model, config)


def assert_close(stage: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1  # something to be wrong about
    assert_stage(f"VideoLLaMA2, {stage}", found, expected)


@torch.inference_mode()
def test_every_stage(
    openbeats: ModuleType,  # noqa: F811
    weights: dict[str, torch.Tensor],
    own: OwnModel,
    media: Media,
) -> None:
    """Tower, connector, BEATs, projector and the logits of the first token."""
    inputs = own.prepare(layouts(media)["clip with sound"])
    model = own.model.model
    (pixels,), (features,) = inputs["pixel_values_videos"], inputs["input_features"]

    patches = siglip(weights)(pixels, output_hidden_states=True).hidden_states[-2]
    assert_close("SigLIP", model.vision_tower(pixels), patches)
    video = connect(weights, patches)
    assert_close("STC connector", model.embed_videos(pixels[None])[0], video)

    oracle = beats(openbeats, weights, own)
    heard = oracle.extract_features(features[None], skip_fbank_extraction=True)[0]
    assert_close("BEATs", model.audio_tower(features[None]), heard)
    audio = mlp(below(weights, "model.mm_projector_a."), heard[0])
    assert_close("audio projector", model.embed_audio(features[None])[0], audio)

    names = {*Qwen2Config().to_dict(), "rope_theta"} - {"model_type"}
    config = {k: v for k, v in tiny_videollama2.CONFIG.items() if k in names}
    decoder = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
    decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()})
    ids = inputs["input_ids"][0].tolist()
    start, end = ids.index(448), len(ids) - ids[::-1].index(449)
    assert end - start == len(video) + len(audio)
    embed = decoder.get_input_embeddings()
    text = [embed(torch.tensor(part)) for part in (ids[:start], ids[end:])]
    prompt = torch.cat([text[0], video, audio, text[1]])
    expected = decoder(inputs_embeds=prompt[None]).logits[0, -1]
    found = own.model(**inputs, logits_to_keep=1).logits[0, -1]
    assert_close("first logits", found, expected)


@pytest.fixture(scope="module")
def kaldi() -> Any:
    """torchaudio's filter bank, which is plain PyTorch, without the rest, which may not load."""
    (file,) = (
        path
        for folder in site.getsitepackages()
        if (path := Path(folder) / "torchaudio" / "compliance" / "kaldi.py").exists()
    )
    spec = importlib.util.spec_from_file_location("kaldi_of_torchaudio", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["noise", "tone", "silence"])
def test_filter_bank(kaldi: Any, kind: str) -> None:
    time = np.arange(5 * SAMPLING_RATE) / SAMPLING_RATE
    waveform = {
        "noise": np.random.default_rng(0).normal(0, 0.1, len(time)),
        "tone": 0.5 * np.sin(2 * np.pi * 440 * time),
        "silence": np.zeros(len(time)),
    }[kind].astype(np.float32)
    scaled = waveform * 2**15
    # fp64 for the tone: torchaudio's own rounding shows between its peaks.
    expected = kaldi.fbank(
        torch.from_numpy(scaled)[None].to(torch.float64 if kind == "tone" else torch.float32),
        num_mel_bins=128,
        sample_frequency=SAMPLING_RATE,
        frame_length=25,
        frame_shift=10,
    )
    features = torch.from_numpy(kaldi_fbank(scaled)).float()
    assert features.shape == expected.shape == (498, 128)
    # As the encoder sees it.
    assert_stage(f"filter bank of {kind}", features / (2 * 6.55582), expected / (2 * 6.55582))
    rounded = fbank(waveform)
    assert torch.equal(rounded, features.bfloat16().float())


def test_frames_are_those_of_the_original() -> None:
    """Printed by the reference's ``frame_sample`` for 16 frames."""
    assert middle_frames(100, 16).tolist() == [
        3, 9, 15, 22, 28, 34, 40, 46, 53, 59, 65, 71, 77, 84, 90, 96
    ]  # fmt: skip
    assert middle_frames(8, 16).tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 7]
    assert middle_frames(17, 16).tolist() == list(range(1, 17))
    assert middle_frames(1, 16).tolist() == [0] * 16


def test_pictures(own: OwnModel) -> None:
    """Resized by PIL whatever their shape, -1 to 1."""
    frames = np.random.default_rng(0).integers(0, 256, (16, 60, 84, 3), dtype=np.uint8)
    pixels = own.processor.videos_to_tensors([frames])["pixel_values_videos"][0]
    for frame, one in zip(frames, pixels, strict=True):
        resized = Image.fromarray(frame).resize((98, 98), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1
        assert (one - expected).abs().max() < 1e-6


def test_sound_of_clips() -> None:
    """Pieces of 2 s that begin at i / 8 of what is left of them, as in pytorchvideo 0.1.5."""
    sound = np.arange(18 * SAMPLING_RATE, dtype=np.float32)
    pieces = sampled_sound(sound).reshape(8, 2 * SAMPLING_RATE)
    assert (pieces[:, 0] / SAMPLING_RATE).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert np.array_equal(pieces - pieces[:, :1], np.tile(sound[: 2 * SAMPLING_RATE], (8, 1)))
    starts = sampled_sound(sound[: 6 * SAMPLING_RATE])[:: 2 * SAMPLING_RATE]
    assert (starts / SAMPLING_RATE).tolist() == [
        0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5
    ]  # fmt: skip
    short = sound[:SAMPLING_RATE]  # one second, eight times
    assert np.array_equal(sampled_sound(short), np.tile(short, 8))


def test_thirty_seconds() -> None:
    sound = np.ones(31 * SAMPLING_RATE, np.float32)
    sound[30 * SAMPLING_RATE :] = 2
    assert np.array_equal(thirty_seconds(sound), np.ones(30 * SAMPLING_RATE))
    padded = thirty_seconds(sound[:SAMPLING_RATE])
    assert padded.sum() == SAMPLING_RATE and len(padded) == 30 * SAMPLING_RATE
    with pytest.raises(ValueError, match="one channel"):
        thirty_seconds(np.ones((2, 100)))
