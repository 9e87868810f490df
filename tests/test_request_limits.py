# SPDX-License-Identifier: Apache-2.0
"""What an operator lets requests set about their KV policy."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_acckv.config import KVPolicyError, RequestLimits, limits_from_mapping
from vllm_acckv.engine import flags, front_end
from vllm_acckv.policies import make_policy, policy_names

CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 28),
    parallel_config=SimpleNamespace(pipeline_parallel_size=1),
)
ACCKV = make_policy("acckv")


def check(limits: dict[str, Any], xargs: dict[str, Any] | None, server: Any = ACCKV) -> None:
    """What the front end does with a request."""
    params = SimpleNamespace(extra_args=xargs)
    front_end.check_request(server, params, False, CONFIG, limits_from_mapping(limits))


NOTHING = [None, {}, {"somebody_else": 1}, {"kv_policy_config": {}}, {"kv_policy_config": "{}"}]
SOMETHING = [
    {"kv_policy": "acckv"},
    {"kv_policy": "full"},
    {"kv_budget": 0.2},
    {"kv_tau": 0.6},
    {"kv_policy_config": {"preset": "paper"}},
    {"kv_policy_config": '{"budget": 0.1}'},
]


@pytest.mark.parametrize("xargs", NOTHING)
@pytest.mark.parametrize("server", [ACCKV, make_policy("full"), make_policy("recent", budget=300)])
def test_a_request_that_sets_nothing_gets_the_servers_policy(xargs: Any, server: Any) -> None:
    check({"policies": [], "max_budget": 0.01}, xargs, server)
    check({"policies": ["snapkv"], "max_budget": 2}, xargs, server)


@pytest.mark.parametrize("xargs", SOMETHING)
def test_requests_may_set_nothing(xargs: dict[str, Any]) -> None:
    check({}, xargs)
    with pytest.raises(KVPolicyError, match=r"does not let requests change its KV policy \(--kv-r"):
        check({"policies": []}, xargs)


@pytest.mark.parametrize(
    ("policies", "xargs", "sentence"),
    [
        (["acckv", "full"], {"kv_policy": "full"}, None),
        (["acckv", "full"], {"kv_tau": 0.9}, None),
        (
            ["acckv", "full"],
            {"kv_policy": "h2o"},
            r"^kv_policy is 'h2o'; .* acckv or full \(--kv-request-policies\)\.$",
        ),
        (["full"], {"kv_policy_config": {"policy": "fastv"}}, "^kv_policy is 'fastv'; .* full"),
        (["full"], {"kv_tau": 0.9}, "^kv_policy is 'acckv'; .* must use full"),
    ],
)
def test_policies_that_requests_may_use(
    policies: list[str], xargs: dict[str, Any], sentence: str | None
) -> None:
    if sentence is None:
        check({"policies": policies}, xargs)
        return
    with pytest.raises(KVPolicyError, match=sentence):
        check({"policies": policies}, xargs)


@pytest.mark.parametrize(
    ("bound", "server", "xargs"),
    [
        (0.3, {}, {"kv_budget": 0.3}),
        (0.3, {}, {"kv_tau": 0.9}),
        (0.3, {"budget": 0.5}, {"kv_budget": 0.1}),
        (0.3, {"budget": 160}, {"kv_budget": 0.1}),
        (160, {}, {"kv_budget": "160"}),
        (160, {"budget": 100}, {"kv_policy": "snapkv"}),
        (1.0, {}, {"kv_policy": "full"}),
        (1.0, {}, {"kv_policy": "drop_audio"}),
        (0.3, {}, {"kv_policy_config": {"preset": "corrected"}}),
    ],
)
def test_budgets_within_the_bound(bound: float, server: Any, xargs: dict[str, Any]) -> None:
    check({"max_budget": bound}, xargs, make_policy("acckv", **server))


@pytest.mark.parametrize(
    ("bound", "server", "xargs", "sentence"),
    [
        (
            0.3,
            {},
            {"kv_budget": 0.31},
            r"^kv_budget is 0\.31; .* at most 0\.3 \(--kv-request-max-b",
        ),
        (0.3, {}, {"kv_policy_config": '{"budget": 0.5}'}, r"^kv_budget is 0\.5; .* at most 0\.3"),
        (0.3, {}, {"kv_policy": "full"}, r"^kv_policy is 'full', .* 1\.0; .* at most 0\.3"),
        (0.3, {}, {"kv_policy": "full", "kv_budget": 0.1}, r"^kv_policy is 'full', .* at most"),
        (0.3, {}, {"kv_policy": "drop_audio"}, r"^kv_budget is 1; .* at most 0\.3"),
        (0.3, {"budget": 0.5}, {"kv_tau": 0.9}, r"^kv_budget is 0\.5; .* at most 0\.3"),
        (0.3, {}, {"kv_budget": 2}, r"^kv_budget is 2; .* must be a ratio of at most 0\.3"),
        (160, {}, {"kv_budget": 161}, r"^kv_budget is 161; .* at most 160 "),
        (
            160,
            {},
            {"kv_budget": 0.01},
            r"^kv_budget is 0\.01; .* a number of tokens of at most 160",
        ),
        (160, {}, {"kv_policy": "full"}, r"^kv_policy is 'full', .* a number of tokens"),
        (1e8, {}, {"kv_budget": 100000001}, "^kv_budget is 100000001; .* at most 100000000 "),
    ],
)
def test_budgets_beyond_the_bound(
    bound: float, server: Any, xargs: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(KVPolicyError, match=sentence):
        check({"max_budget": bound}, xargs, make_policy("acckv", **server))


@pytest.mark.parametrize(
    ("server", "own", "setting"),
    [
        ({"preset": "corrected"}, {"preset": "paper"}, "budget_scope is 'av'; .* 'total'"),
        ({"budget_scope": "total"}, {"budget_scope": "av"}, "budget_scope is 'av'; .* 'total'"),
        ({}, {"image_as": "text"}, "image_as is 'text'; .* 'video'"),
    ],
)
def test_what_a_bounded_budget_counts_may_not_shrink(
    server: dict[str, Any], own: dict[str, Any], setting: str
) -> None:
    """0.2 of the clips and all of the text is more than 0.2 of everything."""
    xargs = {"kv_policy_config": own}
    check({}, xargs, make_policy("acckv", **server))
    with pytest.raises(KVPolicyError, match=f"^kv_policy_config {setting}"):
        check({"max_budget": 0.5}, xargs, make_policy("acckv", **server))


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (
            {"policies": ["h2o2"]},
            r"^--kv-request-policies is \['h2o2'\]; it must be none, or of ac",
        ),
        ({"policies": "acckv,"}, r"^--kv-request-policies is 'acckv,'; it must be none, or of ac"),
        ({"policies": None}, "^--kv-request-policies is None; it must be none, or of acckv"),
        ({"policies": [["acckv"]]}, "^--kv-request-policies is .*; it must be none, or of acckv"),
        ({"max_budget": 0}, r"^--kv-request-max-budget is 0; it must be a ratio in \(0, 1\] or"),
        ({"max_budget": 1.5}, r"^--kv-request-max-budget is 1\.5; it must be a ratio"),
        ({"max_budget": None}, "^--kv-request-max-budget is None; it must be a ratio"),
        ({"max_budgets": 1}, "^max_budgets is no limit of requests; .* policies, max_budget"),
        ("none", "^The limits of requests are 'none'; they must be a JSON object"),
    ],
)
def test_wrong_limits(limits: Any, sentence: str) -> None:
    with pytest.raises(KVPolicyError, match=sentence):
        limits_from_mapping(limits)


def test_forms_of_limits() -> None:
    assert limits_from_mapping({}) == RequestLimits()
    assert limits_from_mapping({"policies": "none"}).policies == ()
    assert limits_from_mapping({"policies": "acckv, full"}).policies == ("acckv", "full")
    everything = limits_from_mapping({"policies": policy_names(), "max_budget": "160"})
    assert everything.max_budget == 160
    assert everything.policies == policy_names()
    with pytest.raises(ValueError, match="frozen"):
        everything.max_budget = 1.0


def fold(additional: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """``additional_config`` after the flags moved into it."""
    namespace = argparse.Namespace(additional_config=additional, **given)
    flags._fold(namespace)
    assert all(value is None for name, value in vars(namespace).items() if name.startswith("kv_"))
    return namespace.additional_config


def test_flags_move_into_the_additional_configuration() -> None:
    folded = fold(
        {"other": 1}, kv_policy="acckv", kv_request_policies=[], kv_request_max_budget=0.5
    )
    assert folded == {
        "other": 1,
        "kv_policy": {"policy": "acckv"},
        "kv_policy_requests": {"policies": [], "max_budget": 0.5},
    }
    assert flags.request_limits(folded) == RequestLimits(policies=[], max_budget=0.5)
    assert fold({"kv_policy": "h2o"}, kv_request_max_budget=2.0) == {
        "kv_policy": "h2o",
        "kv_policy_requests": {"max_budget": 2.0},
    }
    assert flags.request_limits({"kv_policy": "h2o"}) == RequestLimits()
    assert fold() is None


@pytest.mark.parametrize(
    ("additional", "given", "sentence"),
    [
        (None, {"kv_request_policies": []}, "^--kv-request-policies and .* need --kv-policy"),
        ({"a": 1}, {"kv_request_max_budget": 0.5}, "--kv-request-max-budget need --kv-policy"),
        ("text", {"kv_policy": "acckv"}, "^--additional-config is 'text'; .* a JSON object"),
        (
            {"kv_policy_requests": {}},
            {"kv_policy": "acckv", "kv_request_policies": []},
            r"^What requests may set is given both by --kv-request-\* flags and in --additional-c",
        ),
    ],
)
def test_flags_that_do_not_fit(additional: Any, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KVPolicyError, match=sentence):
        fold(additional, **given)


def test_limits_without_a_policy() -> None:
    with pytest.raises(KVPolicyError, match=r"kv_policy_requests .* needs kv_policy"):
        flags.request_limits({"kv_policy_requests": {"policies": []}})


@pytest.mark.parametrize(
    ("additional", "sentence"),
    [
        ({"kv_policy_request": {"policies": []}}, "^kv_policy_request in .* is unknown; the keys"),
        ({"kv_policys": "acckv"}, "^kv_policys in the additional configuration is unknown"),
        ({"kv_policy_prefix_copies": "false"}, "copies .* is 'false'; it must be true or false"),
    ],
)
def test_what_would_be_ignored_is_refused(additional: dict[str, Any], sentence: str) -> None:
    """With a policy and without one: a misspelt limit would let everybody in."""
    start = flags._with_policy(lambda *_: "config")
    for policy in ({}, {"kv_policy": "acckv"}):
        with pytest.raises(KVPolicyError, match=sentence):
            start(SimpleNamespace(additional_config={**policy, **additional}))
    assert start(SimpleNamespace(additional_config={"other": 1})) == "config"


def test_the_front_end_answers_with_400() -> None:
    """``VLLMValidationError`` is what the API server turns into status 400."""
    from vllm.exceptions import VLLMValidationError

    process = front_end._with_policy_check(lambda self, *args, **kwargs: "processed")
    additional = {"kv_policy": "acckv", "kv_policy_requests": {"policies": ["acckv"]}}
    processor = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config=additional, **vars(CONFIG))
    )

    def ask(xargs: dict[str, Any] | None) -> str:
        return process(processor, "r0", "prompt", SimpleNamespace(extra_args=xargs))

    assert ask(None) == ask({"kv_budget": 0.9}) == "processed"
    with pytest.raises(VLLMValidationError, match="kv_policy is 'full'"):
        ask({"kv_policy": "full"})
    additional["kv_policy_requests"] = {"max_budget": 0.5}
    with pytest.raises(VLLMValidationError, match=r"kv_budget is 0\.9"):
        ask({"kv_budget": 0.9})
