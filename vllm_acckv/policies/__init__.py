# SPDX-License-Identifier: Apache-2.0
"""KV policies: engine-free PyTorch, one module per policy, one row in :data:`BUILT_IN`.

Nothing is imported before a policy is made, so that a command line can name them all for free.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from vllm_acckv.config import KVPolicyError, from_mapping

if TYPE_CHECKING:
    from vllm_acckv.policies.base import Policy

GROUP = "vllm_acckv.policies"

BUILT_IN = {
    "acckv": "vllm_acckv.policies.acckv:AccKV",
    "acckv_plus": "vllm_acckv.policies.acckv_plus:AccKVPlus",
    "cross_merge": "vllm_acckv.policies.cross_merge:CrossMerge",
    "drop_audio": "vllm_acckv.policies.drop:DropAudio",
    "drop_video": "vllm_acckv.policies.drop:DropVideo",
    "fastv": "vllm_acckv.policies.fastv:FastV",
    "full": "vllm_acckv.policies.full:Full",
    "h2o": "vllm_acckv.policies.h2o:H2O",
    "lookm": "vllm_acckv.policies.lookm:LookM",
    "position_prior": "vllm_acckv.policies.position_prior:PositionPrior",
    "pyramidkv": "vllm_acckv.policies.pyramidkv:PyramidKV",
    "random": "vllm_acckv.policies.random:Random",
    "recent": "vllm_acckv.policies.recent:Recent",
    "snapkv": "vllm_acckv.policies.snapkv:SnapKV",
    "streaming": "vllm_acckv.policies.streaming:Streaming",
}


def policy_names() -> tuple[str, ...]:
    """Every policy that can be asked for: built in, or an entry point ``vllm_acckv.policies``."""
    return (*BUILT_IN, *sorted({entry.name for entry in _entries()} - BUILT_IN.keys()))


def policy_class(name: Any) -> type[Policy]:
    """The class of a policy.

    Raises:
        KVPolicyError: for an unknown name, or an entry point that cannot be loaded.
    """
    from vllm_acckv.policies.base import Policy

    entries = [entry for entry in _entries() if entry.name == name]
    if isinstance(name, str) and name in BUILT_IN:
        entries = [EntryPoint(name, BUILT_IN[name], GROUP), *entries]
    if not entries:
        raise KVPolicyError(
            f"--kv-policy is {name!r}; it must be one of {', '.join(policy_names())}."
        )
    if len(entries) > 1:
        raise KVPolicyError(
            f"Several packages define the KV policy {name!r} "
            f"({', '.join(entry.value for entry in entries)}); uninstall all but one."
        )
    try:
        found = entries[0].load()
    except Exception as error:  # whatever a package does on import
        raise KVPolicyError(
            f"The KV policy {name!r} cannot be loaded from {entries[0].value} ({error}); repair or "
            "uninstall its package."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise KVPolicyError(
            f"The KV policy {name!r} of {entries[0].value} is not a subclass of "
            "vllm_acckv.policies.base.Policy; repair or uninstall its package."
        )
    return found


def make_policy(name: str, **options: Any) -> Policy:
    """A policy by name, for example ``make_policy("acckv", budget=0.2, tau=0.9)``.

    Args:
        options: fields of the policy's class; ``preset`` where the class has presets.

    Raises:
        KVPolicyError: (a ``ValueError``) for an unknown name or option, or a value outside its
            range.
    """
    return from_mapping({"policy": name, **options})


def _entries() -> tuple[EntryPoint, ...]:
    return _installed(tuple(sys.path))


@lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of the packages on ``path``; reading them takes milliseconds."""
    return tuple(entry_points(group=GROUP))


__all__ = ["BUILT_IN", "GROUP", "make_policy", "policy_class", "policy_names"]
