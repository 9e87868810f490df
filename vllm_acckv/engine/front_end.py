# SPDX-License-Identifier: Apache-2.0
"""Requests are checked where they enter, so that a wrong one gets its own error and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_acckv.engine import compat, flags


def install() -> None:
    """Wrap the validation of request parameters."""
    compat.wrap("_validate_params", _with_policy_check)


def _with_policy_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_params(self: Any, params: Any, supported_tasks: Any) -> Any:
        policy = flags.requested(self.vllm_config.additional_config)
        if policy is not None:
            # A KVPolicyError is a ValueError, which the API server answers with 400.
            policy.for_request(getattr(params, "extra_args", None))
        return original(self, params, supported_tasks)

    return _validate_params
