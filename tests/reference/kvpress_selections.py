# SPDX-License-Identifier: Apache-2.0
"""What NVIDIA's kvpress keeps of a prompt in tiny random models.

Runs in the environment that `make oracles` makes, without this package:

    .venv-kvpress/bin/python tests/reference/kvpress_selections.py RUNS OUT

RUNS is a JSON list of objects with "model" (llama or qwen2), "attention" (eager or sdpa), "press"
(a class of kvpress) and "options" (its arguments). OUT is a safetensors file, which gets

    MODEL.ATTENTION.queries         [layers, H, l, d] after rotary embedding
    MODEL.ATTENTION.keys, .values   [layers, G, l, d] of the uncompressed cache
    RUN.kept                        bool [layers, G, l], RUN counts from 0
    RUN.scores                      [layers, G, l], what the press ranks the tokens by
"""

import json
import sys
from typing import Any

import kvpress
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LENGTH = 200
SEED = 7  # no press has a near-tie between the last token it keeps and the first it drops
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def build(name: str, attention: str) -> PreTrainedModel:
    """Four layers, six query heads on two KV heads; weights depend on SEED and the name alone."""
    make_config, make_model = MODELS[name]
    config = make_config(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        attn_implementation=attention,
    )
    model = make_model(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Wide enough for attention that is far from uniform.
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
        elif not bool((parameter == 1).all()):
            torch.nn.init.normal_(parameter, generator=generator)  # a bias, not a norm
    return model


def cached(model: PreTrainedModel, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[G, l, d]`` of every layer after a prefill."""
    cache = DynamicCache()
    model(prompt, past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def states(model: PreTrainedModel, prompt: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values of all layers without a press."""
    queries: list[Tensor] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"]
        query = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        rotated, _ = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])
        queries.append(rotated[0])

    hooks = [
        layer.self_attn.register_forward_pre_hook(record, with_kwargs=True)
        for layer in model.model.layers
    ]
    keys, values = zip(*cached(model, prompt), strict=True)
    for hook in hooks:
        hook.remove()
    return {
        "queries": torch.stack(queries),
        "keys": torch.stack(keys),
        "values": torch.stack(values),
    }


def pressed(
    model: PreTrainedModel, prompt: Tensor, press: Any, full: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Which entries are left in the cache, found by their keys, and the press's own scores."""
    scores: list[Tensor] = []
    score = press.score

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        scores.append(score(*args, **kwargs))
        return scores[-1]

    press.score = recorded
    with press(model):
        layers = cached(model, prompt)
    kept = torch.zeros(full["keys"].shape[:3], dtype=torch.bool)
    for index, (key, value) in enumerate(layers):
        same = (key[:, :, None] == full["keys"][index][:, None]).all(-1)  # [G, n, l]
        assert bool((same.sum(-1) == 1).all()), "an entry of the cache is none of the prompt's keys"
        position = same.int().argmax(-1)
        rows = position[..., None].expand_as(value)
        assert torch.equal(value, full["values"][index].gather(1, rows))
        kept[index].scatter_(1, position, True)
        assert bool((kept[index].sum(1) == key.shape[1]).all()), "an entry is there twice"
    return {"kept": kept, "scores": torch.cat(scores)}


@torch.no_grad()
def main(runs: list[dict[str, Any]], path: str) -> None:
    tensors: dict[str, Tensor] = {}
    prompt = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(SEED))
    for name, attention in sorted({(run["model"], run["attention"]) for run in runs}):
        model = build(name, attention)
        full = states(model, prompt)
        tensors.update({f"{name}.{attention}.{part}": full[part] for part in full})
        for index, run in enumerate(runs):
            if (run["model"], run["attention"]) == (name, attention):
                press = getattr(kvpress, run["press"])(**run["options"])
                found = pressed(model, prompt, press, full)
                tensors.update({f"{index}.{part}": found[part] for part in found})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
