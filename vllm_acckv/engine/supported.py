# SPDX-License-Identifier: Apache-2.0
"""What a KV policy does not work with, refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_acckv.config import KVPolicyError
from vllm_acckv.policies.base import Layer, Policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_supported(config: VllmConfig, policy: Policy) -> None:
    """Refuse, by name, models and options a KV policy does not work with.

    Raises:
        KVPolicyError: naming the clash.
    """
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    scheduler = config.scheduler_config
    architecture = ", ".join(model.architectures)
    models = {
        "it is an encoder-decoder model": model.is_encoder_decoder,
        "it uses multi-head latent attention (MLA)": model.use_mla,
        "it is a hybrid of attention and state-space layers": model.is_hybrid,
        "it has no attention layers": model.is_attention_free,
        "it does not generate text": model.runner_type != "generate",
        "it uses sliding-window attention": model.get_sliding_window() is not None,
        "its attention over clips is bidirectional": model.is_mm_prefix_lm,
        "it takes neither audio nor video": not model.is_multimodal_model,
    }
    for what, unsupported in models.items():
        if unsupported:
            raise KVPolicyError(
                f"--kv-policy {policy.name} does not support {architecture}: {what}. "
                "Serve it without a KV policy."
            )
    options = {
        "speculative decoding (--speculative-config)": config.speculative_config is not None,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype.startswith(("fp8", "nvfp4")),
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "dual-batch overlap (--enable-dbo)": parallel.enable_dbo,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "pipeline parallelism through Ray": parallel.pipeline_parallel_size > 1
        and parallel.distributed_executor_backend == "ray",
        "--max-num-batched-tokens 1": scheduler.max_num_batched_tokens == 1,
        "--max-num-scheduled-tokens 1": scheduler.max_num_scheduled_tokens == 1,
        "--long-prefill-token-threshold 1": scheduler.long_prefill_token_threshold == 1,
    }
    for what, used in options.items():
        if used:
            raise KVPolicyError(clash(policy, what))


def clash(policy: Policy, what: str) -> str:
    return f"--kv-policy {policy.name} does not work together with {what}; remove one of the two."


def num_layers(config: VllmConfig) -> int:
    """Decoder layers of the whole model, over all pipeline stages."""
    return config.model_config.get_total_num_hidden_layers()


def check_policy(config: VllmConfig, policy: Policy) -> None:
    """Refuse settings of a policy that this engine or model cannot serve.

    Raises:
        KVPolicyError: saying what to change.
    """
    count = num_layers(config)
    policy.check(count)
    sources = [policy.score_layer(Layer(index, count)) for index in range(count)]
    if any(source > index for index, source in enumerate(sources)):
        raise KVPolicyError(
            f"--kv-policy {policy.name} decides a layer by a later one, which is not computed by "
            "then; choose another policy."
        )
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1 and sources != list(range(count)):
        raise KVPolicyError(
            f"--kv-policy {policy.name} does not work with pipeline parallelism, because layers "
            "follow the attention of another one; choose another policy."
        )
    if policy.evicts_at_decode:
        raise KVPolicyError(
            "--kv-policy-config decode is 'evict'; vLLM compresses once after prefill, so it must "
            "be 'static' there (vllm_acckv.hf evicts at decode, too)."
        )
