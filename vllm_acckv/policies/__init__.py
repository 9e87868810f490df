# SPDX-License-Identifier: Apache-2.0
"""KV policies: pure PyTorch, no engine. One file per policy, one row in :data:`TABLE`."""

from __future__ import annotations

from collections.abc import Callable

from vllm_acckv.config import KVPolicyConfig
from vllm_acckv.policies.acckv import AccKV
from vllm_acckv.policies.base import Policy

# Names as in ``vllm_acckv.config.POLICIES``; ``full`` compresses nothing.
TABLE: dict[str, Callable[[KVPolicyConfig], Policy] | None] = {"acckv": AccKV, "full": None}


def make_policy(config: KVPolicyConfig) -> Policy | None:
    """The policy that ``config`` names, or ``None`` for one that keeps everything."""
    make = TABLE[config.policy]
    return None if make is None else make(config)


__all__ = ["TABLE", "AccKV", "Policy", "make_policy"]
