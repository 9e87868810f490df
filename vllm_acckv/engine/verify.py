# SPDX-License-Identifier: Apache-2.0
"""Start-up proof that every decoder layer really runs under the policy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_acckv.engine.blocks import KVPolicySpec
from vllm_acckv.engine.startup import BACKENDS
from vllm_acckv.engine.supported import Refusal, refuse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def _backend(layer: Any) -> str:
    backend = layer.get_attn_backend()
    return f"{backend.__module__}.{backend.__qualname__}"


def _of_impl(layer: Any, name: str) -> Any:
    return getattr(getattr(layer, "impl", None), name, None)


_Layer = partial(
    Refusal,
    sentence="A KV policy cannot run on layer {who}: {name}{value}. Serve this model without a KV "
    "policy.",
)
# Layers without a KV cache of their own, so they are in no group.
BORROWED = (
    _Layer(
        "it shares the KV cache of another layer",
        "it would read a cache that was compacted by another layer's choice",
        lambda layer: getattr(layer, "kv_sharing_target_layer_name", None) is not None,
    ),
)
LAYERS = (
    _Layer(
        "it runs on the attention backend",
        "only our extension of a backend compacts; the layer would keep everything unnoticed",
        lambda layer, spec: _backend(layer) not in BACKENDS.values(),
        value=lambda layer, spec: f" {_backend(layer)}",
        which="any other than ours",
    ),
    _Layer(
        "its KV cache is a",
        "only our block manager frees what was compacted",
        lambda layer, spec: type(spec) is not KVPolicySpec,
        value=lambda layer, spec: f" {type(spec).__name__}",
        which="any other spec than ours",
    ),
    _Layer(
        "it uses a sliding window",
        "the window counts positions, and kept entries move to other slots",
        lambda layer, spec: getattr(layer, "sliding_window", None) is not None,
    ),
    _Layer(
        "it uses attention sinks",
        "scores are computed without the sinks' share of the softmax",
        lambda layer, spec: _of_impl(layer, "sinks") is not None,
    ),
    _Layer(
        "it uses ALiBi",
        "its bias depends on slots, and kept entries move to other ones",
        lambda layer, spec: _of_impl(layer, "alibi_slopes") is not None,
    ),
    _Layer(
        "it caps its attention logits",
        "scores are computed without the cap",
        lambda layer, spec: bool(_of_impl(layer, "logits_soft_cap")),
    ),
)
# Of the whole model: the managers of its KV caches, and those of them that are ours.
KV_CACHES = (
    Refusal(
        "kinds of KV cache",
        "each kind has block tables of its own; a plan frees the blocks of one",
        lambda managers, ours: len(managers) != 1 or len(ours) != 1,
        "--kv-policy {who} needs a model whose layers all use full attention; this one has "
        "{value}.",
        lambda managers, ours: (
            f"{len(managers)} kinds of KV cache "
            f"({', '.join(type(manager.kv_cache_spec).__name__ for manager in managers)})"
        ),
        which="more than one",
    ),
)


def verify_layers(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[str]:
    """Names of the decoder layers, all of which run under the policy.

    Raises:
        KVPolicyError: naming the first layer that does not, and why.
    """
    specs = {
        name: group.kv_cache_spec
        for group in kv_cache_config.kv_cache_groups
        for name in group.layer_names
    }
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    for name, layer in layers.items():
        refuse(BORROWED, name, layer)
    for name, spec in specs.items():
        refuse(LAYERS, name, layers[name], spec)
    return list(specs)
