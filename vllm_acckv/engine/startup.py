# SPDX-License-Identifier: Apache-2.0
"""Switching a KV policy on.

:func:`prepare` runs in the process that parses the arguments. The other processes learn of the
policy through the configuration: workers import :mod:`vllm_acckv.engine.worker_extension`,
scheduler and workers create :class:`vllm_acckv.engine.connector.KVPolicyConnector`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine import compat, front_end
from vllm_acckv.engine.supported import clash
from vllm_acckv.policies.base import Policy

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


def prepare(engine_args: Any, policy: Policy) -> None:
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
            f"--kv-policy {policy.name} runs on vLLM's CPU backend only so far, and this is "
            f"{current_platform.device_name}; serve without a KV policy."
        )
    transfer = engine_args.kv_transfer_config
    if engine_args.kv_offloading_size or (transfer and transfer.kv_connector != CONNECTOR):
        raise KVPolicyError(clash(policy, "KV transfer and offloading (--kv-transfer-config)"))
    if engine_args.worker_extension_cls not in ("", WORKER_EXTENSION):
        raise KVPolicyError(clash(policy, "--worker-extension-cls"))
    activate()
    front_end.install()
    # A producer that never hands anything over: it only carries counters and plans.
    engine_args.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR, kv_connector_module_path=CONNECTOR_MODULE, kv_role="kv_producer"
    )
    engine_args.worker_extension_cls = WORKER_EXTENSION
