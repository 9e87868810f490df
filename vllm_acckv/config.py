# SPDX-License-Identifier: Apache-2.0
"""From what a user wrote (flags, ``additional_config``, a request) to a validated policy.

A policy is described by one flat mapping, ``{"policy": "acckv", "budget": 0.2, ...}``; its keys
are the fields of the policy's class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pydantic
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from vllm_acckv.policies.base import Policy

# Name a user knows a setting by, for error messages; the rest are keys of --kv-policy-config.
_FLAGS = {
    "policy": "--kv-policy",
    "budget": "--kv-budget",
    "tau": "--kv-tau",
    "policies": "--kv-request-policies",
    "max_budget": "--kv-request-max-budget",
}
_REQUEST_KEYS = {"kv_policy": "policy", "kv_budget": "budget", "kv_tau": "tau"}
_REQUEST_CONFIG = "kv_policy_config"

DEFAULT_POLICY = "acckv"


class KVPolicyError(ValueError):
    """A setting of the user that cannot be honoured; the message says what to change."""


class RequestLimits(pydantic.BaseModel):
    """What a request may set about its KV policy. One that sets nothing gets the server's.

    Attributes:
        policies: those it may end up with, as a list or separated by commas; ``None`` for any. If
            empty (``none`` on a command line), it may set nothing.
        max_budget: the largest budget it may end up with, a ratio or a number of tokens.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    policies: tuple[str, ...] | None = None
    max_budget: float | None = None

    @pydantic.field_validator("policies", mode="plain")
    @classmethod
    def _known(cls, names: Any) -> tuple[str, ...]:
        from vllm_acckv.policies import policy_names

        known = policy_names()
        if isinstance(names, str):
            names = [] if names == "none" else [name.strip() for name in names.split(",")]
        if not isinstance(names, (list, tuple)) or any(name not in known for name in names):
            raise PydanticCustomError("policies", f"Input should be none, or of {', '.join(known)}")
        return tuple(names)

    @pydantic.field_validator("max_budget", mode="plain")
    @classmethod
    def _a_budget(cls, value: Any) -> float:
        from vllm_acckv.policies.base import Policy

        try:
            return Policy(budget=value).budget
        except pydantic.ValidationError as error:
            raise PydanticCustomError("budget", error.errors()[0]["msg"]) from None

    def check(self, server: Policy, own: Policy) -> None:
        """Refuse a request's ``own`` policy, made by its settings on top of the ``server``'s.

        Raises:
            KVPolicyError: saying what the request may ask for.
        """
        if self.policies is not None and own.name not in self.policies:
            if not self.policies:
                raise KVPolicyError(
                    "This server does not let requests change its KV policy "
                    "(--kv-request-policies none); leave out kv_policy, kv_budget, kv_tau and "
                    "kv_policy_config."
                )
            raise KVPolicyError(
                f"kv_policy is {own.name!r}; a request that changes the KV policy of this server "
                f"must use {' or '.join(self.policies)} (--kv-request-policies)."
            )
        if self.max_budget is not None:
            self._check_budget(self.max_budget, server, own)

    @staticmethod
    def _check_budget(bound: float, server: Policy, own: Policy) -> None:
        budget, what = own.budget, f"kv_budget is {own.budget:.15g}"
        if own.name == "full":
            budget, what = 1.0, "kv_policy is 'full', which counts as a kv_budget of 1.0"
        limit = f"{bound:.15g} (--kv-request-max-budget)"
        if (budget <= 1) != (bound <= 1):
            kind = "a ratio" if bound <= 1 else "a number of tokens"
            raise KVPolicyError(
                f"{what}; this server bounds it by {kind}, so it must be {kind} of at most {limit}."
            )
        if budget > bound:
            raise KVPolicyError(f"{what}; on this server it must be at most {limit}.")
        # The same number is more of the prompt if it counts less of it.
        for key, least in (("budget_scope", "av"), ("image_as", "text")):
            value, servers = getattr(own, key), getattr(server, key)
            if value == least != servers:
                raise KVPolicyError(
                    f"kv_policy_config {key} is {value!r}; on this server, which bounds budgets, "
                    f"it must be {servers!r} (--kv-request-max-budget)."
                )


def limits_from_mapping(values: Any) -> RequestLimits:
    """Build the limits from JSON-like ``values``, for example
    ``{"policies": ["full"], "max_budget": 0.5}``.

    Raises:
        KVPolicyError: for an unknown key or a value outside its range.
    """
    if not isinstance(values, Mapping):
        raise KVPolicyError(
            f"The limits of requests are {values!r}; they must be a JSON object such as "
            '{"policies": ["full"], "max_budget": 0.5}.'
        )
    for key in values:
        if key not in RequestLimits.model_fields:
            raise KVPolicyError(
                f"{key} is no limit of requests; it must be one of "
                f"{', '.join(RequestLimits.model_fields)}."
            )
    try:
        return RequestLimits(**values)
    except pydantic.ValidationError as error:
        raise KVPolicyError(_sentence(error)) from None


