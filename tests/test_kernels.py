# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against their PyTorch references, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from vllm_acckv.kernels.move import move, move_reference
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
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4}
"""Products of bf16 numbers are exact in fp32; what differs is the order of the sums."""


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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(
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
def test_observed_attention(
    dtype: torch.dtype,
    before: int,
    tokens: int,
    behind: int,
    kv_heads: int,
    group: int,
    head_size: int,
    block: int,
    weighted: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    cache = paged(before + tokens, kv_heads, head_size, block, dtype, seed)
    # Queries come as part of a fused projection.
    fused = torch.randn(tokens, kv_heads * group + 3, head_size).to(DEVICE, dtype)
    query = fused[:, : kv_heads * group]
    scores = torch.rand(kv_heads, before + tokens + behind, device=DEVICE)
    weights = None
    if weighted:
        weights = Weights(lambda rows: (rows + 1).float(), lambda columns: 1 / (columns + 2.0))
    expected = scores.clone()
    observe_reference(expected, query, cache, before, head_size**-0.5, weights)
    observe(scores, query, cache, before, head_size**-0.5, weights)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


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


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, phases=PHASES)
@hypothesis.given(
    length=st.integers(2, 260),
    kept=st.integers(1, 260),
    empty=st.integers(0, 40),
    merged=st.integers(0, 2),
    kv_heads=st.integers(1, 8),
    head_size=st.sampled_from(HEAD_SIZES),
    block=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_move(
    length: int,
    kept: int,
    empty: int,
    merged: int,
    kv_heads: int,
    head_size: int,
    block: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Bit by bit: what belongs to the entries, and that nothing else in the cache changes."""
    generator = torch.Generator().manual_seed(seed)
    kept = min(kept, length - 1)  # a merged entry stands for a token that is gone
    merged = min(merged, length - kept)
    sources = []
    for _ in range(kv_heads):
        order = torch.randperm(length, generator=generator)
        # Twice the token, plus 1 for a merged entry that stands behind its last token.
        places = torch.cat([2 * order[:kept], 2 * order[kept : kept + merged] + 1])
        which = torch.cat([order[:kept], length + torch.arange(merged)])
        sources.append(which[places.argsort()])
    front = torch.full((kv_heads, min(empty, length - kept - merged)), -1)
    rows = torch.cat([front, torch.stack(sources)], 1).to(DEVICE, torch.int32)
    cache = paged(length, kv_heads, head_size, block, dtype, seed)
    entries = torch.randn(kv_heads, merged, 2 * head_size, generator=generator)
    entries = entries.to(DEVICE, dtype)
    expected = PagedCache(cache.blocks.clone(), cache.table)
    before = cache.rows(length)
    move_reference(expected, rows, length, entries if merged else None)
    move(cache, rows, length, entries if merged else None)
    assert torch.equal(cache.blocks, expected.blocks)
    everything = torch.cat([before, entries], 1)
    for head in range(kv_heads):
        moved = cache.rows(length)[head, length - kept - merged :]
        assert torch.equal(moved, everything[head, sources[head].to(DEVICE)])


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    """``make gpu-check`` compares small kernels, in the interpreter, and says so."""
    script = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"
    command = [sys.executable, str(script), "--output", str(tmp_path / "results.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("no GPU, Triton's interpreter\n")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {check["what"] for check in results["checks"]} == {
        "observed attention",
        "entries moved in place",
    }
    assert all(check["passed"] for check in results["checks"])
