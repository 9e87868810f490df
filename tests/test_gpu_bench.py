# SPDX-License-Identifier: Apache-2.0
"""``make gpu-bench`` without a GPU: bounds, verdicts, tables, and a small run on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_bench.py"
sys.path.append(str(SCRIPT.parent))

import gpu_bench  # noqa: E402
import gpu_kernels  # noqa: E402
from gpu_figures import FULL_SCALE, SMALL_SCALE, Result, bound, bytes_read, figures  # noqa: E402
from gpu_report import NOT_MEASURED, Row, Target, markdown, merge, rows, verdict  # noqa: E402

ROWS = list(rows(FULL_SCALE, gpu_kernels.names(small=False)))
DECODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}


@pytest.mark.parametrize(("requests", "speed_up"), [(8, 1.36), (32, 2.1), (64, 2.7)])
def test_bound_of_decode(requests: int, speed_up: float) -> None:
    """7.6 billion weights in bf16, 56 KiB to a token, 16k tokens of which a fifth stays."""
    limit = bound(15.2e9, 56 * 1024, requests, prompt=16384, text=256, budget=0.2)
    assert limit == pytest.approx(speed_up, rel=0.01)


def test_bytes_of_the_models(tmp_path: Path) -> None:
    """As written for vLLM: bytes of a step's weights, and of a token's keys and values."""
    qwen = gpu_bench.write_model(tmp_path / "qwen", gpu_bench.QWEN, FULL_SCALE)
    vicuna = gpu_bench.write_model(tmp_path / "vicuna", gpu_bench.VICUNA, FULL_SCALE)
    assert (qwen["hidden_size"], vicuna["hidden_size"]) == (3584, 4096)
    weights, token = bytes_read(qwen)
    assert token == 56 * 1024 and weights == pytest.approx(2 * 7.07e9, rel=0.01)
    weights, token = bytes_read(vicuna)
    assert token == 512 * 1024 and weights == pytest.approx(2 * 6.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("target", "result", "expected"),
    [
        (Target("at most", 0.01), Result(0.01), "met"),
        (Target("at most", 0.01), Result(0.011), "**missed**"),
        (Target("at least", 0.99), Result(0.995), "met"),
        (Target("at least", 0.99), Result(0.98), "**missed**"),
        (Target("of the bound", 0.9), Result(1.85, bound=2.0), "met"),
        (Target("of the bound", 0.9), Result(1.75, bound=2.0), "**missed**"),
        (None, Result(1.0), "-"),
        (Target("at most", 0.01), "skipped: out of time", NOT_MEASURED),
        (Target("at most", 0.01), None, NOT_MEASURED),
    ],
)
def test_verdict(target: Target | None, result: Result | str | None, expected: str) -> None:
    assert verdict(Row("key", "section", "what", "x", target), result) == expected


def test_blank_tables(tmp_path: Path) -> None:
    """Every row is there, with what to run."""
    command = [sys.executable, str(SCRIPT), "--blank", "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    text = (tmp_path / "results-gpu.md").read_text()
    assert text == markdown(None, ROWS, {})
    assert "make gpu-bench" in text
    assert text.count(f"| {NOT_MEASURED} |") == len(ROWS)


def test_committed_tables() -> None:
    """docs/results-gpu.md, measured or not, has the rows of this version."""
    text = (ROOT / "docs" / "results-gpu.md").read_text()
    assert [row.what for row in ROWS if f"| {row.what} |" not in text] == []


def test_figures_fill_the_tables() -> None:
    """Each row but those of kernels gets a figure when everything was timed, and none before."""
    scale = FULL_SCALE
    timed = {"text/crowd": 100.0}
    for arm, factor in {"stock": 1.0, "full": 1.02, "0.2": 1.1, "0.1": 1.2}.items():
        timed |= {f"prefill/{length}/{arm}": factor for length in scale.lengths}
        timed |= {f"decode/{batch}/{arm}": 1 / factor for batch in scale.batches}
        timed |= {f"text/{batch}/{arm}": 100.0 for batch in scale.batches}
        timed |= {f"{key}/{arm}": factor for key in ("peak", "tight", "ample")}
    timed |= {f"vicuna/{key}": value for key, value in timed.items()}
    found = dict(figures(timed, scale, DECODER, DECODER))
    assert {row.key for row in ROWS if not row.key.startswith("kernel/")} == set(found)
    assert None not in found.values()
    assert found["compaction/16384/0.2"].value == pytest.approx(1.1 / 1.02 - 1)
    assert found["decode/8/0.2"].value == pytest.approx(1.1 / 1.02)
    assert found["stock/prefill"].value == pytest.approx(0.02)
    assert found["stock/ample"].value == pytest.approx(1 / 1.02 - 1)
    # 12 * (4096 + 100) / (0.2 * 4096 + 100)
    assert found["residents/0.2"].bound == pytest.approx(54.8, rel=0.01)
    assert set(dict(figures({}, scale, DECODER, DECODER)).values()) == {None}


def test_results_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge(path, "gpu-check", {"machine": "one", "checks": []})
    merge(path, "gpu-bench", {"machine": "another", "rows": []})
    merge(path, "gpu-check", {"machine": "a third", "checks": [1]})
    assert json.loads(path.read_text()) == {
        "gpu-check": {"machine": "a third", "checks": [1]},
        "gpu-bench": {"machine": "another", "rows": []},
    }


def test_small_run(tmp_path: Path) -> None:
    """All of it with a tiny model on CPU; printed, marked, and not written."""
    command = [sys.executable, str(SCRIPT), "--small", "--minutes", "12", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.startswith("A small run on CPU")
    lines = [line for line in run.stdout.splitlines() if NOT_MEASURED in line]
    assert all("xformers" in line for line in lines), lines
    for row in rows(SMALL_SCALE, gpu_kernels.names(small=True)):
        assert f"| {row.what} |" in run.stdout
    assert list(tmp_path.iterdir()) == []
