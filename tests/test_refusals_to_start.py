# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --kv-policy`` refuses to start with one sentence, and explains its flags."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.test_server import BUDGET_RANGE, POLICY
from vllm_acckv.tools.server import ENVIRONMENT

NGRAM_GPU = '{"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
CONNECTOR = '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'
REFUSED_FLAGS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--kv-policy", "nope"): ("--kv-policy is 'nope'", "acckv, acckv_plus"),
    ("--kv-budget", "0"): ("--kv-budget is '0'", BUDGET_RANGE),
    ("--kv-budget", "-1"): ("--kv-budget is '-1'", BUDGET_RANGE),
    ("--kv-budget", "1.5"): ("--kv-budget is '1.5'", BUDGET_RANGE),
    ("--kv-budget", "abc"): ("--kv-budget is 'abc'", BUDGET_RANGE),
    ("--kv-tau", "2"): ("--kv-tau is '2'", "[-1, 1]"),
    (*POLICY, "--kv-policy-config", '{"head_mode": "x"}'): (
        "head_mode is 'x'",
        "'layer' or 'head'",
    ),
    ("--kv-policy", "snapkv", "--kv-tau", "0.9"): ("--kv-tau is no setting of KV policy snapkv",),
    ("--kv-policy-config", '{"head'): ("--kv-policy-config is", "JSON object"),
    ("--kv-budget", "0.2"): ("--kv-budget", "need --kv-policy"),
    (*POLICY, "--kv-budget", "0.2", "--kv-policy-config", '{"budget": 0.3}'): (
        "--kv-budget is 0.2",
        "budget=0.3",
    ),
    (*POLICY, "--additional-config", '{"kv_policy": "acckv"}'): ("--additional-config",),
    ("--kv-request-policies", "none"): ("--kv-request-policies", "need --kv-policy"),
    (*POLICY, "--kv-request-policies", "h2o2"): ("'h2o2'", "none, or of acckv, acckv_plus"),
    (*POLICY, "--kv-request-max-budget", "0"): ("max-budget is '0'", BUDGET_RANGE),
    (*POLICY, "--kv-cache-dtype", "fp8"): (*POLICY, "--kv-cache-dtype fp8"),
    (*POLICY, "--speculative-config", NGRAM_GPU): (*POLICY, "--speculative-config", "ngram_gpu"),
    (*POLICY, "--kv-transfer-config", CONNECTOR): (*POLICY, "--kv-transfer-config"),
}

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
# Architecture -> fields of its config.json (with those above) and why it is refused.
REFUSED_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2ForCausalLM": ({"model_type": "qwen2"}, "it takes neither audio nor video"),
    "WhisperForConditionalGeneration": (
        {"model_type": "whisper", "d_model": 64, "max_target_positions": 64},
        "it is an encoder-decoder model",
    ),
    "DeepseekV2ForCausalLM": (
        {"model_type": "deepseek_v2", "kv_lora_rank": 32, "q_lora_rank": None},
        "multi-head latent attention",
    ),
    "JambaForCausalLM": ({"model_type": "jamba"}, "hybrid of attention and state-space layers"),
    "MambaForCausalLM": ({"model_type": "mamba", "state_size": 16}, "no attention layers"),
    "MistralForCausalLM": (
        {"model_type": "mistral", "sliding_window": 64, "head_dim": 32},
        "sliding-window attention",
    ),
}


@dataclass(frozen=True)
class Ending:
    """How a ``vllm serve`` ended."""

    exit_code: int | None
    output: str


class Forks:
    """Runs ``vllm serve`` in forks of one process that has imported vLLM already.

    Nearly all of the ten seconds that a refusal takes are imports.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["vllm.entrypoints.cli.serve"])

    def run(self, arguments: tuple[str, ...]) -> Ending:
        output = self._folder / f"{abs(hash(arguments))}.txt"
        process = self._context.Process(target=_vllm_serve, args=(arguments, output))
        process.start()
        process.join(120)
        process.kill()
        return Ending(process.exitcode, output.read_text())


def _vllm_serve(arguments: tuple[str, ...], output: Path) -> None:
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, sys.stdout.fileno())
    os.dup2(target, sys.stderr.fileno())
    os.environ.update(ENVIRONMENT)
    sys.argv = ["vllm", "serve", *arguments]
    from vllm.entrypoints.cli.main import main

    main()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    return Forks(tmp_path_factory.mktemp("forks"))


def assert_refusal(ending: Ending, parts: tuple[str, ...]) -> None:
    """Not exit code 0, no traceback, and a last line with all ``parts``."""
    assert ending.exit_code not in (0, None)
    assert "Traceback" not in ending.output
    sentence = ending.output.splitlines()[-1]
    assert "error: " in sentence
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize("flags", REFUSED_FLAGS, ids=" ".join)
def test_flags_are_refused(forks: Forks, checkpoint: Path, flags: tuple[str, ...]) -> None:
    assert_refusal(forks.run((str(checkpoint), *flags)), REFUSED_FLAGS[flags])


@pytest.fixture(scope="module")
def refused_models(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ending]:
    """Two at a time: vLLM inspects each model class in a process of its own."""

    def serve(architecture: str) -> Ending:
        folder = tmp_path_factory.mktemp(architecture)
        fields, _ = REFUSED_MODELS[architecture]
        config = {"architectures": [architecture], **DECODER, **fields}
        (folder / "config.json").write_text(json.dumps(config))
        return forks.run((str(folder), *POLICY, "--skip-tokenizer-init"))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(REFUSED_MODELS, pool.map(serve, REFUSED_MODELS), strict=True))


@pytest.mark.parametrize("architecture", REFUSED_MODELS)
def test_hazard_17_models_are_refused(refused_models: dict[str, Ending], architecture: str) -> None:
    _, why = REFUSED_MODELS[architecture]
    assert_refusal(refused_models[architecture], (*POLICY, architecture, why))


def test_command_itself_refuses(checkpoint: Path) -> None:
    command = (str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint))
    cases = [("--kv-budget", "0"), (*POLICY, "--kv-cache-dtype", "fp8")]

    def serve(flags: tuple[str, ...]) -> Ending:
        ended = subprocess.run(
            [*command, *flags],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Ending(ended.returncode, ended.stdout)

    with ThreadPoolExecutor(2) as pool:
        for flags, ending in zip(cases, pool.map(serve, cases), strict=True):
            assert_refusal(ending, REFUSED_FLAGS[flags])


@pytest.mark.parametrize("topic", ["kv", "KVPolicy"])
def test_help_shows_the_flags(forks: Forks, topic: str) -> None:
    ending = forks.run((f"--help={topic}",))
    assert ending.exit_code == 0
    settings = ("--kv-policy", "--kv-budget", "--kv-tau", "--kv-policy-config")
    for flag in (*settings, "--kv-request-policies", "--kv-request-max-budget"):
        assert f"  {flag} " in ending.output
