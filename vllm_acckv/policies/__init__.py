# SPDX-License-Identifier: Apache-2.0
"""KV policies: pure PyTorch, no engine. One file per policy, one row in :func:`make_policy`."""

from __future__ import annotations

from vllm_acckv.config import KVPolicyConfig
from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.policies.base import Policy


def make_policy(config: KVPolicyConfig) -> Policy | None:
    """The policy that ``config`` names, or ``None`` for ``full``, which compresses nothing."""
    return None if config.policy == "full" else AccKV(config)


__all__ = ["AccKV", "Policy", "make_policy"]
