# SPDX-License-Identifier: Apache-2.0
"""Requests are checked where they enter, so that a wrong one gets its own error and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_acckv.config import KVPolicyError, RequestLimits, for_request, in_request_terms
from vllm_acckv.engine import compat, flags
from vllm_acckv.engine.supported import Refusal, check_policy, refuse
from vllm_acckv.policies.base import Policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ANYTHING = RequestLimits()

REQUESTS = (
    Refusal(
        "Streaming input",
        "the prompt is not complete when it is compressed",
        lambda policy, resumable: resumable and policy.name != "full",
        "{name} does not work with --kv-policy {who}, because the prompt is not complete when it "
        "is compressed; send it at once or set kv_policy to full.",
    ),
)


def install() -> None:
    """Wrap the processing of new requests."""
    compat.wrap("process_inputs", _with_policy_check)


def check_request(
    server: Policy,
    params: Any,
    resumable: bool,
    config: VllmConfig,
    limits: RequestLimits = ANYTHING,
) -> None:
    """Refuse a request that the KV policy cannot serve, or whose settings are not allowed.

    Raises:
        KVPolicyError: saying what to change.
    """
    policy = for_request(server, getattr(params, "extra_args", None))
    if policy is not server:  # the request sets something
        limits.check(server, policy)
    try:
        check_policy(config, policy)
    except KVPolicyError as error:
        raise KVPolicyError(in_request_terms(str(error))) from None
    refuse(REQUESTS, policy.name, policy, resumable)


def _with_policy_check(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        config = self.vllm_config
        policy = flags.requested(config.additional_config)
        if policy is not None:
            limits = flags.request_limits(config.additional_config)
            try:
                check_request(policy, params, kwargs.get("resumable", False), config, limits)
            except KVPolicyError as error:
                # The API server answers this with 400, any other error with 500 and no message.
                raise VLLMValidationError(str(error)) from None
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs
