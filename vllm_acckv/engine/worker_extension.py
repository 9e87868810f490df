# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``worker_extension_cls``: imported by every worker before it builds the model."""

from __future__ import annotations

from typing import Any

from vllm_acckv.engine import startup
from vllm_acckv.engine.worker import current_worker

startup.activate()


class KVPolicyWorkerExtension:
    """Methods that ``collective_rpc`` can call on every worker."""

    def kv_policy_record(self) -> None:
        """Start recording what each layer keeps of each request."""
        if (worker := current_worker()) is not None:
            worker.records = {}

    def kv_policy_take_records(self) -> dict[str, dict[str, Any]]:
        """Records since :meth:`kv_policy_record` or the last call: request id -> layer name ->
        ``freed_blocks``, ``video_weight`` (W_v of eq. 4), ``filtered``, ``rejected``, ``tokens``
        and ``merged`` (per KV head)."""
        worker = current_worker()
        if worker is None or worker.records is None:
            return {}
        records, worker.records = worker.records, {}
        return records
