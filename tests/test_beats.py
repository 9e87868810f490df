# SPDX-License-Identifier: Apache-2.0
"""BEATs against openbeats, ESPnet's copy of the authors' code, with random weights.

openbeats names its parameters as the published checkpoint does, so weights go there as they are.
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_acckv.models.beats import CHECKPOINT_KEYS, Beats, BeatsConfig, offset_buckets

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # openbeats uses old torch names

CLIP = 2998  # frames of VideoLLaMA2's 30 s
TINY = BeatsConfig(
    hidden_size=64,
    num_heads=4,
    intermediate_size=96,
    patch_channels=48,
    conv_positions=32,
    conv_groups=4,
    num_buckets=32,
    max_distance=100,
)
WIDE = BeatsConfig(num_layers=2)


@pytest.fixture(scope="module")
def openbeats() -> ModuleType:
    """The oracle, without what it does not need here.

    It starts from the filter bank, so torchaudio, which CPU installations cannot load, need only
    seem to be there. What it takes from transformers is optional and slow to import.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, "transformers.models.bart.modeling_bart", None)
        from openbeats import beats_encoder
    return beats_encoder


def random_beats(config: BeatsConfig) -> Beats:
    """Every parameter random, at sizes that let all of them matter."""
    model = Beats(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.2
        elif "norm" in name or "weight_g" in name or "grep_a" in name:
            noise = 1 + 0.3 * noise
        elif "relative_attention_bias" not in name:
            noise *= parameter[0].numel() ** -0.5
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            noise *= 2  # far from uniform attention
        parameter.data.copy_(noise)
    return model.eval()


def fbank(frames: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 15 + 6 * torch.randn(batch, frames, 128, generator=generator)


def oracle_with(openbeats: ModuleType, model: Beats, config: BeatsConfig) -> nn.Module:
    oracle = openbeats.BeatsEncoder(
        input_size=0,
        beats_config={
            "input_patch_size": config.patch_size,
            "embed_dim": config.patch_channels,
            "encoder_layers": config.num_layers,
            "encoder_embed_dim": config.hidden_size,
            "encoder_ffn_embed_dim": config.intermediate_size,
            "encoder_attention_heads": config.num_heads,
            "conv_pos": config.conv_positions,
            "conv_pos_groups": config.conv_groups,
            "num_buckets": config.num_buckets,
            "max_distance": config.max_distance,
            "deep_norm": True,
            "relative_position_embedding": True,
            "gru_rel_pos": True,
        },
    )
    keys = oracle.load_state_dict(model.state_dict(), strict=False)
    assert not keys.unexpected_keys
    # Its own two are for padding masks; the rest are layer 0's table under other names.
    assert set(keys.missing_keys) == {"patch_embedding_pad.weight", "raw2fbank_pad.weight"} | {
        f"encoder.layers.{layer}.self_attn.relative_attention_bias.weight"
        for layer in range(1, config.num_layers)
    }
    return oracle.eval()


def stages(config: BeatsConfig) -> list[str]:
    layers = [f"encoder.layers.{layer}" for layer in range(config.num_layers)]
    parts = [f"{layer}.{part}" for layer in layers for part in ("self_attn", "fc2")]
    before = ["patch_embedding", "post_extract_proj", "encoder.pos_conv", "encoder.layer_norm"]
    return [*before, *parts, *layers]


def record(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Outputs of the modules named, filled by the next call."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    for name in names:
        model.get_submodule(name).register_forward_hook(partial(keep, name))
    return outputs


@torch.inference_mode()
@pytest.mark.parametrize(
    ("config", "frames"),
    [
        (TINY, 16),
        (TINY, 100),
        (TINY, 1007),
        (WIDE, 37),
        (WIDE, 500),
        (WIDE, CLIP),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{value.num_layers}-layers",
)
def test_equals_openbeats_at_every_stage(
    openbeats: ModuleType, config: BeatsConfig, frames: int
) -> None:
    model = random_beats(config)
    oracle = oracle_with(openbeats, model, config)
    names = stages(config)
    ours, theirs = record(model, names), record(oracle, names)
    audio = fbank(frames, batch=1 if frames == CLIP else 2)

    output = model(audio)
    expected = oracle.extract_features(audio, skip_fbank_extraction=True)[0]

    assert output.shape == (len(audio), config.num_tokens(frames), config.hidden_size)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
    for name in names:
        one, other = ours[name], theirs[name]
        if name.startswith("encoder.layers."):  # openbeats has tokens first there
            other = other.transpose(0, 1)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_buckets_are_those_of_openbeats(openbeats: ModuleType) -> None:
    attention = openbeats.MultiheadAttention(
        8, 2, has_relative_attention_bias=True, num_buckets=320, max_distance=800
    )
    tokens = BeatsConfig().num_tokens(CLIP)
    offsets = torch.arange(1 - tokens, tokens)
    assert torch.equal(
        offset_buckets(tokens, 320, 800), attention._relative_positions_bucket(offsets)
    )


def test_parameters_are_the_published_ones() -> None:
    """Names and shapes read from VideoLLaMA2's videollama2/model/beats."""
    hidden, inner = (768, 768), 3072
    expected: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (512, 1, 16, 16),
        "layer_norm.weight": (512,),
        "layer_norm.bias": (512,),
        "post_extract_proj.weight": (768, 512),
        "post_extract_proj.bias": (768,),
        "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (768, 48, 128),
        "encoder.pos_conv.0.bias": (768,),
        "encoder.layer_norm.weight": (768,),
        "encoder.layer_norm.bias": (768,),
        "encoder.layers.0.self_attn.relative_attention_bias.weight": (320, 12),
    }
    for layer in range(12):
        prefix = f"encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected[f"{prefix}.self_attn.{projection}.weight"] = hidden
            expected[f"{prefix}.self_attn.{projection}.bias"] = (768,)
        expected |= {
            f"{prefix}.self_attn.grep_linear.weight": (8, 64),
            f"{prefix}.self_attn.grep_linear.bias": (8,),
            f"{prefix}.self_attn.grep_a": (1, 12, 1, 1),
            f"{prefix}.self_attn_layer_norm.weight": (768,),
            f"{prefix}.self_attn_layer_norm.bias": (768,),
            f"{prefix}.fc1.weight": (inner, 768),
            f"{prefix}.fc1.bias": (inner,),
            f"{prefix}.fc2.weight": (768, inner),
            f"{prefix}.fc2.bias": (768,),
            f"{prefix}.final_layer_norm.weight": (768,),
            f"{prefix}.final_layer_norm.bias": (768,),
        }
    with torch.device("meta"):
        model = Beats(BeatsConfig())
    assert {name: tuple(value.shape) for name, value in model.named_parameters()} == expected
    assert model.state_dict().keys() == expected.keys()


@pytest.mark.parametrize("kept", ["every layer", "the last layer"])
def test_vllm_loads_a_checkpoint_by_name(openbeats: ModuleType, kept: str) -> None:
    """Wherever the file has the shared table; the authors' state_dict has it in every layer."""
    from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

    source = random_beats(TINY)
    oracle = oracle_with(openbeats, source, TINY)
    last = f"encoder.layers.{TINY.num_layers - 1}."
    checkpoint = {
        name: value
        for name, value in oracle.state_dict().items()
        if "_pad." not in name
        and (kept == "every layer" or "relative_attention" not in name or last in name)
    }
    checkpoint |= {"predictor.weight": torch.zeros(527, 64), "predictor.bias": torch.zeros(527)}
    model = nn.Module()
    model.audio_tower = Beats(TINY)
    loaded = AutoWeightsLoader(model).load_weights(
        ((f"model.audio_tower.{name}", value) for name, value in checkpoint.items()),
        mapper=WeightsMapper(orig_to_new_regex=CHECKPOINT_KEYS, orig_to_new_prefix={"model.": ""}),
    )
    assert loaded == dict(model.named_parameters()).keys()
    for name, value in source.state_dict().items():
        assert torch.equal(model.audio_tower.get_parameter(name), value), name


def test_thirty_seconds_are_1496_tokens() -> None:
    assert BeatsConfig().num_tokens(CLIP) == 187 * 8 == 1496


@torch.inference_mode()
def test_tokens_are_time_major() -> None:
    """A change in the second time step's highest patch moves that token before all others."""
    model = random_beats(TINY)
    embedded = record(model, ["post_extract_proj"])
    audio = fbank(64, batch=1)
    model(audio)
    before = embedded["post_extract_proj"]
    audio[:, 16:32, 112:] += 10
    model(audio)
    changed = (embedded["post_extract_proj"] != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [15]


@torch.inference_mode()
def test_batch_neighbours_do_not_matter() -> None:
    model = random_beats(TINY)
    audio = fbank(200, batch=3)
    together = model(audio)
    for one, expected in zip(audio, together, strict=True):
        torch.testing.assert_close(model(one[None])[0], expected, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    model = random_beats(TINY)
    model.get_parameter("encoder.pos_conv.0.weight_v").mul_(1000)  # its length means nothing
    audio = fbank(500, batch=1)
    expected = model(audio)
    output = model.to(dtype)(audio)
    assert output.dtype == dtype
    assert (output.float() - expected).abs().mean() < 4 * torch.finfo(dtype).eps


@torch.inference_mode()
def test_logits_beyond_fp16_are_harmless() -> None:
    """The authors divide by 32 for them."""
    model = random_beats(TINY)
    attention = model.encoder.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight *= 100
    outputs = record(model, ["encoder.layer_norm"])
    audio = fbank(500, batch=1)
    model(audio)
    x = outputs["encoder.layer_norm"]
    assert (attention.q_proj(x) @ attention.k_proj(x).mT / 8).abs().max() > 65504
    assert model.half()(audio).isfinite().all()
