# SPDX-License-Identifier: Apache-2.0
"""LoRA beside a policy: adapters change what is kept, and only in their rows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Media, Reference, difference
from tests.engines import Ask, Engine, Trace
from tests.test_engine_features import POLICY, assert_alike

RANK, SCALE = 4, 2.0


@dataclass(frozen=True)
class Lora:
    """An adapter and the reference on weights it was merged into."""

    folder: Path
    reference: Reference


@pytest.fixture(scope="module")
def lora(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Lora:
    adapter, merged = write_lora(checkpoint, tmp_path_factory.mktemp("lora"), "thinker.model.")
    return Lora(adapter, Reference(merged))


def write_lora(checkpoint: Path, folder: Path, decoder: str) -> tuple[Path, Path]:
    """A random adapter of the projections around attention, and the checkpoint with it merged.

    Args:
        decoder: what the names of the decoder's weights begin with.
    """
    adapter, merged = folder / "adapter", folder / "merged"
    adapter.mkdir()
    shutil.copytree(checkpoint, merged)
    weights, tensors = load_file(checkpoint / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in sorted(weights):
        if re.fullmatch(rf"{re.escape(decoder)}layers\..*\.[qkvo]_proj\.weight", name):
            rows, columns = weights[name].shape
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            up = 0.1 * torch.randn(rows, RANK, generator=generator)
            weights[name] = weights[name] + SCALE * up @ down
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    assert len(tensors) == 2 * 4 * 4  # A and B of four projections of four layers
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": int(RANK * SCALE),
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return adapter, merged


@pytest.fixture
def lora_engine(runner: dict[str, str], start_engine: Callable[..., Engine]) -> Engine:
    # One more than in use: vLLM 0.32's CPU kernels take index -1, which means no adapter, for the
    # last one (vllm-project/vllm#48421). Unused ones are zero.
    engine = start_engine(
        runner,
        additional_config=POLICY,
        enable_prefix_caching=True,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
    )
    assert engine.call("reset_prefix_cache")
    return engine


def assert_adapted(
    trace: Trace, asks: list[Ask], lora: Lora, reference: Reference, cached: list[bool]
) -> None:
    """Each answer is that of the weights its request asked for, in values and kept tokens."""
    for number, (ask, answer) in enumerate(zip(asks, trace.answers, strict=True)):
        oracle = lora.reference if ask.lora else reference
        _, expected = oracle.answer(ask, 0.2, answer.tokens, tau=0.6)
        assert difference(answer, expected.logprobs) < 1e-3, number
        assert answer.tokens == expected.logprobs.argmax(-1).tolist()
        assert (answer.cached > 0) == cached[number], number
        kept = [layer["tokens"] for layer in trace.kept.get(f"r{number}", {}).values()]
        assert kept == [one.kept for one in expected.selections]
    assert trace.free_before == trace.free_after


def test_lora_rows_beside_rows_without(
    lora_engine: Engine, lora: Lora, media: Media, reference: Reference
) -> None:
    """Adapters change queries and keys, so they change what is kept, and only in their rows."""
    asks = [
        media.separate(lora=lora.folder),
        media.separate(),
        media.interleaved(lora=lora.folder),
        media.text(lora=lora.folder),
        media.text(),
        media.interleaved(),
    ]
    trace = lora_engine.run(*asks, arrive=[0, 0, 2, 1, 0, 3])
    assert_adapted(trace, asks, lora, reference, [False] * 6)
    for one, other in ((0, 1), (2, 5), (3, 4)):
        gap = np.abs(trace.answers[one].logprobs[0] - trace.answers[other].logprobs[0]).max()
        assert gap > 1e-2
    adapted, bare = ([layer["tokens"] for layer in trace.kept[r].values()] for r in ("r0", "r1"))
    assert adapted != bare
    assert lora_engine.call("reset_prefix_cache")
    assert_alike(lora_engine.answer(asks[0]), trace.answers[0])


def test_lora_does_not_hit_blocks_of_the_bare_model(
    lora_engine: Engine, lora: Lora, media: Media, reference: Reference
) -> None:
    asks = [media.separate(), media.separate(lora=lora.folder)]
    for ask in asks:
        assert_adapted(lora_engine.run(ask), [ask], lora, reference, [False])
    assert_adapted(lora_engine.run(*asks), asks, lora, reference, [True, True])
