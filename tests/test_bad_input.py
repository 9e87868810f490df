# SPDX-License-Identifier: Apache-2.0
"""What ``policy.compress`` refuses, and that the message says what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_policy_invariants import LAYOUTS, Case, Sample, made, over_cases
from vllm_acckv.policies import make_policy

# 4 query heads, 2 KV heads, 12 tokens, the last 3 of them text; head size 8.
MODALITY = [0, 0, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
NAN, INF = torch.nan, torch.inf


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def with_modality(position: int, code: int) -> torch.Tensor:
    return torch.tensor([*MODALITY[:position], code, *MODALITY[position + 1 :]], dtype=torch.int8)


def broken(name: str, value: float) -> torch.Tensor:
    tensor = getattr(Sample(MODALITY), name).clone()
    tensor[0, 9] = value
    return tensor


# arguments in place of good ones, what the message says
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"keys": zeros(12, 8)}, r"keys are float32 \[12, 8\]; expected floating-point \[G, l, d\]"),
    ({"keys": zeros(2, 12, 8, dtype=torch.int32)}, r"keys are int32 \[2, 12, 8\]; expected float"),
    (
        {"values": zeros(2, 11, 8)},
        r"values are float32 \[2, 11, 8\]; expected \[G, l, d\] like keys, float32 \[2, 12, 8\]",
    ),
    ({"values": zeros(4, 12, 8)}, r"values are float32 \[4, 12, 8\]; expected .* like keys"),
    ({"values": zeros(2, 12)}, r"values are float32 \[2, 12\]; expected .* like keys"),
    (
        {"values": zeros(2, 12, 8, dtype=torch.bfloat16)},
        r"values are bfloat16 \[2, 12, 8\]; expected .* like keys, float32 \[2, 12, 8\]",
    ),
    (
        {"modality": zeros(11, dtype=torch.int8)},
        r"modality is int8 \[11\]; expected int8 \[12\]",
    ),
    ({"modality": zeros(12)}, r"modality is float32 \[12\]; expected int8 \[12\]"),
    (
        {"modality": zeros(1, 12, dtype=torch.int8)},
        r"modality is int8 \[1, 12\]; expected int8 \[12\]",
    ),
    ({"modality": with_modality(4, 3)}, r"modality holds 3; expected 0 text, 1 video, 2 audio"),
    ({"modality": with_modality(4, -2)}, r"modality holds -2; expected .* or -1 for padding"),
    (
        {"modality": with_modality(4, -1)},
        r"modality has padding \(-1\) behind tokens; expected it at the left only",
    ),
    ({"modality": with_modality(11, -1)}, r"modality has padding \(-1\) behind tokens"),
    (
        {"modality": torch.tensor([*MODALITY[:9], 1, 0, 2], dtype=torch.int8)},
        r"modality has no text after its last audio-video token, position 11; expected the text",
    ),
    ({"values": broken("values", NAN)}, "values hold NaN or infinity; expected finite numbers"),
    ({"values": broken("values", INF)}, "values hold NaN or infinity; expected finite numbers"),
    ({"keys": broken("keys", NAN)}, "keys hold NaN or infinity; expected finite numbers only"),
    ({"keys": broken("keys", INF)}, "keys hold NaN or infinity; expected finite numbers only"),
    ({"queries": broken("queries", NAN)}, "queries hold NaN or infinity; expected finite"),
    (
        {"queries": None},
        r"queries are None; acckv expects \[H, n, 8\] of the last n >= 3 tokens, H a multiple of 2",
    ),
    ({"queries": zeros(4, 2, 8)}, r"queries are float32 \[4, 2, 8\]; acckv expects .* n >= 3"),
    ({"queries": zeros(3, 12, 8)}, r"queries are float32 \[3, 12, 8\]; .* H a multiple of 2"),
    ({"queries": zeros(4, 12, 6)}, r"queries are float32 \[4, 12, 6\]; acckv expects \[H, n, 8\]"),
    ({"queries": zeros(4, 12)}, r"queries are float32 \[4, 12\]; acckv expects \[H, n, 8\]"),
    ({"queries": zeros(4, 12, 8, dtype=torch.int64)}, r"queries are int64 \[4, 12, 8\]; acckv ex"),
    ({"scores": zeros(2, 11)}, r"scores are float32 \[2, 11\]; expected fp32 \[2, 12\]"),
    ({"scores": zeros(4, 12)}, r"scores are float32 \[4, 12\]; expected fp32 \[2, 12\]"),
    (
        {"scores": zeros(2, 12, dtype=torch.int64)},
        r"scores are int64 \[2, 12\]; expected fp32 \[2, 12\]",
    ),
    ({"scores": torch.full((2, 12), NAN)}, "scores hold NaN or infinity; expected finite numbers"),
    ({"scores": torch.full((2, 12), INF)}, "scores hold NaN or infinity; expected finite numbers"),
    ({"layer": 4, "num_layers": 4}, r"layer is 4; expected 0 to num_layers - 1 = 3"),
    ({"layer": -1, "num_layers": 4}, r"layer is -1; expected 0 to num_layers - 1 = 3"),
    ({"block_size": 0}, r"block_size is 0; expected a whole number from 1 on"),
]


def compress(policy: str, arguments: dict[str, Any], **options: Any) -> Any:
    sample = Sample(MODALITY)
    good = {name: getattr(sample, name) for name in ("queries", "keys", "values", "modality")}
    return make_policy(policy, **options).compress(**{**good, **arguments})


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    compress("acckv", {})
    with pytest.raises(ValueError, match=message):
        compress("acckv", arguments)


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("policy", ["recent", "random", "streaming", "full"])
def test_nan_is_refused_by_policies_that_observe_nothing(policy: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} hold NaN or infinity; expected finite"):
        compress(policy, {name: broken(name, NAN)})


def test_nan_in_keys_is_refused_next_to_scores() -> None:
    with pytest.raises(ValueError, match="keys hold NaN or infinity; expected finite"):
        compress("h2o", {"keys": broken("keys", NAN), "scores": zeros(2, 12)})


@pytest.mark.parametrize("angles", [None, torch.zeros(11, 4), torch.zeros(12)])
def test_angles(angles: torch.Tensor | None) -> None:
    form = "None" if angles is None else rf"float32 \[{', '.join(map(str, angles.shape))}\]"
    expected = rf"angles are {form}; acckv with these settings expects \[12, R/2\]"
    with pytest.raises(ValueError, match=expected):
        compress("acckv", {"angles": angles}, preset="corrected")
    compress("acckv", {"angles": angles})


def test_angles_of_more_than_the_head_size() -> None:
    with pytest.raises(ValueError, match=r"angles are float32 \[12, 5\]"):
        compress("acckv", {"angles": torch.zeros(12, 5)}, preset="corrected")


def test_h2o_needs_every_row() -> None:
    with pytest.raises(ValueError, match=r"queries are None; h2o expects .* n >= 12 tokens"):
        compress("h2o", {"queries": None})
    compress("recent", {"queries": None})


def test_fastv_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match=r"first_pruned_layer is 2; it must be below .* 1 layers"):
        compress("fastv", {})
    with pytest.raises(ValueError, match=r"--kv-budget is 0.2; it must be above 0.50"):
        compress("fastv", {"num_layers": 4})
    compress("fastv", {"num_layers": 4}, equalize=False)
    with pytest.raises(ValueError, match=r"queries are float32 \[4, 0, 8\]; fastv expects"):
        compress("fastv", {"num_layers": 20, "queries": zeros(4, 0, 8)})


def test_no_tokens_at_all() -> None:
    nothing = {"keys": zeros(2, 0, 8), "values": zeros(2, 0, 8)}
    padding = torch.full((12,), -1, dtype=torch.int8)
    assert compress("acckv", {**nothing, "modality": padding[:0]}).keys.shape == (2, 0, 8)
    assert compress("acckv", {"modality": padding}).positions.shape == (1, 0)


@over_cases
def test_nan_scores_do_not_reach_the_cache(case: Case) -> None:
    """In a server there is nobody to raise to: a broken activation is no attention."""
    sample = Sample(LAYOUTS["interleaved"](9, 8, 5))
    scores = torch.rand(2, sample.layout.length)
    for value in (0.0, INF, -INF, NAN):
        scores[0, ::3] = value
        done = sample.compact(made(case), scores)
        assert done.key.isfinite().all() and done.value.isfinite().all()
        assert (done.positions >= -1).all()
    silent = sample.compact(made(case), scores.nan_to_num(0.0))
    assert torch.equal(done.positions, silent.positions)