def from_mapping(values: Any) -> Policy:
    """Build a policy from JSON-like ``values``; ``policy`` names it (``acckv`` if absent).

    Raises:
        KVPolicyError: for an unknown key or a value outside its range.
    """
    from vllm_acckv.policies import policy_class

    if not isinstance(values, Mapping):
        raise KVPolicyError(
            f"The KV policy configuration is {values!r}; it must be a JSON object such as "
            '{"policy": "acckv", "budget": 0.2}.'
        )
    fields = _expanded(values)
    name = fields.pop("policy", DEFAULT_POLICY)
    cls = policy_class(name)
    for key in fields:
        if key not in cls.model_fields:
            allowed = ", ".join(["policy", *cls.model_fields, *(["preset"] if cls.presets else [])])
            setting = _FLAGS.get(key, f"--kv-policy-config {key}")
            raise KVPolicyError(
                f"{setting} is no setting of KV policy {name}; it must be one of {allowed}."
            )
    try:
        return cls(**fields)
    except pydantic.ValidationError as error:
        raise KVPolicyError(_sentence(error)) from None


def to_mapping(policy: Policy) -> dict[str, Any]:
    """The JSON-able form of ``policy`` with the settings that were given; see
    :func:`from_mapping`."""
    return {"policy": policy.name, **policy.model_dump(mode="json", exclude_unset=True)}


def for_request(policy: Policy, extra_args: Mapping[str, Any] | None) -> Policy:
    """The server's ``policy`` with a request's own settings.

    A request that names another policy takes over those of the server's settings that this other
    policy has, too.

    Args:
        extra_args: ``SamplingParams.extra_args`` (``vllm_xargs`` in an HTTP body); its keys
            ``kv_policy``, ``kv_budget``, ``kv_tau`` and ``kv_policy_config`` (a JSON object
            or its text) count, other keys belong to others.

    Raises:
        KVPolicyError: for a value outside its range, or a misspelt key.
    """
    own: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        if key in _REQUEST_KEYS:
            own[_REQUEST_KEYS[key]] = value
        elif key == _REQUEST_CONFIG:
            own = {**_json_object(value), **own}
        elif key.startswith(("kv_policy", "kv_budget", "kv_tau")):
            raise KVPolicyError(
                f"Unknown request setting {key!r}; it must be one of "
                f"{', '.join([*_REQUEST_KEYS, _REQUEST_CONFIG])}."
            )
    if not own:
        return policy
    try:
        own = _expanded({"policy": policy.name, **own})
        return from_mapping({**_inherited(policy, own["policy"]), **own})
    except KVPolicyError as error:
        raise KVPolicyError(in_request_terms(str(error))) from None


def in_request_terms(message: str) -> str:
    """``message`` with the request's keys in place of the server's flags."""
    return re.sub(r"--kv-[a-z-]+", lambda flag: flag[0][2:].replace("-", "_"), message)


def _inherited(policy: Policy, name: str) -> dict[str, Any]:
    from vllm_acckv.policies import policy_class

    values = to_mapping(policy)
    if name == policy.name:
        return values
    return {key: value for key, value in values.items() if key in policy_class(name).model_fields}


def _expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``preset`` replaced by what it stands for; other keys win over it."""
    from vllm_acckv.policies import policy_class

    fields = dict(values)
    if "preset" not in fields:
        return fields
    preset, name = fields.pop("preset"), fields.get("policy", DEFAULT_POLICY)
    presets = policy_class(name).presets
    if not isinstance(preset, str) or preset not in presets:
        known = f"one of {', '.join(presets)}" if presets else f"left out: {name} has no presets"
        raise KVPolicyError(f"--kv-policy-config preset is {preset!r}; it must be {known}.")
    return {**presets[preset], **fields}


def _json_object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise KVPolicyError(
                f"{_REQUEST_CONFIG} is {value!r}; it must be a JSON object ({error})."
            ) from None
    if not isinstance(value, Mapping):
        raise KVPolicyError(f"{_REQUEST_CONFIG} is {value!r}; it must be a JSON object.")
    return value


def _sentence(error: pydantic.ValidationError) -> str:
    """The first complaint of pydantic as a sentence that names the setting."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # several settings that do not fit together
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    what = _FLAGS.get(name, f"--kv-policy-config {name}")
    allowed = first["msg"].removeprefix("Input should be ")
    if first["type"] == "bool_type":
        allowed = "true or false"
    return f"{what} is {first['input']!r}; it must be {allowed}."
