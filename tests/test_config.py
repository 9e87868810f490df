# SPDX-License-Identifier: Apache-2.0
"""Settings: every wrong value gets one sentence that names it and what is allowed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from vllm_acckv.config import KVPolicyConfig, KVPolicyError

WRONG = [
    ({"policy": "h2o2"}, r"--kv-policy is 'h2o2'; it must be one of acckv, full\."),
    ({"budget": 0}, r"--kv-budget is 0; it must be a ratio in \(0, 1\]"),
    ({"budget": -1}, r"--kv-budget is -1; it must be"),
    ({"budget": 1.5}, r"--kv-budget is 1\.5; it must be .* whole number above 1"),
    ({"budget": "abc"}, r"--kv-budget is 'abc'; it must be"),
    ({"budget": float("nan")}, r"--kv-budget is nan"),
    ({"budget": float("inf")}, r"--kv-budget is inf"),
    ({"budget": True}, r"--kv-budget is True"),
    ({"budget": None}, r"--kv-budget is None"),
    ({"tau": 1.01}, r"--kv-tau is 1\.01; it must be a number in \[-1, 1\]"),
    ({"tau": -0.5, "tau_mode": "quantile"}, r"--kv-tau is -0\.5; it must be a number in \[0, 1\]"),
    ({"head_mode": "rows"}, r"--kv-policy-config head_mode is 'rows'; it must be one of"),
    ({"focusing": "yes"}, r"--kv-policy-config focusing is 'yes'; it must be true or false"),
    ({"bugdet": 0.2}, r"Unknown key 'bugdet' .* policy, budget, tau"),
    ([], r"must be a JSON object"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_values(values: Any, message: str) -> None:
    with pytest.raises(KVPolicyError, match=message):
        KVPolicyConfig.from_mapping(values)


@pytest.mark.parametrize("budget", ["0.2", 0.2, 1, 2, 160, "160", 1.0])
def test_right_budgets(budget: Any) -> None:
    assert KVPolicyConfig(budget=budget).budget == float(budget)


def test_survives_json_and_is_frozen() -> None:
    config = KVPolicyConfig(budget=0.1, head_mode="head", keep_prefix=False)
    assert KVPolicyConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 0.5  # type: ignore[misc]


def test_request_settings() -> None:
    server = KVPolicyConfig(tau=0.9)
    assert server.for_request(None) is server
    assert server.for_request({"somebody_else": 1}) is server
    own = server.for_request({"kv_budget": "0.5", "kv_policy_config": '{"head_mode": "head"}'})
    assert own == KVPolicyConfig(budget=0.5, tau=0.9, head_mode="head")
    assert server.for_request({"kv_policy": "full"}).policy == "full"


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"kv_budgets": 0.5}, "Unknown request setting 'kv_budgets'; it must be one of kv_policy"),
        ({"kv_policy": "nope"}, "^kv_policy is 'nope'; it must be one of acckv, full"),
        ({"kv_budget": -1}, "^kv_budget is -1; it must be a ratio"),
        ({"kv_policy_config": {"head_mode": 1}}, "^kv_policy_config head_mode is 1; it must"),
        ({"kv_policy_config": "{"}, "kv_policy_config is '{'; it must be a JSON object"),
        ({"kv_policy_config": "3"}, "kv_policy_config is 3; it must be a JSON object"),
        ({"kv_policy_config": '{"x": 1}'}, "Unknown key 'x'"),
    ],
)
def test_wrong_request_settings(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(KVPolicyError, match=message):
        KVPolicyConfig().for_request(extra_args)
