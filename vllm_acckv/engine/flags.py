# SPDX-License-Identifier: Apache-2.0
"""``--kv-policy`` and its companions on ``vllm serve``, carried in ``additional_config``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_acckv.config import (
    DEFAULT_POLICY,
    KVPolicyError,
    RequestLimits,
    from_mapping,
    limits_from_mapping,
    to_mapping,
)
from vllm_acckv.engine import compat
from vllm_acckv.policies import policy_names

if TYPE_CHECKING:
    from vllm_acckv.policies.base import Policy

CONFIG_KEY = "kv_policy"
LIMITS_KEY = "kv_policy_requests"
COPIES_KEY = "kv_policy_prefix_copies"
"""Keys of ``additional_config``. The last one is for measurements: false makes no copies of prompt
blocks for the prefix cache, see :mod:`vllm_acckv.engine.prefix_copies`."""

# Settings with a flag of their own -> where the parser puts their values.
_FLAGS = {"policy": "kv_policy", "budget": "kv_budget", "tau": "kv_tau"}
_LIMITS = {"policies": "kv_request_policies", "max_budget": "kv_request_max_budget"}


def install() -> None:
    """Wrap the three functions of ``EngineArgs`` that turn arguments into a configuration."""
    compat.wrap("add_cli_args", _with_flags)
    compat.wrap("from_cli_args", _with_sentences)
    compat.wrap("create_engine_config", _with_policy)


def requested(additional_config: Any) -> Policy | None:
    """The KV policy asked for in ``additional_config``, or ``None``.

    Raises:
        KVPolicyError: if it is not valid.
    """
    if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
        return None
    value = additional_config[CONFIG_KEY]
    return from_mapping({"policy": value} if isinstance(value, str) else value)


def request_limits(additional_config: Any) -> RequestLimits:
    """What ``additional_config`` lets requests set.

    Raises:
        KVPolicyError: if it is not valid.
    """
    if not isinstance(additional_config, dict) or LIMITS_KEY not in additional_config:
        return RequestLimits()
    if CONFIG_KEY not in additional_config:
        raise KVPolicyError(
            f"{LIMITS_KEY} in the additional configuration needs {CONFIG_KEY}; without a KV policy "
            "there is nothing that a request may set."
        )
    return limits_from_mapping(additional_config[LIMITS_KEY])


def check_keys(additional_config: Any) -> None:
    """Refuse what would be ignored: a misspelt limit must not let everybody in.

    Raises:
        KVPolicyError: naming the key.
    """
    if not isinstance(additional_config, dict):
        return
    known = (CONFIG_KEY, LIMITS_KEY, COPIES_KEY)
    for key in additional_config:
        if str(key).startswith(CONFIG_KEY) and key not in known:
            raise KVPolicyError(
                f"{key} in the additional configuration is unknown; the keys of a KV policy are "
                f"{', '.join(known)}."
            )
    if not isinstance(additional_config.get(COPIES_KEY, True), bool):
        raise KVPolicyError(
            f"{COPIES_KEY} in the additional configuration is {additional_config[COPIES_KEY]!r}; "
            "it must be true or false."
        )


def _with_flags(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="KVPolicy",
            description="Compression of the audio-video part of the KV cache (vllm-acckv).",
        )
        group.add_argument(
            "--kv-policy",
            type=_known_policy,
            default=None,
            help=f"KV policy applied after prefill: one of {', '.join(policy_names())}. "
            "Unset leaves vLLM as it is.",
        )
        group.add_argument(
            "--kv-budget",
            type=_checked("budget"),
            default=None,
            help="Audio-video tokens to keep: a ratio 0 < r <= 1, or a whole number of tokens "
            "above 1; 0.2 for most policies if not given.",
        )
        group.add_argument(
            "--kv-tau",
            type=_checked("tau"),
            default=None,
            help="AccKV's similarity below which a token of the less important modality is "
            "dropped, -1 (drop none) to 1; 0.6 if not given. Write a negative value as "
            "--kv-tau=-1.",
        )
        group.add_argument(
            "--kv-policy-config",
            type=_json_config,
            default=None,
            help="Further settings of the policy as a JSON object, for example "
            '\'{"redistribution": "visible", "head_mode": "head"}\'.',
        )
        group.add_argument(
            "--kv-request-policies",
            type=_limit("policies"),
            default=None,
            help="Policies that a request may use if it sets anything about its KV policy, "
            "separated by commas; none: requests may set nothing. Any if not given.",
        )
        group.add_argument(
            "--kv-request-max-budget",
            type=_limit("max_budget"),
            default=None,
            help="Largest budget of a request that sets anything about its KV policy: a ratio or "
            "a number of tokens, and requests must give the same kind; full counts as 1.0.",
        )
        _folding(parser)
        return parser

    return add_cli_args


def _known_policy(text: str) -> str:
    if text not in policy_names():
        raise argparse.ArgumentTypeError(
            f"--kv-policy is {text!r}; it must be one of {', '.join(policy_names())}."
        )
    return text


def _checked(name: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            return getattr(from_mapping({"policy": DEFAULT_POLICY, name: text}), name)
        except KVPolicyError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def _limit(name: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            return limits_from_mapping({name: text}).model_dump(mode="json")[name]
        except KVPolicyError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def _json_config(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"--kv-policy-config is {text!r}; it must be a JSON object ({error})."
        ) from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(
            f"--kv-policy-config is {text!r}; it must be a JSON object."
        )
    return values


def _folding(parser: Any) -> None:
    """Let ``parser`` move the flags' values into ``additional_config`` as soon as they are read.

    ``vllm serve`` may hand the parsed arguments to processes that load no plugin before they
    turn them into a configuration; there, ``additional_config`` is all that counts.
    """
    parse = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse(*args, **kwargs)
        try:
            _fold(namespace)
        except KVPolicyError as error:
            raise SystemExit(f"error: {error}") from None
        return namespace, rest

    parser.parse_known_args = parse_known_args


def _fold(namespace: argparse.Namespace) -> None:
    policy, limits = _from_flags(namespace), _given(namespace, _LIMITS)
    if policy is None and not limits:
        return
    additional = getattr(namespace, "additional_config", None) or {}
    if not isinstance(additional, dict):
        raise KVPolicyError(
            f"--additional-config is {additional!r}; with a KV policy it must be a JSON object."
        )
    if policy is not None:
        what = "The KV policy is given both by --kv-policy"
        additional = _with(additional, CONFIG_KEY, to_mapping(policy), what)
    if limits:
        if CONFIG_KEY not in additional:
            raise KVPolicyError(
                "--kv-request-policies and --kv-request-max-budget need --kv-policy, for example "
                "--kv-policy acckv."
            )
        what = "What requests may set is given both by --kv-request-* flags"
        additional = _with(additional, LIMITS_KEY, limits, what)
    namespace.additional_config = additional
    for flag in (*_FLAGS.values(), *_LIMITS.values(), "kv_policy_config"):
        setattr(namespace, flag, None)


def _with(additional: dict[str, Any], key: str, value: Any, what: str) -> dict[str, Any]:
    if key in additional:
        raise KVPolicyError(f"{what} and in --additional-config; use one of them.")
    return {**additional, key: value}


def _given(args: argparse.Namespace, flags: dict[str, str]) -> dict[str, Any]:
    """Values of those ``flags`` that were given, by setting."""
    return {
        key: value
        for key, flag in flags.items()
        if (value := getattr(args, flag, None)) is not None
    }


def _with_sentences(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: type, args: argparse.Namespace) -> Any:
        engine_args = original(cls, args)
        engine_args.kv_policy_from_cli = True
        return engine_args

    return from_cli_args


def _from_flags(args: argparse.Namespace) -> Policy | None:
    given = _given(args, _FLAGS)
    values = getattr(args, "kv_policy_config", None) or {}
    if "policy" not in given and "policy" not in values:
        if given or values:
            raise KVPolicyError(
                "--kv-budget, --kv-tau and --kv-policy-config need --kv-policy, for example "
                "--kv-policy acckv."
            )
        return None
    for key in given.keys() & values.keys():
        if given[key] != values[key]:
            raise KVPolicyError(
                f"--{_FLAGS[key].replace('_', '-')} is {given[key]!r} but --kv-policy-config has "
                f"{key}={values[key]!r}; give it once."
            )
    return from_mapping({**values, **given})


def _with_policy(original: Callable[..., Any]) -> Callable[..., Any]:
    startup_module = "vllm_acckv.engine.startup"

    def create_engine_config(self: Any, usage_context: Any = None, headless: bool = False) -> Any:
        try:
            check_keys(self.additional_config)
            policy = requested(self.additional_config)
            request_limits(self.additional_config)
            if policy is None and startup_module not in sys.modules:
                return original(self, usage_context, headless)
            from vllm_acckv.engine import startup, supported

            if policy is None:
                startup.deactivate()
                return original(self, usage_context, headless)
            startup.prepare(self, policy)
            config = original(self, usage_context, headless)
            supported.check_supported(config, policy)
            supported.check_policy(config, policy)
            return config
        except (KVPolicyError, compat.IncompatibleVLLMError) as error:
            if getattr(self, "kv_policy_from_cli", False):
                raise SystemExit(f"error: {error}") from None
            raise

    return create_engine_config
