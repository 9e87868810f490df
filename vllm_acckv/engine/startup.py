# SPDX-License-Identifier: Apache-2.0
"""Switching a KV policy on, and refusing what it does not work with.

:func:`prepare` runs in the process that parses the arguments. The other processes learn of the
policy through the configuration: workers import :mod:`vllm_acckv.engine.worker_extension`,
scheduler and workers create :class:`vllm_acckv.engine.connector.KVPolicyConnector`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_acckv.config import KVPolicyConfig, KVPolicyError
from vllm_acckv.engine import compat, front_end

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONNECTOR = "KVPolicyConnector"
CONNECTOR_MODULE = "vllm_acckv.engine.connector"
WORKER_EXTENSION = "vllm_acckv.engine.worker_extension.KVPolicyWorkerExtension"

# Backends we extend: vLLM's name -> ours.
BACKENDS = {
    AttentionBackendEnum.CPU_ATTN: "vllm_acckv.engine.cpu_attention.KVPolicyCPUAttentionBackend",
}


def activate() -> None:
    """Make attention layers of this process use our backends."""
    for backend, path in BACKENDS.items():
        if backend.is_overridden() and backend.get_path() != path:
            raise KVPolicyError(
                f"Another plugin replaced the attention backend {backend.name} by "
                f"{backend.get_path()}; a KV policy needs it, so remove one of the two."
            )
        register_backend(backend, path)


def deactivate() -> None:
    """Undo :func:`activate` for engines created in this process from now on."""
    for backend, path in BACKENDS.items():
        if backend.is_overridden() and backend.get_path() == path:
            backend.clear_override()


def prepare(engine_args: Any, policy: KVPolicyConfig) -> None:
    """Check the installation and name our worker extension and connector in ``engine_args``.

    Raises:
        KVPolicyError: for an option that clashes with a KV policy.
        IncompatibleVLLMError: for a vLLM that this package does not know.
    """
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    compat.check_version()
    if not current_platform.is_cpu():
        raise KVPolicyError(
            f"--kv-policy {policy.policy} runs on vLLM's CPU backend only so far, and this is "
            f"{current_platform.device_name}; serve without a KV policy."
        )
    transfer = engine_args.kv_transfer_config
    if engine_args.kv_offloading_size or (transfer and transfer.kv_connector != CONNECTOR):
        raise KVPolicyError(_clash(policy, "KV transfer and offloading (--kv-transfer-config)"))
    if engine_args.worker_extension_cls not in ("", WORKER_EXTENSION):
        raise KVPolicyError(_clash(policy, "--worker-extension-cls"))
    activate()
    front_end.install()
    # A producer that never hands anything over: it only carries counters and plans.
    engine_args.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR, kv_connector_module_path=CONNECTOR_MODULE, kv_role="kv_producer"
    )
    engine_args.worker_extension_cls = WORKER_EXTENSION


def check_supported(config: VllmConfig, policy: KVPolicyConfig) -> None:
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
                f"--kv-policy {policy.policy} does not support {architecture}: {what}. "
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
            raise KVPolicyError(_clash(policy, what))


def _clash(policy: KVPolicyConfig, what: str) -> str:
    return f"--kv-policy {policy.policy} does not work together with {what}; remove one of the two."
