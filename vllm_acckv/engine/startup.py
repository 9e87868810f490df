# SPDX-License-Identifier: Apache-2.0
"""Switching a KV policy on.

:func:`prepare` runs in the process that parses the arguments. The other processes learn of the
policy through the configuration: workers import :mod:`vllm_acckv.engine.worker_extension`,
scheduler and workers create :class:`vllm_acckv.engine.connector.KVPolicyConnector`.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_acckv.engine import compat, front_end
from vllm_acckv.engine.supported import Refusal, refuse
from vllm_acckv.policies.base import Policy

CONNECTOR = "KVPolicyConnector"
CONNECTOR_MODULE = "vllm_acckv.engine.connector"
WORKER_EXTENSION = "vllm_acckv.engine.worker_extension.KVPolicyWorkerExtension"

# Backends we extend: vLLM's name -> ours.
BACKENDS = {
    AttentionBackendEnum.CPU_ATTN: "vllm_acckv.engine.cpu_attention.KVPolicyCPUAttentionBackend",
    AttentionBackendEnum.FLASH_ATTN: (
        "vllm_acckv.engine.gpu_attention.KVPolicyFlashAttentionBackend"
    ),
    AttentionBackendEnum.TRITON_ATTN: (
        "vllm_acckv.engine.gpu_attention.KVPolicyTritonAttentionBackend"
    ),
}


def _transfers(arguments: Any) -> bool:
    transfer = arguments.kv_transfer_config
    return bool(arguments.kv_offloading_size or (transfer and transfer.kv_connector != CONNECTOR))


ARGUMENTS = (
    Refusal(
        "a platform other than CPU and CUDA",
        "only attention backends of these are extended",
        lambda arguments: not (current_platform.is_cpu() or current_platform.is_cuda()),
        "--kv-policy {who} does not run on {name} yet, and this one is {value}; serve without a "
        "KV policy.",
        lambda arguments: str(current_platform.device_name),
    ),
    Refusal(
        "KV transfer and offloading (--kv-transfer-config)",
        "our counters and plans take vLLM's one KV connector, and nobody else knows which blocks "
        "of a request were compacted",
        _transfers,
        which="`--kv-offloading-size` too",
    ),
    Refusal(
        "--worker-extension-cls",
        "vLLM takes one class, and ours registers the attention backend",
        lambda arguments: arguments.worker_extension_cls not in ("", WORKER_EXTENSION),
    ),
)
BACKEND = (
    Refusal(
        "Another plugin replaced the attention backend",
        "the policy runs in our extension of that backend",
        lambda backend, ours: backend.is_overridden() and backend.get_path() != ours,
        "{name} {who} by {value}; a KV policy needs it, so remove one of the two.",
        lambda backend, ours: backend.get_path(),
    ),
)


def activate() -> None:
    """Make attention layers of this process use our backends."""
    for backend, path in BACKENDS.items():
        if (backend is AttentionBackendEnum.CPU_ATTN) != current_platform.is_cpu():
            continue
        refuse(BACKEND, backend.name, backend, path)
        register_backend(backend, path)


def deactivate() -> None:
    """Undo :func:`activate` for engines created in this process from now on."""
    for backend, path in BACKENDS.items():
        if backend.is_overridden() and backend.get_path() == path:
            backend.clear_override()


def prepare(engine_args: Any, policy: Policy) -> None:
    """Check the installation and name our worker extension and connector in ``engine_args``.

    Raises:
        KVPolicyError: for an option that clashes with a KV policy.
        IncompatibleVLLMError: for a vLLM that this package does not know.
    """
    from vllm.config import KVTransferConfig

    compat.check_version()
    refuse(ARGUMENTS, policy.name, engine_args)
    activate()
    front_end.install()
    # A producer that never hands anything over: it only carries counters and plans.
    engine_args.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR, kv_connector_module_path=CONNECTOR_MODULE, kv_role="kv_producer"
    )
    engine_args.worker_extension_cls = WORKER_EXTENSION
