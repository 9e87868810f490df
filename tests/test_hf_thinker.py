# SPDX-License-Identifier: Apache-2.0
"""KV policies in transformers' Qwen2.5-Omni thinker, against the naive AccKV among others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.conftest import BLOCK_SIZE, Media, Reference
from tests.hf_models import STEPS, fed, generate, hiding, lengths, prompted
from tests.reference import hf_thinker
from vllm_acckv.hf import kv_policy
from vllm_acckv.hf.prompt import modalities_of, rotary_angles
from vllm_acckv.rotary import rotate
from vllm_acckv.tools import tiny_model

ASKS = ["separate", "interleaved", "two_separate"]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def thinker(request: pytest.FixtureRequest, checkpoint: Path) -> Any:
    thinker = tiny_model.load_thinker(checkpoint)
    thinker.model.config._attn_implementation = request.param
    return thinker


@pytest.fixture(scope="module")
def prepare(checkpoint: Path, media: Media) -> Any:
    """Prompt ids and model inputs of a request, by the name of its layout."""
    known: dict[str, Any] = {}

    def prepared(name: str) -> tuple[list[int], dict[str, Any]]:
        if name not in known:
            ask = getattr(media, name)()
            known[name] = hf_thinker.prepare_inputs(checkpoint, ask.messages, ask.audio_in_video)
        return known[name]

    return prepared


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> Any:
    return tiny_model.load_thinker(checkpoint)


def kept_tokens(layer: Any, heads: int = 2) -> list[list[int]]:
    return [
        [position for position in head if position >= 0]
        for head in layer.positions.expand(heads, -1).tolist()
    ]


@pytest.mark.parametrize("tau", [0.1, 0.6])
@pytest.mark.parametrize("budget", [0.5, 0.2])
@pytest.mark.parametrize("name", ASKS)
def test_is_the_naive_acckv(
    thinker: Any, eager: Any, prepare: Any, name: str, budget: float, tau: float
) -> None:
    _, inputs = prepare(name)
    options = hf_thinker.Options(tau=tau, block_size=BLOCK_SIZE)
    policy = hf_thinker.Policy(budget, options)
    with kv_policy(thinker, "acckv", budget=budget, tau=tau, block_size=BLOCK_SIZE) as run:
        tokens, logits, _ = generate(thinker, steps=12, **inputs)
    expected = hf_thinker.generate(eager, inputs, 12, policy, tokens.tolist())
    assert (run.skipped is None) == expected.active
    assert (logits.log_softmax(-1) - expected.logprobs).abs().max() < 1e-4
    assert tokens.tolist() == expected.logprobs.argmax(-1).tolist()
    for layer, selection in zip(run.layers, expected.selections, strict=True):
        assert kept_tokens(layer) == selection.kept
        assert layer.length == selection.length
        if layer.stats.video_weight is not None:  # the layer freed a block
            assert layer.stats.video_weight == pytest.approx(selection.W_v[0], abs=1e-4)


def test_sees_keys_before_rotary_embedding(
    thinker: Any, prepare: Any, reference: Reference, media: Media
) -> None:
    tau = 0.05
    expected = reference.selections_before_rope(media.separate(), 0.2, tau=tau)
    settings = {"tau": tau, "tau_mode": "absolute_pre_rope", "block_size": BLOCK_SIZE}
    with kv_policy(thinker, "acckv", **settings) as run:
        prompted(thinker, **prepare("separate")[1])
    assert [kept_tokens(layer) for layer in run.layers] == [one.kept for one in expected]


@pytest.mark.parametrize("name", ["h2o", "snapkv", "fastv", "streaming"])
def test_other_policies(thinker: Any, prepare: Any, name: str) -> None:
    ids, inputs = prepare("interleaved")
    budget = 0.6 if name == "fastv" else 0.2
    full = prompted(thinker, **inputs)
    with kv_policy(thinker, name, budget=budget) as run:
        tokens, logits, _ = generate(thinker, **inputs)
    torch.testing.assert_close(logits[0], full.logits[0, -1])
    start = len(ids) + int(thinker.rope_deltas)
    with hiding(thinker, run, len(ids)):
        expected = fed(thinker, tokens[:-1], full.past_key_values, start)
    torch.testing.assert_close(logits[1:], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["acckv", "h2o", "pyramidkv"])
def test_loop_by_hand_has_true_positions(thinker: Any, prepare: Any, name: str) -> None:
    ids, inputs = prepare("separate")
    seen: list[torch.Tensor] = []
    hook = thinker.model.rotary_emb.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    with kv_policy(thinker, name), hook, torch.inference_mode():
        tokens, logits, _ = generate(thinker, **inputs)
        out = thinker(**inputs, use_cache=True)
        delta = int(thinker.rope_deltas)
        assert delta != 0
        for step in range(STEPS):
            torch.testing.assert_close(out.logits[0, -1], logits[step], atol=1e-5, rtol=0)
            out = thinker(tokens[None, step : step + 1], past_key_values=out.past_key_values)
    positions = [int(position.unique()) for position in seen if position.shape[-1] == 1]
    first = len(ids) + delta
    assert positions == [*range(first, first + STEPS - 1), *range(first, first + STEPS)]
    assert out.past_key_values.get_seq_length() == len(ids) + STEPS
    assert max(lengths(out.past_key_values)) < len(ids)


@pytest.mark.parametrize("name", ["acckv", "snapkv"])
def test_last_token_held_back_is_two_steps(thinker: Any, prepare: Any, name: str) -> None:
    _, inputs = prepare("separate")
    cut = ("input_ids", "attention_mask")
    shorter = {key: one[:, :-1] if key in cut else one for key, one in inputs.items()}
    with kv_policy(thinker, name, budget=0.3):
        cache = prompted(thinker, **shorter).past_key_values
        with torch.inference_mode():
            expected = thinker(inputs["input_ids"][:, -1:], past_key_values=cache).logits[0, -1]
    with kv_policy(thinker, name, budget=0.3, compress_before_last_token=True):
        out = prompted(thinker, **inputs)
    torch.testing.assert_close(out.logits[0, -1], expected, atol=1e-4, rtol=0)
    assert lengths(out.past_key_values) == lengths(cache)


def test_left_padding_changes_nothing(thinker: Any, prepare: Any) -> None:
    _, inputs = prepare("separate")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pad = torch.nn.functional.pad
    padded = {**inputs, "input_ids": pad(ids, (5, 0)), "attention_mask": pad(mask, (5, 0))}
    with kv_policy(thinker, "acckv") as run:
        tokens, logits, _ = generate(thinker, **inputs)
        kept = [layer.positions for layer in run.layers]
        same, close, _ = generate(thinker, **padded)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(close, logits, atol=1e-4, rtol=0)
    for mine, layer in zip(kept, run.layers, strict=True):
        assert torch.equal(torch.where(mine < 0, -1, mine + 5), layer.positions)


def test_text_alone_is_left_alone_next_to_clips(thinker: Any, prepare: Any) -> None:
    _, inputs = prepare("text")
    inputs = {key: one for key, one in inputs.items() if one is not None}
    tokens, logits, _ = generate(thinker, **inputs)
    with kv_policy(thinker, "acckv") as run:
        generate(thinker, **prepare("separate")[1])
        assert run.skipped is None and len(run.layers) == len(run.stats) == 4
        same, equal, cache = generate(thinker, **inputs)
    assert run.skipped == "no audio or video" and not run.layers
    assert torch.equal(tokens, same) and torch.equal(logits, equal)
    assert len(set(lengths(cache))) == 1


def test_towers_keep_their_attention_and_embeddings_need_modalities(
    thinker: Any, prepare: Any
) -> None:
    ids = prepare("separate")[0]
    modality = torch.tensor(hf_thinker.modality_of(thinker, ids), dtype=torch.int8)
    towers = (thinker.audio_tower.config, thinker.visual.config, thinker.config)
    before = [config._attn_implementation for config in towers]
    embeddings = torch.randn(1, len(ids), thinker.model.config.hidden_size)
    with kv_policy(thinker, "acckv"):
        assert [config._attn_implementation for config in towers] == before
        with pytest.raises(ValueError, match="the call has no input_ids; pass modality="):
            thinker.model(inputs_embeds=embeddings, past_key_values=DynamicCache())
    whole = torch.nn.Module()
    whole.thinker = thinker
    with kv_policy(whole, "acckv", modality) as run, torch.inference_mode():
        thinker.model(inputs_embeds=embeddings, past_key_values=DynamicCache())
    assert len(run.layers) == 4


def test_angles_are_those_of_the_keys(thinker: Any, prepare: Any) -> None:
    _, inputs = prepare("interleaved")
    plain: list[torch.Tensor] = []
    seen: list[Any] = []
    rotary, attention = thinker.model.rotary_emb, thinker.model.layers[0].self_attn
    hooks = [
        rotary.register_forward_hook(lambda _, args, output: seen.append((args[1], output))),
        attention.k_proj.register_forward_hook(lambda _, __, output: plain.append(output)),
    ]
    cache = prompted(thinker, **inputs).past_key_values
    for hook in hooks:
        hook.remove()
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

    angles = rotary_angles(rotary, *seen[0], apply_rotary_pos_emb, 64)
    key = plain[0][0].unflatten(-1, (2, 64)).transpose(0, 1)
    torch.testing.assert_close(rotate(key, angles), cache.layers[0].keys[0], atol=1e-4, rtol=0)
    assert angles.max() > 2 * torch.pi  # whole turns count
    with pytest.raises(ValueError, match="not understood"):
        rotary_angles(rotary, *seen[0], lambda q, k, cos, sin: (q, k), 64)


def test_angles_of_interleaved_sections() -> None:
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    section = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    config = Qwen3VLTextConfig(head_dim=32, rope_parameters=section)
    rotary = qwen3.Qwen3VLTextRotaryEmbedding(config)
    positions = torch.arange(40).repeat(3, 1)[:, None] * torch.tensor([1, 2, 3])[:, None, None]
    cos, sin = rotary(torch.zeros(1), positions)
    angles = rotary_angles(rotary, positions, (cos, sin), qwen3.apply_rotary_pos_emb, 32)
    torch.testing.assert_close(angles.cos(), cos[0, :, :16])


def test_modalities_by_token() -> None:
    config = SimpleNamespace(video_token_id=7, image_token_index=8, audio_token_id=9)
    ids = torch.tensor([[0, 0, 1, 7, 8, 9, 7, 1]])
    assert modalities_of(ids, config, "video", 8, 2).tolist() == [0, 1, 1, 2, 1, 0]
    assert modalities_of(ids, config, "text", 8, 0).tolist() == [0, 0, 0, 1, 0, 2, 1, 0]
    with pytest.raises(ValueError, match="has 8 input_ids for 20 embeddings; pass modality="):
        modalities_of(ids, config, "text", 20, 0)
