# SPDX-License-Identifier: Apache-2.0
"""What a policy must know of a transformers decoder, and which decoders it refuses."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.cache_utils import DynamicLayer

from vllm_acckv.hf.cache import CompressedLayer

# Arguments of an attention function that change attention in ways observed rows do not follow.
_UNSUPPORTED = {
    "sliding_window": "uses a sliding window",
    "softcap": "caps its attention logits",
    "s_aux": "uses attention sinks",
    "position_bias": "uses a position bias",
}


def attention_modules(decoder: Any) -> list[Any]:
    """Attention modules of the decoder in the order of their layers.

    Raises:
        ValueError: if they cannot run under a policy.
    """
    found = [
        module
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "num_key_value_groups")
    ]
    found.sort(key=lambda module: module.layer_idx)
    if not found or [module.layer_idx for module in found] != list(range(len(found))):
        raise ValueError(
            f"{type(decoder).__name__} has attention modules for the layers "
            f"{[module.layer_idx for module in found]}; a KV policy needs one for every layer."
        )
    for module in found:
        if not {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= names_of(module).keys():
            raise ValueError(
                f"{type(module).__name__} does not call ALL_ATTENTION_FUNCTIONS of transformers, "
                "where a KV policy takes hold."
            )
    for index, kind in enumerate(getattr(decoder.config, "layer_types", None) or []):
        if kind != "full_attention":
            raise ValueError(f"Layer {index} is of type {kind}; a KV policy needs full_attention.")
    return found


def check_layer(layer: Any, module: Any, options: dict[str, Any]) -> None:
    """Refuse layers whose cache or attention is of another kind than the policy sees."""
    if type(layer) not in (DynamicLayer, CompressedLayer):
        raise ValueError(
            f"Layer {module.layer_idx} of past_key_values is a {type(layer).__name__}; a KV policy "
            "compresses a DynamicLayer only."
        )
    for name, what in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ValueError(f"Layer {module.layer_idx} {what}, which no KV policy supports.")


def arguments_by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward call by name."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def names_of(module: Any) -> dict[str, Any]:
    """Names in the file that defines the module's forward; models may override them locally."""
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {})
