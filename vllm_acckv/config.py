# SPDX-License-Identifier: Apache-2.0
"""The validated, immutable description of what a KV policy shall do.

One object serves the command line, ``additional_config`` and the tests. Nothing here imports
vLLM or torch, so flags can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

POLICIES = ("acckv", "full")

# Name a user knows each field by, for error messages; the rest are keys of --kv-policy-config.
_FLAGS = {"policy": "--kv-policy", "budget": "--kv-budget", "tau": "--kv-tau"}
_REQUEST_KEYS = {"kv_policy": "policy", "kv_budget": "budget", "kv_tau": "tau"}
_REQUEST_CONFIG = "kv_policy_config"

_CHOICES: dict[str, tuple[str, ...]] = {
    "policy": POLICIES,
    "redistribution": ("paper", "visible", "off"),
    "head_mode": ("layer", "head"),
    "tau_mode": ("absolute", "absolute_pre_rope", "quantile"),
    "merge_space": ("post_rope", "pre_rope"),
    "budget_scope": ("av", "total"),
    "image_as": ("video", "text"),
}


class KVPolicyError(ValueError):
    """A setting of the user that cannot be honoured; the message says what to change."""


@dataclass(frozen=True)
class KVPolicyConfig:
    """Settings of a KV policy. Defaults are those of the AccKV paper (arXiv 2511.11106).

    Attributes:
        policy: ``acckv``, or ``full`` which keeps everything.
        budget: audio-video tokens to keep: a ratio ``0 < r <= 1`` or a whole number ``> 1``.
        tau: similarity below which a low-priority token is dropped (eq. 17). The paper uses
            0.6 and 0.9 and names no default.
        redistribution: eq. 1 as printed (``paper``), corrected for the rows that are summed
            (``visible``), or not at all (``off``).
        focusing: weigh tokens by the attention their modality gets in the layer (eq. 3-5).
        calibration: merge inside each modality and filter by similarity (eq. 8-18).
        head_mode: one selection per ``layer``, or one per KV ``head``.
        tau_mode: cosine of the cached keys (``absolute``), of the keys before rotary embedding
            (``absolute_pre_rope``), or the ``quantile`` of each layer's own similarities.
        merge_space: average keys as cached (``post_rope``), or un-rotated and rotated back to
            the mean position (``pre_rope``).
        budget_scope: whether ``budget`` counts audio-video tokens (``av``) or the whole prompt
            (``total``).
        keep_prefix: keep text in front of and between the clips (the paper's eq. 17 would drop
            it together with the attention sink).
        image_as: treat image tokens as ``video``, or as ``text``, which is always kept.
        compress_before_last_token: compress before the last prompt token is computed, so that
            the first answer token already sees the compressed cache.
    """

    policy: str = "acckv"
    budget: float = 0.2
    tau: float = 0.6
    redistribution: str = "paper"
    focusing: bool = True
    calibration: bool = True
    head_mode: str = "layer"
    tau_mode: str = "absolute"
    merge_space: str = "post_rope"
    budget_scope: str = "av"
    keep_prefix: bool = True
    image_as: str = "video"
    compress_before_last_token: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                _reject(name, getattr(self, name), "one of " + ", ".join(choices))
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool) and not isinstance(getattr(self, field.name), bool):
                _reject(field.name, getattr(self, field.name), "true or false")
        object.__setattr__(self, "budget", _budget(self.budget))
        object.__setattr__(self, "tau", _tau(self.tau, self.tau_mode))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> KVPolicyConfig:
        """Build from JSON-like ``values``.

        Raises:
            KVPolicyError: for an unknown key or a value outside its range.
        """
        if not isinstance(values, Mapping):
            raise KVPolicyError(
                f"The KV policy configuration is {values!r}; it must be a JSON object such as "
                '{"policy": "acckv", "budget": 0.2}.'
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise KVPolicyError(
                    f"Unknown key {key!r} in the KV policy configuration; it must be one of "
                    f"{', '.join(known)}."
                )
        return cls(**values)

    def for_request(self, extra_args: Mapping[str, Any] | None) -> KVPolicyConfig:
        """These settings with a request's own.

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
        try:
            return self.from_mapping({**self.to_mapping(), **own}) if own else self
        except KVPolicyError as error:
            # Name the request's key instead of the server's flag.
            named = re.sub(r"^--kv-\S+", lambda flag: flag[0][2:].replace("-", "_"), str(error))
            raise KVPolicyError(named) from None

    def to_mapping(self) -> dict[str, Any]:
        """The JSON-able form that travels in ``VllmConfig.additional_config``."""
        return dataclasses.asdict(self)


def _json_object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            _reject_text(_REQUEST_CONFIG, value, f"a JSON object ({error})")
    if not isinstance(value, Mapping):
        _reject_text(_REQUEST_CONFIG, value, "a JSON object")
    return value


def _budget(value: Any) -> float:
    number = _number("budget", value, what := "a ratio in (0, 1] or a whole number above 1")
    if number <= 0 or (number > 1 and number != int(number)):
        _reject("budget", value, what)
    return number


def _tau(value: Any, mode: str) -> float:
    low = 0.0 if mode == "quantile" else -1.0
    number = _number("tau", value, what := f"a number in [{low:g}, 1]")
    if not low <= number <= 1:
        _reject("tau", value, what)
    return number


def _number(name: str, value: Any, what: str) -> float:
    if isinstance(value, bool):
        _reject(name, value, what)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        _reject(name, value, what)
    if not math.isfinite(number):
        _reject(name, value, what)
    return number


def _reject(name: str, value: Any, allowed: str) -> Any:
    return _reject_text(_FLAGS.get(name, f"--kv-policy-config {name}"), value, allowed)


def _reject_text(what: str, value: Any, allowed: str) -> Any:
    raise KVPolicyError(f"{what} is {value!r}; it must be {allowed}.")
