# SPDX-License-Identifier: Apache-2.0
"""The recipes of CONTRIBUTING.md, followed to the letter, and the promises of every policy."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_acckv.config import POLICIES, KVPolicyConfig
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.movement import gather_kept
from vllm_acckv.policies import TABLE, AccKV
from vllm_acckv.policies.base import Prompt
from vllm_acckv.selection import SingleRank, align
from vllm_acckv.spans import AUDIO, SPAN_HOOKS, TEXT, VIDEO

RECIPES = Path(__file__).parent.parent / "CONTRIBUTING.md"


def recipe(name: str, **names: Any) -> dict[str, Any]:
    """Run the code block marked ``name`` and return what it defines."""
    code = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", RECIPES.read_text(), re.S)
    assert code is not None
    exec(code[1], names)
    return names


@pytest.mark.parametrize("make", [AccKV, recipe("policy")["Recent"]])
@pytest.mark.parametrize("budget", [0.0625, 0.25, 0.5])
def test_policies_keep_their_promise(make: Any, budget: float) -> None:
    """Text survives, no more entries than announced, every KV head as many as the others."""
    parts = [(TEXT, 5), (VIDEO, 60), (AUDIO, 40), (TEXT, 7)]
    modality = torch.tensor([code for code, count in parts for _ in range(count)]).to(torch.int8)
    policy = make(KVPolicyConfig(budget=budget))
    keep, entries = policy.budget(video=60, audio=40, prefix_text=5, trailing_text=7)
    key, value = torch.randn(2, 2, 112, 8)
    prompt = Prompt(modality, 105, keep)
    selection = policy.select(torch.rand(2, 112), key, value, prompt, SingleRank())
    kept = align(selection, 8, SingleRank())
    assert kept.freed_blocks >= (112 - entries) // 8
    assert kept.tokens[:, modality == TEXT].all()
    new_key, new_value = gather_kept(kept, key, value)
    assert new_key.shape == new_value.shape == (2, 112 - 8 * kept.freed_blocks, 8)
    assert torch.equal(new_key[:, -7:], key[:, -7:])


def test_names_and_table_agree() -> None:
    assert tuple(TABLE) == POLICIES


def test_span_hook_recipe() -> None:
    recipe("hook", VIDEO=VIDEO, AUDIO=AUDIO, np=np, SPAN_HOOKS=SPAN_HOOKS)
    try:
        place = SimpleNamespace(offset=0, length=6, is_embed=None)
        request = SimpleNamespace(
            mm_features=[SimpleNamespace(modality="video", mm_position=place)],
            num_prompt_tokens=8,
            prompt_token_ids=[1, 7, 1, 7, 1, 1, 7, 1],
            sampling_params=None,
        )
        hf_config = SimpleNamespace(model_type="my_model")
        plan = plan_request(request, KVPolicyConfig(), 4, hf_config)
        assert plan.modalities.tolist() == [VIDEO, AUDIO, VIDEO, AUDIO, VIDEO, VIDEO, TEXT, TEXT]
    finally:
        SPAN_HOOKS.pop("my_model")
