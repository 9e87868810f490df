# SPDX-License-Identifier: Apache-2.0
"""KV policies in transformers against eager attention over a full cache with entries masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.hf_models import (
    LAYOUT,
    LENGTH,
    MODALITY,
    STEPS,
    fed,
    generate,
    hiding,
    lengths,
    prompt_ids,
    prompted,
    tiny,
)
from vllm_acckv.hf import kv_policy
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Layer
from vllm_acckv.policies.recent import Recent
from vllm_acckv.spans import VIDEO

# Settings by policy; those below MERGING make entries that stand for several tokens.
EXACT: dict[str, dict[str, Any]] = {
    "acckv": {"calibration": False},
    "acckv_plus": {},
    "cross_merge": {"unimportant": "evict"},
    "drop_audio": {"budget": 0.3},
    "drop_video": {},
    "fastv": {"budget": 0.6, "first_pruned_layer": 1},
    "full": {},
    "h2o": {},
    "lookm": {"merge": "none"},
    "position_prior": {"calibration": False},
    "pyramidkv": {"budget": 0.4, "window": 8},
    "random": {},
    "recent": {},
    "snapkv": {"window": 8},
    "streaming": {"budget_scope": "total"},
}
MERGING: dict[str, dict[str, Any]] = {
    "acckv": {},
    "acckv corrected": {"preset": "corrected"},
    "acckv head": {"head_mode": "head", "tau_mode": "quantile", "tau": 0.5},
    "cross_merge": {},
    "cross_merge nearest": {"unimportant": "nearest"},
    "lookm": {},
    "position_prior": {},
}


def made(name: str, options: dict[str, Any]) -> Any:
    return make_policy(name.split()[0], **options)


@pytest.fixture(scope="module", params=["llama sdpa", "llama eager", "qwen2 sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(*request.param.split())


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompt_ids()


@pytest.mark.parametrize("name", EXACT)
def test_generates_like_a_full_cache_with_entries_masked(
    model: Any, ids: torch.Tensor, name: str
) -> None:
    policy = made(name, EXACT[name])
    full = prompted(model, ids)
    with kv_policy(model, policy, MODALITY) as run:
        tokens, logits, cache = generate(model, input_ids=ids)
    torch.testing.assert_close(logits[0], full.logits[0, -1])
    with hiding(model, run, LENGTH):
        expected = fed(model, tokens[:-1], full.past_key_values, LENGTH)
    torch.testing.assert_close(logits[1:], expected, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == LENGTH + STEPS - 1
    if name == "full":
        assert run.skipped == "policy full" and not run.layers
        return
    sizes = [policy.entries(LAYOUT, Layer(index, 4)) for index in range(4)]
    assert [layer.length for layer in run.layers] == sizes
    assert lengths(cache) == [size + STEPS - 1 for size in sizes]
    assert [sum(stats.kept.values()) for stats in run.stats] == pytest.approx(sizes)
    assert min(sizes) < LENGTH and run.skipped is None


@pytest.mark.parametrize("name", MERGING)
def test_generates_with_merged_entries(model: Any, ids: torch.Tensor, name: str) -> None:
    policy = made(name, MERGING[name])
    full = prompted(model, ids)
    with kv_policy(model, policy, MODALITY) as run:
        tokens, logits, cache = generate(model, input_ids=ids)
    torch.testing.assert_close(logits[0], full.logits[0, -1])
    size = policy.entries(LAYOUT, Layer(0, 4))
    for layer, entries in zip(run.layers, lengths(cache), strict=True):
        assert LAYOUT.trailing_text < layer.length == entries - STEPS + 1 <= size < LENGTH
        assert sum(layer.stats.merged.values()) > 0
    assert logits.isfinite().all()
    assert not torch.allclose(logits[1:], fed(model, tokens[:-1], full.past_key_values, LENGTH))


@pytest.mark.parametrize("name", ["acckv", "h2o", "streaming", "lookm"])
def test_new_tokens_have_true_positions_in_any_order_of_entries(
    model: Any, ids: torch.Tensor, name: str
) -> None:
    seen = []
    with kv_policy(model, name, MODALITY):
        cache = prompted(model, ids).past_key_values
        shuffled = copy.deepcopy(cache)
        for layer in shuffled.layers:
            order = torch.randperm(layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, order], layer.values[:, :, order]
        rotary = model.get_decoder().rotary_emb
        hook = rotary.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([*args, *kwargs.values()][-1].item()),
            with_kwargs=True,
        )
        with torch.inference_mode(), hook:
            logits = model(ids[:, :1], past_key_values=cache).logits  # the model's own positions
        assert seen == [LENGTH]
        torch.testing.assert_close(fed(model, ids[0, :1], shuffled, LENGTH), logits[0])


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", ["acckv", "acckv corrected", "h2o", "fastv", "snapkv"])
def test_left_padding_changes_nothing(model: Any, ids: torch.Tensor, name: str, held: bool) -> None:
    options = EXACT["fastv"] if name == "fastv" else MERGING.get(name, {})
    policy = made(name, {**options, "compress_before_last_token": held})
    padded = torch.nn.functional.pad(ids, (7, 0))
    mask = (torch.arange(LENGTH + 7) >= 7).long()[None]
    with kv_policy(model, policy, MODALITY) as run:
        tokens, logits, _ = generate(model, input_ids=ids)
    with kv_policy(model, policy, torch.nn.functional.pad(MODALITY, (7, 0), value=-1)) as other:
        same, close, cache = generate(model, input_ids=padded, attention_mask=mask)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(close, logits, atol=1e-4, rtol=0)
    for mine, theirs in zip(run.layers, other.layers, strict=True):
        shifted = torch.where(mine.positions < 0, -1, mine.positions + 7)
        assert torch.equal(theirs.positions, shifted) and theirs.length == mine.length
    assert cache.get_seq_length() == LENGTH + 7 + STEPS - 1


HELD_BACK = ["acckv", "h2o", "h2o evict", "fastv", "snapkv", "pyramidkv"]


@pytest.mark.parametrize("name", HELD_BACK)
def test_last_token_held_back_is_two_steps(model: Any, ids: torch.Tensor, name: str) -> None:
    options = dict(EXACT.get(name, {}), **({"decode": "evict"} if "evict" in name else {}))
    policy = made(name, options)
    with kv_policy(model, policy, MODALITY[:-1]) as two:
        cache = prompted(model, ids[:, :-1]).past_key_values
        expected = fed(model, ids[0, -1:], cache, LENGTH - 1)
        expected = torch.cat([expected, fed(model, ids[0, :3], cache, LENGTH)])
    held = policy.model_copy(update={"compress_before_last_token": True})
    with kv_policy(model, held, MODALITY) as one:
        out = prompted(model, ids)
        logits = torch.cat(
            [out.logits[0, -1:], fed(model, ids[0, :3], out.past_key_values, LENGTH)]
        )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert lengths(out.past_key_values) == lengths(cache)
    for mine, theirs in zip(one.layers, two.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)


@pytest.mark.parametrize("name", ["acckv", "fastv", "snapkv"])
def test_several_tokens_at_once(model: Any, ids: torch.Tensor, name: str) -> None:
    with kv_policy(model, made(name, EXACT[name]), MODALITY):
        cache = prompted(model, ids).past_key_values
        other = copy.deepcopy(cache)
        one = fed(model, ids[0, :8], cache, LENGTH)
        torch.testing.assert_close(fed(model, ids[0, :8], other, LENGTH, at_once=5), one)
        other.crop(-3)
        again = fed(model, ids[0, 5:8], other, LENGTH + 5, at_once=3)
        torch.testing.assert_close(again, one[5:])
        with pytest.raises(ValueError, match=r"crop to 84 tokens reaches into the 85 tokens"):
            other.crop(-9)
        assert other.get_seq_length() == LENGTH + 8  # no layer was cropped


def test_another_turn_of_generate(model: Any, ids: torch.Tensor) -> None:
    with kv_policy(model, made("acckv", EXACT["acckv"]), MODALITY) as run:
        tokens, _, cache = generate(model, input_ids=ids)
        turn = torch.cat([ids, tokens[None], ids[:, :4]], dim=1)
        more, logits, _ = generate(model, input_ids=turn, past_key_values=cache)
    full = prompted(model, ids).past_key_values
    with hiding(model, run, LENGTH):
        expected = fed(model, torch.cat([turn[0, LENGTH:], more[:-1]]), full, LENGTH)
    torch.testing.assert_close(logits, expected[-STEPS:], atol=1e-4, rtol=0)


def test_every_prompt_of_a_context(model: Any, ids: torch.Tensor) -> None:
    with kv_policy(model, "h2o", MODALITY) as run:
        first, logits, cache = generate(model, input_ids=ids)
        generate(model, input_ids=ids.flip(1))
        kept = run.layers[0].positions
        second, same, _ = generate(model, input_ids=ids)
        cache.reset()
        out = prompted(model, ids, past_key_values=cache)
    assert torch.equal(first, second) and torch.equal(logits, same)
    assert not torch.equal(kept, run.layers[0].positions)
    assert lengths(out.past_key_values) == [layer.length for layer in run.layers]


def test_without_audio_and_video_nothing_happens(model: Any, ids: torch.Tensor) -> None:
    tokens, logits, _ = generate(model, input_ids=ids)
    for policy, reason in (("acckv", "no audio or video"), ("full", "policy full")):
        with kv_policy(model, policy, torch.zeros(LENGTH, dtype=torch.int8)) as run:
            same, equal, cache = generate(model, input_ids=ids)
        assert run.skipped == reason and run.layers == run.stats == []
        assert torch.equal(tokens, same) and torch.equal(logits, equal)
        assert lengths(cache) == [LENGTH + STEPS - 1] * 4


def test_full_policy_and_no_context_are_one(model: Any, ids: torch.Tensor) -> None:
    before = prompted(model, ids)
    with kv_policy(model, "full", MODALITY, compress_before_last_token=True):
        inside = prompted(model, ids)
    assert torch.equal(before.logits, inside.logits)


def state(model: torch.nn.Module) -> list[Any]:
    """Everything a context touches."""
    found: list[Any] = []
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks)
        flags = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
        found += [dict(one) for one in (*hooks, *flags)]
        found.append(getattr(getattr(module, "config", None), "_attn_implementation", None))
    return found


def test_leaves_the_model_as_it_was(model: Any, ids: torch.Tensor) -> None:
    before = state(model)
    with kv_policy(model, "acckv", MODALITY, preset="corrected"):
        assert state(model) != before
        generate(model, input_ids=ids)
    assert state(model) == before
    with pytest.raises(RuntimeError, match="mine"), kv_policy(model, "acckv", MODALITY):
        raise RuntimeError("mine")
    assert state(model) == before
    with pytest.raises(ValueError, match="batch"), kv_policy(model, "acckv", MODALITY):
        prompted(model, ids.expand(2, -1))
    assert state(model) == before
    again = kv_policy(model, "h2o", MODALITY)
    with kv_policy(model, "acckv", MODALITY), pytest.raises(ValueError, match="already runs"):
        again.__enter__()
    assert state(model) == before


def test_a_layer_that_would_free_no_block_is_left_alone(model: Any, ids: torch.Tensor) -> None:
    with kv_policy(model, "pyramidkv", MODALITY, block_size=40, budget=0.4, window=8) as run:
        cache = generate(model, input_ids=ids)[2]
    assert [layer.length for layer in run.layers] == [LENGTH, LENGTH, 45, 45]
    assert run.layers[0].positions.tolist() == [list(range(LENGTH))]
    assert run.stats[0].kept == {"text": 15, "video": 40, "audio": 30}
    assert lengths(cache) == [layer.length + STEPS - 1 for layer in run.layers]
    with kv_policy(model, "acckv", MODALITY, block_size=LENGTH) as run:
        generate(model, input_ids=ids)
    assert run.skipped == "would free less than a block" and not run.layers
    with kv_policy(model, "acckv", MODALITY * 0 + VIDEO, block_size=4) as run:
        generate(model, input_ids=ids)
    assert run.skipped == "no text after the last clip" and not run.layers


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "names no token of audio, video or images; pass modality=": ({"modality": None}, {}),
    r"the prompt needs int8 \[85\]": ({"modality": MODALITY[1:]}, {}),
    "modality holds 7": ({"modality": MODALITY * 0 + 7}, {}),
    "no text after its last audio-video token": ({"modality": MODALITY * 0 + 1}, {}),
    "past_key_values is a NoneType": ({}, {"use_cache": False}),
    "past_key_values is a StaticCache": ({}, {"past_key_values": "static"}),
    "holds 85 tokens that were computed without": ({}, {"past_key_values": "foreign"}),
    "hides 1 tokens, but not the first 1": (
        {},
        {"attention_mask": (torch.arange(LENGTH) != 5).long()[None]},
    ),
    r"attention_mask of the prompt is \[1, 1, 85, 85\]": (
        {},
        {"attention_mask": torch.ones(LENGTH, LENGTH).tril().bool()[None, None]},
    ),
    "tau cannot be set on a policy that is already made": (
        {"policy": make_policy("acckv"), "tau": 0.5},
        {},
    ),
    "block_size is 0": ({"block_size": 0}, {}),
    "must be above 0.50": ({"policy": "fastv", "budget": 0.4}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(ids: torch.Tensor, message: str) -> None:
    model = tiny("llama", "sdpa")
    settings, inputs = ({**one} for one in REFUSED[message])
    caches = {
        "static": StaticCache(config=model.config, max_cache_len=128),
        "foreign": prompted(model, ids).past_key_values,
    }
    if "past_key_values" in inputs:
        inputs["past_key_values"] = caches[inputs["past_key_values"]]
    settings = {"modality": MODALITY, **settings}
    with pytest.raises(ValueError, match=message), kv_policy(model, **settings):
        model(ids, **inputs)


def test_refuses_beams_sliding_windows_and_use_outside(ids: torch.Tensor) -> None:
    model = tiny("qwen2", "sdpa")
    with kv_policy(model, "acckv", MODALITY):
        cache = prompted(model, ids).past_key_values
        for change in (
            lambda: generate(model, input_ids=ids, num_beams=2),
            lambda: cache.reorder_cache(torch.tensor([0, 0])),
            lambda: cache.batch_repeat_interleave(2),
        ):
            with pytest.raises(ValueError, match="a KV policy works on one sequence"):
                change()
        cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(ValueError, match="go on inside"):
        fed(model, ids[0, :1], cache, LENGTH)
    sliding = tiny("qwen2", "sdpa", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ValueError, match="Layer 2 is of type sliding_attention"):
        kv_policy(sliding, "acckv", MODALITY).__enter__()


def test_the_filter_works_on_a_budget_of_everything() -> None:
    """AVicuna's 160 tokens exceed the clip, so that only the filter is left of AccKV."""
    model = tiny("llama", "sdpa")
    with kv_policy(model, "acckv", MODALITY, budget=160, tau=1.0) as run:
        prompted(model, prompt_ids())
    assert [stats.rejected_share for stats in run.stats] == [1.0] * 4
    assert all(min(one.kept["video"], one.kept["audio"]) == 0 for one in run.stats)
    with kv_policy(model, "acckv", MODALITY, budget=160, tau=1.0, block_size=8) as run:
        prompted(model, prompt_ids())
    assert run.skipped == "within the budget"


def test_other_ways_to_evict_while_decoding_are_refused() -> None:
    class Evicting(Recent):
        name = "evicting"
        evicts_at_decode = property(lambda self: True)

    with (
        pytest.raises(ValueError, match="evicting evicts while decoding in a way this runner"),
        kv_policy(tiny("llama", "sdpa"), Evicting(), MODALITY),
    ):
        pass
