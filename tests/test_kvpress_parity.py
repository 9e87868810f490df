# SPDX-License-Identifier: Apache-2.0
"""The policies of other papers against NVIDIA's kvpress: the same tokens of the same prompt.

kvpress runs in its own environment and writes queries, keys, values and what it keeps; see
tests/reference/kvpress_selections.py. kvpress knows no modalities, so nothing here protects text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_acckv.policies import make_policy
from vllm_acckv.policies.base import Layer, Policy
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Layout

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-kvpress"
SCRIPT = ROOT / "tests" / "reference" / "kvpress_selections.py"

LENGTH, LAYERS = 200, 4
MODALITY = torch.tensor(
    [TEXT] * 5 + ([VIDEO] * 20 + [AUDIO] * 11) * 5 + [TEXT] * 40, dtype=torch.int8
)
# The scores of the last token kept and the first one dropped must differ by this share, well above
# fp32's error; then nothing excuses another choice.
CLEAR = 1e-5


@dataclass(frozen=True)
class Run:
    """One press on one model, as the script takes it."""

    model: str
    attention: str
    press: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join(map(str, (self.model, self.attention, *self.options.values())))


MODELS = [(model, attention) for model in ("llama", "qwen2") for attention in ("eager", "sdpa")]
RATIOS = (0.5, 0.75, 0.9)
SNAPKV = [
    Run(*model, "SnapKVPress", {"compression_ratio": ratio, "window_size": w, "kernel_size": k})
    for model in MODELS
    for ratio, w, k in [(0.5, 64, 5), (0.75, 32, 5), (0.75, 8, 7), (0.9, 8, 1)]
]
OBSERVED = [
    Run(model, "eager", "ObservedAttentionPress", {"compression_ratio": ratio})
    for model in ("llama", "qwen2")
    for ratio in RATIOS
]
STREAMING = [
    Run("llama", "sdpa", "StreamingLLMPress", {"compression_ratio": ratio, "n_sink": sinks})
    for ratio in RATIOS
    for sinks in (4, 0, 7)
]
RANDOM = [
    Run("llama", "sdpa", "RandomPress", {"compression_ratio": ratio, "seed": 1}) for ratio in RATIOS
]
# C = l * (1 - compression_ratio) entries are kept on average. kvpress takes the window out of
# them and hands out n_i = C * 2 - C / beta ... C / beta, at most l - window; the authors, and this
# package, keep the window on top: window + n_i. Both leave the pyramid for equal layers, on other
# conditions: kvpress where the last n_i would be below the window, the authors where l < 2 * C.
SAME, THEIRS_FLAT, OURS_FLAT = "same", "kvpress is flat", "ours is flat"
PYRAMIDS = {
    (0.75, 8, 5): SAME,
    (0.75, 2, 20): SAME,
    (0.5, 8, 5): SAME,
    (0.5, 8, 20): SAME,  # the first layer keeps everything
    (0.75, 8, 20): THEIRS_FLAT,
    (0.75, 32, 5): THEIRS_FLAT,
    (0.25, 8, 20): OURS_FLAT,
}
PYRAMIDKV = [
    Run(
        *model,
        "PyramidKVPress",
        {"compression_ratio": ratio, "window_size": w, "kernel_size": 5, "beta": beta},
    )
    for model in (MODELS[0], MODELS[3])
    for ratio, w, beta in PYRAMIDS
]
RUNS = [*SNAPKV, *OBSERVED, *STREAMING, *RANDOM, *PYRAMIDKV]

Tokens = list[list[int]]  # per KV head


class Oracle:
    """What the script wrote."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def kept(self, run: Run, layer: int) -> Tokens:
        """What kvpress keeps, after a look at how clear its choice is."""
        tokens = self._tensors[f"{RUNS.index(run)}.kept"][layer]
        scores = self._tensors[f"{RUNS.index(run)}.scores"][layer]
        last = scores.masked_fill(~tokens, torch.inf).amin(1)
        first = scores.masked_fill(tokens, -torch.inf).amax(1)
        assert bool((last - first > CLEAR * last).all()), "a near-tie; choose another SEED"
        return [head.nonzero().flatten().tolist() for head in tokens]

    def size(self, run: Run, layer: int) -> int:
        """Entries that kvpress keeps of every head."""
        (size,) = {len(head) for head in self.kept(run, layer)}
        return size

    def ours(
        self, run: Run, layer: int, policy: Policy, modality: torch.Tensor = MODALITY
    ) -> Tokens:
        """What ``policy`` keeps of the same queries, keys and values."""
        queries, keys, values = (
            self._tensors[f"{run.model}.{run.attention}.{part}"][layer]
            for part in ("queries", "keys", "values")
        )
        done = policy.compress(queries, keys, values, modality, layer=layer, num_layers=LAYERS)
        return [sorted(head) for head in done.positions.expand(len(keys), -1).tolist()]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    if not (ENVIRONMENT / ".made").exists():
        pytest.fail("There is no environment for kvpress; run make oracles")
    path = tmp_path_factory.mktemp("kvpress") / "selections.safetensors"
    runs = json.dumps([asdict(run) for run in RUNS])
    command = [ENVIRONMENT / "bin" / "python", SCRIPT, runs, path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Oracle(load_file(path))


def total(name: str, budget: int, **options: Any) -> Policy:
    return make_policy(name, budget=budget, budget_scope="total", **options)


def snapkv(run: Run, budget: int) -> Policy:
    return total(
        "snapkv", budget, window=run.options["window_size"], kernel=run.options["kernel_size"]
    )


@pytest.mark.parametrize("run", SNAPKV, ids=str)
def test_snapkv(oracle: Oracle, run: Run) -> None:
    for layer in range(LAYERS):
        policy = snapkv(run, oracle.size(run, layer))
        assert oracle.ours(run, layer, policy) == oracle.kept(run, layer)


@pytest.mark.parametrize("run", OBSERVED, ids=str)
def test_h2o_without_recent_tokens_is_observed_attention(oracle: Oracle, run: Run) -> None:
    for layer in range(LAYERS):
        policy = total("h2o", oracle.size(run, layer), recent_ratio=0, normalize=True)
        assert oracle.ours(run, layer, policy) == oracle.kept(run, layer)


@pytest.mark.parametrize("run", STREAMING, ids=str)
def test_streaming(oracle: Oracle, run: Run) -> None:
    for layer in range(LAYERS):
        policy = total("streaming", oracle.size(run, layer), sinks=run.options["n_sink"])
        assert oracle.ours(run, layer, policy) == oracle.kept(run, layer)


@pytest.mark.parametrize("run", RANDOM, ids=str)
def test_random_keeps_as_many(oracle: Oracle, run: Run) -> None:
    for layer in range(LAYERS):
        size = oracle.size(run, layer)
        ours = oracle.ours(run, layer, total("random", size, protect_text=False))
        assert [len(set(head)) for head in ours] == [size] * len(ours)


@pytest.mark.parametrize("run", PYRAMIDKV, ids=str)
def test_pyramidkv(oracle: Oracle, run: Run) -> None:
    ratio, window, beta = (run.options[key] for key in ("compression_ratio", "window_size", "beta"))
    mean = int(LENGTH * (1 - ratio))  # exact: these ratios are whole quarters
    policy = total("pyramidkv", mean + window, window=window, kernel=5, beta=beta)
    layout = Layout(MODALITY.numpy())
    sizes = [policy.entries(layout, Layer(layer, LAYERS)) for layer in range(LAYERS)]
    theirs = [oracle.size(run, layer) for layer in range(LAYERS)]

    regime = PYRAMIDS[ratio, window, beta]
    if regime == SAME:
        assert [size - window for size in sizes] == theirs
    elif regime == THEIRS_FLAT:
        assert theirs == [mean] * LAYERS
        assert abs(sum(sizes) - LAYERS * (mean + window)) <= LAYERS / 2  # each is rounded
    else:
        assert sizes == [mean + window] * LAYERS
        assert abs(sum(theirs) - LAYERS * mean) <= LAYERS / 2
    for counts, flat in ((sizes, regime == OURS_FLAT), (theirs, regime == THEIRS_FLAT)):
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == (1 if flat else LAYERS)

    # Whatever its size, a layer is SnapKV's, here and there.
    for layer in range(LAYERS):
        assert oracle.ours(run, layer, snapkv(run, theirs[layer])) == oracle.kept(run, layer)
        ours = oracle.ours(run, layer, policy)
        assert {len(head) for head in ours} == {sizes[layer]}
        assert ours == oracle.ours(run, layer, snapkv(run, sizes[layer]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {}),
        ("pyramidkv", {"window": 8, "kernel": 7}),
        ("h2o", {}),
        ("streaming", {}),
        ("random", {"protect_text": False}),
    ],
)
def test_modalities_do_not_matter(oracle: Oracle, name: str, options: dict[str, Any]) -> None:
    """Where the budget counts all tokens and no text is protected."""
    policy = total(name, 70, **options)
    pictures = torch.full_like(MODALITY, VIDEO)
    for layer in range(LAYERS):
        mixed = oracle.ours(SNAPKV[0], layer, policy)
        assert mixed == oracle.ours(SNAPKV[0], layer, policy, pictures)


RUNNER = """
from vllm_acckv.hf import kv_policy

import json
import transformers
from tests.hf_models import MODALITY, generate, prompt_ids, tiny

model = tiny("llama", "sdpa")
with kv_policy(model, "acckv", MODALITY, budget=0.3, tau=0.2) as run:
    tokens, _, _ = generate(model, input_ids=prompt_ids())
kept = [layer.positions.tolist() for layer in run.layers]
print(json.dumps([transformers.__version__, tokens.tolist(), kept]))
"""


def test_hugging_face_runner_on_kvpress_own_transformers() -> None:
    """That environment has an older transformers; nothing may depend on which."""
    printed = [
        subprocess.run(
            [python, "-c", RUNNER],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()[-1]
        for python in (ENVIRONMENT / "bin" / "python", sys.executable)
    ]
    (older, *theirs), (newer, *ours) = map(json.loads, printed)
    assert older != newer
    assert theirs == ours
