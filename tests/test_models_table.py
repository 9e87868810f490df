# SPDX-License-Identifier: Apache-2.0
"""docs/models.md: printed from code, its models known to vLLM, its promises tested."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from vllm import ModelRegistry

from vllm_acckv.models import ARCHITECTURES, register_with_vllm, supported
from vllm_acckv.spans import SPAN_HOOKS

TESTS = Path(__file__).parent
HOW_TO_PRINT = "python -m vllm_acckv.models.supported > docs/models.md"
tested = pytest.mark.parametrize("model", supported.MODELS, ids=lambda model: model.name)


def test_the_document_is_up_to_date() -> None:
    written = (TESTS.parent / "docs" / "models.md").read_text()
    assert written == supported.table() + "\n", f"print it again: {HOW_TO_PRINT}"


@tested
def test_vllm_knows_the_architectures(model: supported.Model) -> None:
    register_with_vllm()
    register_with_vllm()  # every process does, some more than once
    assert set(model.architectures) <= set(ModelRegistry.get_supported_archs())


@tested
def test_what_is_promised_is_shown_by_a_test(model: supported.Model) -> None:
    assert bool(model.proofs) != model.tested.startswith("not tested")
    for proof in model.proofs:
        file, _, function = proof.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_hook_and_every_model_of_ours_has_its_row() -> None:
    assert set(SPAN_HOOKS) <= {model.model_type for model in supported.MODELS}
    assert set(ARCHITECTURES) <= {
        name for model in supported.MODELS for name in model.architectures
    }
