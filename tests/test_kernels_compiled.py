# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the kernels for the GPUs that vLLM runs on; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "triton_compiled.py"
# Ampere, Hopper, Blackwell. Triton knows e4m3 from Ada Lovelace on.
GPUS = {80: ["bfloat16"], 90: ["float16", "float8_e4m3fn"], 100: ["bfloat16"]}
KERNELS = 7


def run(*arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", GPUS)
def test_kernels_compile(capability: int) -> None:
    """And fit: nothing spills, and shared memory suffices everywhere (99 KiB for one block)."""
    dtypes = GPUS[capability]
    compiled = run(str(capability), *dtypes)
    assert len({(one["kernel"], one["dtype"]) for one in compiled}) == KERNELS * len(dtypes)
    for one in compiled:
        assert one["stack"] == 0, one
        assert one["shared"] <= 99 * 1024, one


def test_no_prompt_compiles_anything() -> None:
    """Whatever its length, clips and settings are, once the server has warmed up."""
    assert run("variants") == []
