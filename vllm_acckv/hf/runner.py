# SPDX-License-Identifier: Apache-2.0
"""Run a KV policy inside a transformers decoder.

The decoder's attention is wrapped, not replaced: the prompt is computed by whatever
implementation the model is configured with, then the rows the policy observes are computed again
and the layer's cache is compacted. Keys arrive after rotary embedding, so no model-specific code
is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from vllm_acckv.hf.cache import ONE_SEQUENCE, CompressedLayer
from vllm_acckv.hf.decoder import arguments_by_name, attention_modules, check_layer, names_of
from vllm_acckv.hf.prefill import Call, Output, Prefill, Run
from vllm_acckv.hf.prompt import given_modalities, left_padding, modalities_of, rotary_angles
from vllm_acckv.plan import make_plan
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Policy
from vllm_acckv.policies.h2o import H2O

NAME = "vllm_acckv"

# Attribute of a cache whose prompt was seen, compressed or not; survives a copy of the cache.
_SEEN = "_kv_policy_seen"


@contextmanager
def kv_policy(
    model: torch.nn.Module,
    policy: str | Policy = "acckv",
    modality: Any = None,
    *,
    block_size: int | None = None,
    **options: Any,
) -> Iterator[Run]:
    """Compress the KV cache of every prompt that ``model`` computes inside the context.

    The prompt is what a forward call on an empty cache computes, ``generate()``'s or one's own.
    It must come in one piece (no ``prefill_chunk_size``) and alone (no assisted decoding, which
    adds its guesses). Everything later sees the compressed cache at the true positions, also
    further turns, which are not compressed themselves. Masks that come with later calls are
    ignored: new tokens see every entry and, among themselves, the earlier ones.

    Args:
        model: a transformers decoder with a ``DynamicCache``, such as Qwen2 or Llama, or a model
            around one, such as the thinker of Qwen2.5-Omni.
        policy: a policy, or its name.
        modality: int8 ``[l]`` of 0 text, 1 video, 2 audio for every prompt token (any value for
            left padding). By default told from ``input_ids`` and the token ids in the model's
            configuration.
        block_size: fill up to whole blocks and skip what would free less, as vLLM does. Without
            it exactly the selected entries stay.
        options: settings of the policy, if it is given by name.

    Raises:
        ValueError: for settings or models that do not work together; from a forward call, for
            batches, caches and prompts that cannot be compressed.
    """
    if isinstance(policy, Policy) and options:
        raise ValueError(
            f"{', '.join(options)} cannot be set on a policy that is already made; pass its name."
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected 1 or more.")
    made = policy if isinstance(policy, Policy) else make_policy(policy, **options)
    if made.evicts_at_decode and not isinstance(made, H2O):
        raise ValueError(f"{made.name} evicts while decoding in a way this runner does not know.")
    runner = _Runner(model, made, modality, block_size)
    with runner.installed():
        yield runner.run


class _Runner:
    """One policy on one model."""

    def __init__(self, model: Any, policy: Policy, modality: Any, block_size: int | None) -> None:
        self.run = Run(policy)
        self.policy, self.modality, self.block_size = policy, modality, block_size
        # Qwen2.5-Omni with speech: the talker has a cache of its own, which nobody compresses.
        self.model = getattr(model, "thinker", model)
        self.decoder = getattr(self.model, "get_decoder", lambda: self.model)()
        self.attentions = attention_modules(self.decoder)
        policy.check(len(self.attentions))
        self.configs = {id(one.config): one.config for one in [self.decoder, *self.attentions]}
        self.implementations = {
            key: config._attn_implementation for key, config in self.configs.items()
        }
        self.rotary = getattr(self.decoder, "rotary_emb", None)
        if policy.needs_angles and not hasattr(self.rotary, "inv_freq"):
            raise ValueError(
                f"{type(self.decoder).__name__} has no rotary_emb with inv_freq, but the policy's "
                "settings look at keys before rotary embedding; choose settings that do not."
            )
        # Of the forward call in progress: its ids and mask, positions and rotary embeddings,
        # each layer's cache with its length so far, and the prompt if it computes one.
        self._ids: Any = None
        self._inputs: tuple[Any, Any] = (None, None)
        self._rotated: tuple[Any, Any] = (None, None)
        self._caches: dict[Any, tuple[DynamicCache, int]] = {}
        self._prefill: Prefill | None = None

    # Hooks

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hook into the model, and leave it as it was."""
        if _runners.keys() & self.configs.keys():
            raise ValueError("The model already runs under a KV policy; leave that context first.")
        with ExitStack() as stack:
            for key, config in self.configs.items():
                _runners[key] = self
                stack.callback(_runners.pop, key)
                # The empty key of a mapping is the configuration itself, without its parts.
                restored = {"": self.implementations[key]}
                stack.callback(setattr, config, "_attn_implementation", restored)
                config._attn_implementation = {"": NAME}
            hooks = [
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            ]
            for module in self.attentions:
                before = module.register_forward_pre_hook(self._before_attention, with_kwargs=True)
                hooks.append(before)
            if self.policy.needs_angles and self.rotary is not None:
                after = self.rotary.register_forward_hook(self._after_rotary, with_kwargs=True)
                hooks.append(after)
            for hook in hooks:
                stack.callback(hook.remove)
            yield

    def _before_model(self, module: Any, args: Any, kwargs: Any) -> None:
        self._ids = arguments_by_name(module, args, kwargs).get("input_ids")

    def _before_decoder(self, module: Any, args: Any, kwargs: Any) -> None:
        arguments = arguments_by_name(module, args, kwargs)
        ids = arguments.get("input_ids")
        self._inputs = (self._ids if ids is None else ids, arguments.get("attention_mask"))
        self._ids = self._prefill = None
        self._caches.clear()

    def _after_rotary(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self._rotated = (arguments_by_name(module, args, kwargs).get("position_ids"), output)

    def _before_attention(self, module: Any, args: Any, kwargs: Any) -> None:
        arguments = arguments_by_name(module, args, kwargs)
        cache = arguments.get("past_key_values", arguments.get("past_key_value"))
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; a KV policy compresses a "
                "DynamicCache only (use_cache=True and no cache_implementation)."
            )
        index = module.layer_idx
        self._caches[module] = (cache, cache.get_seq_length(index))
        if index < len(cache.layers) and isinstance(cache.layers[index], CompressedLayer):
            cache.layers[index].awaited = True

    # Attention

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> Output:
        """Attention of one layer: ``[1, n, H, d]`` and, where the model's implementation gives
        them, weights; other shapes as in :class:`vllm_acckv.hf.prefill.Call`."""
        attend = partial(self._implementation(module), module, **options)
        if module not in self._caches:  # another model that shares the configuration
            return attend(query, key, value, mask)
        cache, length_before = self._caches.pop(module)
        if len(query) != 1:
            raise ValueError(f"The batch is {len(query)}; {ONE_SEQUENCE}.")
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        call = Call(module, query, key, value, scale, attend)
        layer = cache.layers[module.layer_idx]
        if length_before == 0:
            check_layer(layer, module, options)
            return self._first(call, mask, cache)
        if isinstance(layer, CompressedLayer):
            return self._later(call, layer)
        if not hasattr(cache, _SEEN):
            raise ValueError(
                f"past_key_values holds {length_before} tokens that were computed without the KV "
                "policy; start inside the context with an empty cache."
            )
        return attend(query, key, value, mask)

    def _implementation(self, module: Any) -> Callable[..., Output]:
        """The attention function the model would call without this context."""
        names = names_of(module)
        name = self.implementations[id(module.config)]
        interface, eager = names["ALL_ATTENTION_FUNCTIONS"], names["eager_attention_forward"]
        implementation: Callable[..., Output] = interface.get_interface(name, eager)
        return implementation

    def mask(self, config: Any, **arguments: Any) -> Any:
        """The mask in the form that the model's implementation takes."""
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(self.implementations[id(config)])
        return None if make is None else make(config=config, **arguments)

    def _first(self, call: Call, mask: Any, cache: DynamicCache) -> Output:
        """The prompt: full attention, then compaction."""
        if self._prefill is None:
            self._prefill = self._start(call)
            setattr(cache, _SEEN, True)
        prefill = self._prefill
        output, weights = call.attend(call.query, call.key, call.value, mask)
        if not prefill.plan.active:
            return output, weights
        with torch.no_grad():
            layer, outcome = prefill.compact(call)
        cache.layers[call.module.layer_idx] = layer
        self.run.layers.append(outcome)
        if prefill.stop < call.key.shape[2]:
            # The last token was held back: it sees the compressed cache like a generated one.
            # (The weights, if anybody asked for them, stay those of the full prompt.)
            last = slice(prefill.stop, None)
            layer.awaited = True
            key, value = layer.update(call.key[:, :, last], call.value[:, :, last])
            held = replace(call, query=call.query[:, :, last], key=key, value=value)
            output = torch.cat([output[:, : prefill.stop], self._later(held, layer)[0]], dim=1)
        return output, weights

    def _later(self, call: Call, layer: CompressedLayer) -> Output:
        """New tokens over a compressed cache."""
        rows, entries = call.query.shape[2], call.key.shape[2]
        mask = None
        if rows > 1:
            mask = self.mask(
                batch_size=1,
                q_length=rows,
                kv_length=entries,
                q_offset=entries - rows,
                mask_function=causal_mask_function,
                dtype=call.query.dtype,
                device=call.query.device,
                config=call.module.config,
            )
        output = call.attend(call.query, call.key, call.value, mask)
        with torch.no_grad():
            layer.evict(call.query[0].transpose(0, 1), call.scale)
        return output

    def _start(self, call: Call) -> Prefill:
        """Plan the prompt of a forward call that just reached its first layer."""
        length = call.key.shape[2]
        ids, attention_mask = self._inputs
        padding = left_padding(attention_mask, length)
        if self.modality is not None:
            modalities = given_modalities(self.modality, length, padding)
        else:
            image_as = self.policy.image_as
            modalities = modalities_of(ids, self.model.config, image_as, length, padding)
        plan = make_plan(modalities, self.policy, self.block_size or 1, len(self.attentions))
        if self.block_size is None and plan.layout.av and self.policy.name != "full":
            plan = replace(plan, skipped=None)
        needs_text = self.policy.needs_trailing_text(plan.layout)
        if plan.active and needs_text and not plan.layout.trailing_text:
            raise ValueError(
                f"The prompt has no text after its last audio-video token; {self.policy.name} "
                "observes the text rows there."
            )
        angles = None
        if plan.active and self.policy.needs_angles:
            apply = names_of(call.module).get("apply_rotary_pos_emb")
            angles = rotary_angles(self.rotary, *self._rotated, apply, call.key.shape[3])
            angles = angles[padding : padding + plan.end]
        prefill = Prefill(plan, padding, angles, self.block_size)
        self.run.skipped, self.run.layers = plan.skipped, []
        return prefill


# By identity of the decoder's configuration, the one thing attention and mask both come with.
_runners: dict[int, _Runner] = {}


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **options: Any,
) -> Output:
    runner = _runners[id(module.config)]
    return runner.attention(module, query, key, value, attention_mask, options)


def _mask(*, config: Any, **arguments: Any) -> Any:
    return _runners[id(config)].mask(config, **arguments)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
