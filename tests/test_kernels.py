# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against their PyTorch references, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from vllm_acckv.kernels.paged import PagedCache
from vllm_acckv.kernels.score import observe, observe_reference
from vllm_acckv.kernels.tables import LayerTables
from vllm_acckv.scores import Weights


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Where there is no GPU; Triton asks again when kernels run."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        yield


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD_SIZES = (16, 24, 64)
# Examples are small, but the interpreter is slow: no search for the smallest one that fails.
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, E4M3), (FP16, E5M2), (E4M3, E4M3)]
"""Of queries and of keys."""


def paged(
    length: int, heads: int, head_size: int, block: int, dtype: torch.dtype, seed: int
) -> PagedCache:
    """A cache with the request's blocks in random order among others."""
    generator = torch.Generator().manual_seed(seed)
    needed = -(-length // block)
    number = needed + 3
    blocks = torch.randn(number, heads, block, 2 * head_size, generator=generator).to(dtype)
    if seed % 2:  # vLLM's other layout: slots in front of heads
        blocks = blocks.transpose(1, 2).contiguous().transpose(1, 2)
    table = torch.randperm(number, generator=generator)[:needed].to(torch.int32)
    return PagedCache(blocks.to(DEVICE), table.to(DEVICE))


@dataclass(frozen=True)
class Observation:
    """Rows of a prompt that pay attention to its keys, and what they pay."""

    before: int
    tokens: int
    behind: int
    kv_heads: int
    group: int
    head_size: int
    block: int
    weighted: bool
    seed: int

    @property
    def length(self) -> int:
        return self.before + self.tokens

    def query(self, dtype: torch.dtype) -> torch.Tensor:
        """As part of a fused projection."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group
        fused = torch.randn(self.tokens, heads + 3, self.head_size, generator=generator)
        return fused.to(DEVICE, dtype)[:, :heads]

    def cache(self, dtype: torch.dtype) -> PagedCache:
        return paged(self.length, self.kv_heads, self.head_size, self.block, dtype, self.seed)

    def weights(self) -> Weights | None:
        if not self.weighted:
            return None
        position = torch.arange(self.length, device=DEVICE)
        return Weights(position + 1.0, 1 / (position + 2.0))

    def exact(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """fp64 ``[G, l + behind]`` of keys ``[G, l, D]``."""
        columns = torch.arange(self.length, device=DEVICE)
        rows = columns[self.before :, None]
        grouped = query.double().unflatten(1, (self.kv_heads, -1))
        logits = torch.einsum("nghd,gld->ghnl", grouped, key.double()) * scale
        attention = logits.masked_fill(columns > rows, -torch.inf).softmax(-1).mean(1)
        if self.weighted:
            attention = attention * (rows + 1) / (columns + 2)
        return torch.nn.functional.pad(attention.sum(1), (0, self.behind))

    def check(
        self, observe: Callable[..., None], dtypes: tuple[torch.dtype, torch.dtype], **options: Any
    ) -> None:
        """``observe`` adds to scores what the rows pay to the keys; FP8 keys have a scale."""
        query, cache = self.query(dtypes[0]), self.cache(dtypes[1])
        key_scale = 0.3 if dtypes[1].itemsize == 1 else 1.0
        scale = self.head_size**-0.5
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(self.kv_heads, self.length + self.behind, generator=generator)
        scores = scores.to(DEVICE)
        key = cache.read(self.length)[0].double() * key_scale
        expected = scores + self.exact(query, key, scale)
        observe(scores, query, cache, self.before, scale * key_scale, self.weights(), **options)
        # Products of numbers this short are exact in fp32; what differs is the order of the sums.
        tolerance = 1e-5 if dtypes[1] is FP32 else 1e-4
        torch.testing.assert_close(scores.double(), expected, rtol=tolerance, atol=tolerance)


OBSERVATIONS = st.builds(
    Observation,
    before=st.integers(0, 150),
    tokens=st.integers(1, 40),
    behind=st.integers(0, 20),
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 7),
    head_size=st.sampled_from(HEAD_SIZES),
    block=st.sampled_from([16, 32, 128]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(observation=OBSERVATIONS)
def test_observed_attention(
    dtypes: tuple[torch.dtype, torch.dtype], observation: Observation
) -> None:
    observation.check(observe_reference, dtypes)
    observation.check(observe, dtypes)


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """What xformers calls on a GPU: output ``[1, n, H, D]``, log-sum-exp ``[1, H, n]``.

    Heads of one group share keys ``[1, m, G, D]``, and the last query belongs to the last key.
    """
    from xformers.ops import fmha

    *_, scale, causal = arguments
    assert causal and options["window_left"] == options["window_right"] == -1
    mask = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    key, value = (
        part.float().repeat_interleave(query.shape[2] // key.shape[2], 2) for part in (key, value)
    )
    logits = torch.einsum("bnhd,bmhd->bhnm", query.float(), key) * scale
    logits = logits + mask.materialize(logits.shape, torch.float32)
    output = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), value)
    return output.to(query.dtype), logits.logsumexp(-1), None


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, E5M2), (E4M3, E4M3)], ids=str)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(observation=OBSERVATIONS)
def test_xformers_first_pass(
    dtypes: tuple[torch.dtype, torch.dtype], observation: Observation
) -> None:
    """xformers itself, down to the kernel it calls, which needs a GPU."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    flash = fmha.flash.FwOp

    def choose(inputs: Any, needs_gradient: bool) -> type:
        reasons = flash.not_supported_reasons(inputs)
        assert all(reason.startswith(("device=cpu", "bf16 is only")) for reason in reasons)
        return flash

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setattr(fmha, "_dispatch_fw", choose)
            patch.setattr(flash, "OPERATOR", flash_attention)
        observation.check(observe, dtypes, first_pass="xformers")


def test_without_xformers() -> None:
    observation = Observation(9, 3, 0, 1, 1, 16, 16, False, 0)
    with (
        mock.patch.dict(sys.modules, {"xformers.ops": None}),
        pytest.raises(ImportError, match=r"pip install 'vllm-acckv\[xformers\]'"),
    ):
        observation.check(observe, (FP32, FP32), first_pass="xformers")


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(
    layers=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    padding=st.integers(0, 2),
    block=st.sampled_from([16, 32]),
    data=st.data(),
)
def test_layer_tables(
    layers: int, lengths: list[int], padding: int, block: int, data: st.DataObject
) -> None:
    """In what a layer may look at, the kernel's tables equal the reference's."""
    slots, columns, rows = 9, 300 // 16 + 2, len(lengths) + padding
    made = [LayerTables(layers, slots, columns, block, DEVICE) for _ in range(2)]
    of_rows = data.draw(st.permutations(range(slots)))[: len(lengths)]
    for slot, length in zip(of_rows, lengths, strict=True):
        most = st.integers(0, (length - 1) // block)
        freed = data.draw(st.lists(most, min_size=layers, max_size=layers))
        for tables in made:
            tables.freed[slot] = torch.tensor(freed, dtype=torch.int32)
    table = torch.arange(rows * columns, dtype=torch.int32, device=DEVICE).view(rows, columns)
    seen = torch.tensor([*lengths, *[0] * padding], dtype=torch.int32, device=DEVICE)
    which = torch.tensor(of_rows, device=DEVICE)
    made[0].refresh(table, seen, which)
    made[1].refresh_reference(table, seen, which)
    ours, reference = made
    torch.testing.assert_close(ours.lengths, reference.lengths)
    torch.testing.assert_close(ours.longest, reference.longest)
    used = -(-ours.lengths[:, :rows] // block)
    looked_at = torch.arange(columns, device=DEVICE) < used[..., None]
    theirs = reference.blocks[:, :rows]
    assert torch.equal(ours.blocks[:, :rows][looked_at], theirs[looked_at])
    for layer in range(layers):
        for row, (slot, length) in enumerate(zip(of_rows, lengths, strict=True)):
            first = int(ours.freed[slot, layer])
            assert ours.lengths[layer, row] == length - first * block
            whole = table[row, first : -(-length // block)]
            assert torch.equal(ours.blocks[layer, row, : len(whole)], whole)


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    """``make gpu-check`` compares small kernels, in the interpreter, and says so."""
    script = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"
    command = [sys.executable, str(script), "--output", str(tmp_path / "results.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("no GPU, Triton's interpreter\n")
    results = json.loads((tmp_path / "results.json").read_text())["gpu-check"]
    assert {check["what"] for check in results["checks"]} == {
        "observed attention",
        "means and similarities",
        "entries moved in place",
        "compaction by acckv",
        "compaction by acckv, corrected",
        "compaction by acckv_plus",
        "compaction by snapkv",
        "tables of layers",
    }
    assert all(check["passed"] for check in results["checks"])
