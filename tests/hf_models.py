# SPDX-License-Identifier: Apache-2.0
"""Small transformers decoders, ways to run them, and attention with entries hidden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache

from vllm_acckv.hf import Run
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout

PARTS = [(TEXT, 6), (VIDEO, 40), (AUDIO, 30), (TEXT, 9)]
MODALITY = torch.tensor([code for code, count in PARTS for _ in range(count)]).to(torch.int8)
LENGTH = len(MODALITY)
LAYOUT = Layout(MODALITY.numpy())
STEPS = 6


def prompt_ids() -> torch.Tensor:
    return torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def tiny(family: str, implementation: str, **options: Any) -> Any:
    import transformers

    config, cls = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[family]
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    torch.manual_seed(0)
    model = cls._from_config(
        config(**sizes, **heads, **options), attn_implementation=implementation
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                # Peaked attention, and logits that depend on it.
                weight.normal_(std=(3 if "q_proj" in name else 1) / weight.shape[1] ** 0.5)
    return model


def generate(model: Any, steps: int = STEPS, **inputs: Any) -> Any:
    """Greedy tokens ``[steps]``, logits ``[steps, vocabulary]`` and the cache."""
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    out = model.generate(
        **inputs, **options, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[0, -steps:], torch.cat(out.logits), out.past_key_values


@torch.inference_mode()
def fed(model: Any, tokens: torch.Tensor, cache: Any, first: int, at_once: int = 1) -> torch.Tensor:
    """Logits after each of ``tokens``, which follow at position ``first``."""
    logits = []
    for start in range(0, len(tokens), at_once):
        part = tokens[None, start : start + at_once]
        positions = torch.arange(first + start, first + start + part.shape[1])[None]
        out = model(part, past_key_values=cache, position_ids=positions, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits)


@torch.inference_mode()
def prompted(model: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
    return model(input_ids=input_ids, use_cache=True, **inputs)


_hidden: dict[int, torch.Tensor] = {}


def _masked_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
) -> Any:
    """Eager causal attention that does not see the entries in ``_hidden``, bool ``[G, l]``."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    rows, columns = logits.shape[2:]
    bias = (
        torch.full((rows, columns), -torch.inf).triu(columns - rows + 1).repeat(key.shape[1], 1, 1)
    )
    if module.layer_idx in _hidden:
        hidden = _hidden[module.layer_idx]
        bias[:, :, : hidden.shape[1]].masked_fill_(hidden[:, None], -torch.inf)
    weights = (logits + bias.repeat_interleave(groups, 0)).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


AttentionInterface.register("masked_for_test", _masked_attention)


@contextmanager
def hiding(model: Any, run: Run, length: int) -> Iterator[None]:
    """Hide what ``run`` dropped from a full cache of ``length`` prompt tokens."""
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = "masked_for_test"
    for index, layer in enumerate(run.layers):
        heads = config.num_key_value_heads
        hidden = torch.ones(heads, length, dtype=torch.bool)
        _hidden[index] = hidden.scatter(1, layer.positions.expand(heads, -1), False)
    try:
        yield
    finally:
        _hidden.clear()
        config._attn_implementation = before


def lengths(cache: DynamicCache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]
