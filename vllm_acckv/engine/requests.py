# SPDX-License-Identifier: Apache-2.0
"""One request of vLLM to one plan, the same on the scheduler and on the worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from vllm_acckv.config import KVPolicyError, for_request
from vllm_acckv.plan import Plan, make_plan
from vllm_acckv.policies.base import Policy
from vllm_acckv.spans import SPAN_HOOKS, Feature, token_modalities


class RequestLike(Protocol):
    """What vLLM's scheduler ``Request`` and the runners' request states have in common."""

    @property
    def sampling_params(self) -> Any: ...

    @property
    def mm_features(self) -> Sequence[Feature]: ...

    @property
    def prompt_token_ids(self) -> Sequence[int] | None: ...

    @property
    def num_prompt_tokens(self) -> int: ...


def plan_request(
    request: RequestLike,
    policy: Policy,
    block_size: int,
    num_layers: int,
    hf_config: Any,
    has_angles: bool = True,
) -> Plan:
    """The plan of ``request``; a pure function of its prompt, its own settings and ``policy``.

    Never raises for what a request may contain: the front end refuses wrong settings, and if one
    slips through, the request stays uncompressed on the scheduler and on the worker alike.

    Args:
        has_angles: whether the engine can tell rotary angles of this model.
    """
    skipped = None
    if request.sampling_params is not None:
        try:
            policy = for_request(policy, request.sampling_params.extra_args)
        except KVPolicyError:
            skipped = "invalid settings"
    if policy.needs_angles and not has_angles:
        skipped = "unknown rotary embedding"
    model_hook = SPAN_HOOKS.get(getattr(hf_config, "model_type", ""))
    token_ids = request.prompt_token_ids
    hook = None
    if model_hook is not None and token_ids is not None:
        hook = lambda modalities: model_hook(modalities, token_ids, hf_config)  # noqa: E731
    modalities = token_modalities(
        request.mm_features, request.num_prompt_tokens, image_as=policy.image_as, hook=hook
    )
    plan = make_plan(modalities, policy, block_size, num_layers)
    return replace(plan, skipped=skipped) if skipped is not None else plan
