# SPDX-License-Identifier: Apache-2.0
"""Settings: every wrong value gets one sentence that names it and what is allowed."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from vllm_acckv.config import KVPolicyError, for_request, from_mapping, to_mapping
from vllm_acckv.policies import BUILT_IN, make_policy, policy_class, policy_names
from vllm_acckv.policies.acckv import CORRECTED, PAPER

NAMES = ", ".join(policy_names())

WRONG = [
    ({"policy": "h2o2"}, rf"^--kv-policy is 'h2o2'; it must be one of {NAMES}\.$"),
    ({"policy": 3}, r"^--kv-policy is 3; it must be one of acckv, acckv_plus"),
    ({"budget": 0}, r"^--kv-budget is 0; it must be a ratio in \(0, 1\] or a whole number above 1"),
    ({"budget": -1}, r"^--kv-budget is -1; it must be a ratio in \(0, 1\]"),
    ({"budget": 1.5}, r"^--kv-budget is 1\.5; it must be .* whole number above 1"),
    ({"budget": "abc"}, r"^--kv-budget is 'abc'; it must be .*number"),
    ({"budget": float("nan")}, r"^--kv-budget is nan; it must be .*number"),
    ({"budget": float("inf")}, r"^--kv-budget is inf; it must be .*number"),
    ({"budget": "1e400"}, r"^--kv-budget is '1e400'; it must be .*number"),
    ({"budget": True}, r"^--kv-budget is True; it must be .*number"),
    ({"budget": None}, r"^--kv-budget is None; it must be .*number"),
    ({"tau": 1.01}, r"^--kv-tau is 1\.01; it must be a number in \[-1, 1\]"),
    ({"tau": -0.5, "tau_mode": "quantile"}, r"^--kv-tau is -0\.5; it must be a number in \[0, 1\]"),
    (
        {"tau": -0.5, "tau_mode": "median"},
        r"^--kv-policy-config tau_mode is 'median'; it must be .*'absolute_pre_rope' or 'quantile'",
    ),
    ({"head_mode": "rows"}, r"^--kv-policy-config head_mode is 'rows'; it must be .*'head'"),
    (
        {"redistribution": "x"},
        r"^--kv-policy-config redistribution is 'x'; it must be 'paper', 'visible' or 'off'\.",
    ),
    (
        {"focusing": "yes"},
        r"^--kv-policy-config focusing is 'yes'; it must be .*(bool|true or false)",
    ),
    ({"min_keep_low": -1}, r"^--kv-policy-config min_keep_low is -1; it must be .*0"),
    (
        {"min_keep_low": 1.5},
        r"^--kv-policy-config min_keep_low is 1\.5; it must be .*(integer|whole)",
    ),
    (
        {"policy": "snapkv", "kernel": 4},
        r"^--kv-policy-config kernel is 4; it must be an odd number",
    ),
    (
        {"bugdet": 0.2},
        r"config bugdet is no setting of KV policy acckv; .* policy, budget,.* tau,.* preset",
    ),
    (
        {"policy": "snapkv", "tau": 0.9},
        r"^--kv-tau is no setting of KV policy snapkv; it must be one of policy, budget,.* kernel",
    ),
    (
        {"policy": "snapkv", "preset": "paper"},
        r"^--kv-policy-config preset is 'paper'; it must be left out: snapkv has no presets",
    ),
    ({"preset": "x"}, r"^--kv-policy-config preset is 'x'; it must be one of paper, corrected\.$"),
    ({"preset": ["paper"]}, r"^--kv-policy-config preset is \['paper'\]; it must be one of paper,"),
    ({"preset": "paper", "policy": "h2o2"}, rf"^--kv-policy is 'h2o2'; it must be one of {NAMES}"),
    ({"preset": "paper", "policy": ["acckv"]}, r"^--kv-policy is \['acckv'\]; it must be"),
    ([], r"is \[\]; it must be a JSON object"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_values(values: Any, message: str) -> None:
    with pytest.raises(KVPolicyError, match=message):
        from_mapping(values)


@pytest.mark.parametrize("budget", ["0.2", 0.2, 1, 2, 160, "160", 1.0])
def test_right_budgets(budget: Any) -> None:
    assert make_policy("acckv", budget=budget).budget == float(budget)


def test_acckv_is_the_default() -> None:
    assert from_mapping({}) == make_policy("acckv")
    assert from_mapping({"preset": "paper"}) == make_policy("acckv", **PAPER)


@pytest.mark.parametrize("name", policy_names())
def test_survives_json(name: str) -> None:
    default = make_policy(name)
    spelt_out = make_policy(name, **default.model_dump(mode="json"))
    own = make_policy(name, budget="0.1", image_as="text", compress_before_last_token=True)
    for policy in (default, spelt_out, own):
        copy = from_mapping(json.loads(json.dumps(to_mapping(policy))))
        assert copy == policy
        assert to_mapping(copy) == to_mapping(policy)
    assert spelt_out == default != own
    assert to_mapping(default) == {"policy": name}


def test_settings_of_acckv_survive_json() -> None:
    policy = make_policy(
        "acckv", preset="corrected", tau="0.9", strict_budget="entries", min_keep_low=2
    )
    assert from_mapping(json.loads(json.dumps(to_mapping(policy)))) == policy


@pytest.mark.parametrize("name", BUILT_IN)
def test_is_frozen(name: str) -> None:
    policy = make_policy(name)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        policy.budget = 0.5


@pytest.mark.parametrize(("preset", "settings"), [("paper", PAPER), ("corrected", CORRECTED)])
@pytest.mark.parametrize("name", ["acckv", "position_prior"])
def test_preset_expands(name: str, preset: str, settings: dict[str, Any]) -> None:
    policy = make_policy(name, preset=preset)
    assert {key: getattr(policy, key) for key in settings} == settings
    assert policy == make_policy(name, **settings)
    assert to_mapping(policy) == {"policy": name, **settings}


def test_other_keys_win_over_the_preset() -> None:
    policy = make_policy("acckv", preset="corrected", budget_scope="av", budget=0.5)
    assert policy == make_policy("acckv", **{**CORRECTED, "budget_scope": "av"}, budget=0.5)
    behind = from_mapping({"budget": 0.5, "budget_scope": "av", "preset": "corrected"})
    assert behind == policy


def test_request_settings() -> None:
    server = make_policy("acckv", tau=0.9)
    assert for_request(server, None) is server
    assert for_request(server, {"somebody_else": 1}) is server
    own = for_request(server, {"kv_budget": "0.5", "kv_policy_config": '{"head_mode": "head"}'})
    assert own == make_policy("acckv", budget=0.5, tau=0.9, head_mode="head")
    assert for_request(server, {"kv_policy": "full"}) == make_policy("full")


@pytest.mark.parametrize("config_first", [True, False])
def test_own_keys_of_a_request_win_over_its_config(config_first: bool) -> None:
    pairs = [("kv_policy_config", {"budget": 0.3, "policy": "h2o"}), ("kv_budget", 0.4)]
    own = for_request(make_policy("acckv"), dict(pairs if config_first else pairs[::-1]))
    assert own == make_policy("h2o", budget=0.4)


def test_preset_of_a_request_wins_over_the_server() -> None:
    server = make_policy("acckv", tau=0.9, head_mode="head", budget_scope="total")
    assert for_request(server, {"kv_policy_config": {"preset": "paper"}}) == make_policy(
        "acckv", tau=0.9, **PAPER
    )
    own = {"kv_budget": 0.3, "kv_policy_config": {"preset": "corrected", "head_mode": "head"}}
    assert for_request(server, own) == make_policy(
        "acckv", tau=0.9, budget=0.3, **{**CORRECTED, "head_mode": "head"}
    )
    corrected = make_policy("acckv", preset="corrected")
    assert for_request(corrected, {"kv_policy_config": {"preset": "paper"}}) == make_policy(
        "acckv", preset="paper"
    )
    assert for_request(
        make_policy("snapkv", kernel=7, budget=0.4),
        {"kv_policy": "acckv", "kv_policy_config": {"preset": "corrected"}},
    ) == make_policy("acckv", preset="corrected", budget=0.4)


def test_another_policy_inherits_what_both_have() -> None:
    server = make_policy("acckv", preset="corrected", budget=0.3, tau=0.9, image_as="text")
    own = for_request(server, {"kv_policy": "snapkv", "kv_policy_config": {"kernel": 7}})
    assert own == make_policy("snapkv", budget=0.3, budget_scope="total", image_as="text", kernel=7)
    assert for_request(server, {"kv_policy": "position_prior"}) == make_policy(
        "position_prior", preset="corrected", budget=0.3, tau=0.9, image_as="text"
    )
    # What nobody wrote is not inherited: a policy has its own default budget.
    assert for_request(make_policy("acckv"), {"kv_policy": "drop_audio"}).budget == 1.0


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_policy_can_be_asked_for_on_every_server(name: str) -> None:
    for other in BUILT_IN:
        own = for_request(make_policy(other, budget=0.3), {"kv_policy": name})
        assert own == make_policy(name, budget=0.3)
        assert type(own) is policy_class(name)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"kv_budgets": 0.5}, "Unknown request setting 'kv_budgets'; it must be one of kv_policy"),
        ({"kv_policy": "nope"}, f"^kv_policy is 'nope'; it must be one of {NAMES}"),
        ({"kv_policy": None}, "^kv_policy is None; it must be one of acckv"),
        ({"kv_budget": -1}, "^kv_budget is -1; it must be a ratio"),
        ({"kv_tau": "high"}, "^kv_tau is 'high'; it must be .*number"),
        ({"kv_policy_config": {"head_mode": 1}}, "^kv_policy_config head_mode is 1; it must"),
        ({"kv_policy_config": "{"}, "kv_policy_config is '{'; it must be a JSON object"),
        ({"kv_policy_config": "3"}, "kv_policy_config is 3; it must be a JSON object"),
        (
            {"kv_policy_config": '{"x": 1}'},
            "^kv_policy_config x is no setting of KV policy acckv; it must",
        ),
        (
            {"kv_policy": "snapkv", "kv_tau": 0.9},
            "^kv_tau is no setting of KV policy snapkv; it must be",
        ),
        (
            {"kv_policy_config": {"preset": "x"}},
            r"^kv_policy_config preset is 'x'; it must be one of paper, corrected\.$",
        ),
        (
            {"kv_policy": "h2o", "kv_policy_config": '{"preset": "paper"}'},
            "^kv_policy_config preset is 'paper'; it must be left out: h2o has no presets",
        ),
        ({"kv_policy_config": {"preset": ["x"]}}, r"^kv_policy_config preset is \['x'\]; it must"),
    ],
)
def test_wrong_request_settings(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(KVPolicyError, match=message):
        for_request(make_policy("acckv"), extra_args)


@pytest.mark.parametrize("name", policy_names())
def test_huge_numbers_are_refused_where_they_enter(name: str) -> None:
    """Nothing that a request may contain reaches a kernel that counts in 32 bits."""
    fields = policy_class(name).model_fields
    assert {"budget", "image_as"} <= fields.keys()
    for key, field in fields.items():
        if field.annotation is int:
            for value in (10**30, 2**31, -1):
                with pytest.raises(KVPolicyError, match=rf"{key} is {value}; it must be"):
                    for_request(
                        make_policy("acckv"), {"kv_policy": name, "kv_policy_config": {key: value}}
                    )
    with pytest.raises(KVPolicyError, match=r"kv_policy_config is '.*it must be a JSON object"):
        for_request(make_policy("acckv"), {"kv_policy_config": '{"seed": ' + "9" * 5000 + "}"})
