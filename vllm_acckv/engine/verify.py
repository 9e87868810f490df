# SPDX-License-Identifier: Apache-2.0
"""Start-up proof that every decoder layer really runs under the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine.blocks import KVPolicySpec
from vllm_acckv.engine.startup import BACKENDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


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
        # Such layers have no KV cache of their own, so they are in no group.
        if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
            raise _refusal(name, "it shares the KV cache of another layer")
    for name, spec in specs.items():
        layer = layers[name]
        backend = layer.get_attn_backend()
        path = f"{backend.__module__}.{backend.__qualname__}"
        impl = getattr(layer, "impl", None)
        problems = {
            f"it runs on the attention backend {path}": path not in BACKENDS.values(),
            f"its KV cache is a {type(spec).__name__}": type(spec) is not KVPolicySpec,
            "it uses a sliding window": getattr(layer, "sliding_window", None) is not None,
            "it uses attention sinks": getattr(impl, "sinks", None) is not None,
            "it uses ALiBi": getattr(impl, "alibi_slopes", None) is not None,
            "it caps its attention logits": bool(getattr(impl, "logits_soft_cap", 0)),
        }
        for problem, found in problems.items():
            if found:
                raise _refusal(name, problem)
    return list(specs)


def _refusal(name: str, problem: str) -> KVPolicyError:
    return KVPolicyError(
        f"A KV policy cannot run on layer {name}: {problem}. Serve this model without a KV policy."
    )
