# SPDX-License-Identifier: Apache-2.0
"""Is a KV policy right on this GPU? Kernels against float64 or PyTorch, CUDA graphs against none.

    python benchmarks/gpu_check.py [--output docs/results-gpu.json]

Needs nothing but vLLM and this checkout: no network, no weights. Kernels run at the shapes of
Qwen2.5-Omni-7B and of a Vicuna-7B decoder; engines serve the tiny model with each attention
backend, and must not wait for the device more often than stock vLLM does; the models of this
package must answer as transformers does on the CPU. Prints a table and ends with status 1 if
something is wrong. Without a GPU, small kernels run in Triton's interpreter, and no engine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_common import Check
from gpu_report import merge

if TYPE_CHECKING:
    from tests.engines import Trace

ROOT = Path(__file__).parent.parent

# By kind of step, for each step: where in the code the host waited for the device.
Waits = dict[str, list[list[str]]]


def differing(one: Trace, other: Trace) -> float:
    """Share of the answers, and of what layers kept, that is not the same."""
    pairs = list(zip(one.answers, other.answers, strict=True))
    different = [ours.tokens != theirs.tokens for ours, theirs in pairs]
    if one.kept and other.kept:
        different += [one.kept[name] != other.kept.get(name) for name in one.kept]
    return sum(different) / len(different)


def engine_checks(folder: Path) -> Iterator[Check]:
    """The tiny model: CUDA graphs on and off, and policy ``full`` against stock vLLM."""
    from tests.engines import WITHOUT_PLUGIN, Ask, Engine
    from vllm_acckv.tools import clips, tiny_model

    model = tiny_model.build(folder / "model")
    video = clips.make_clip(folder / "clip.mp4", seconds=6, sound=False)
    sound = clips.make_wav(folder / "clip.wav", seconds=6)
    parts = [
        {"type": "video_url", "video_url": {"url": video.as_uri()}},
        {"type": "audio_url", "audio_url": {"url": sound.as_uri()}},
    ]

    def ask(question: str, **xargs: Any) -> Ask:
        content = [*parts, {"type": "text", "text": question}]
        return Ask([{"role": "user", "content": content}], xargs=xargs, max_tokens=24)

    asks = [
        ask("What happens?", kv_tau=0.9, kv_budget=0.5),
        ask("Which colours are seen, and which sound is heard last?"),
        ask("And then?", kv_policy="snapkv"),
        ask("What else?", kv_policy="full"),
        ask("Why?", kv_policy_config='{"preset": "corrected"}'),
    ]
    plain = [Ask(one.messages, max_tokens=24) for one in asks]

    def run(asks: list[Ask], policy: str | None, **options: Any) -> tuple[Trace, Waits]:
        config = {"additional_config": {"kv_policy": policy}} if policy else {}
        environment = {**({} if policy else WITHOUT_PLUGIN), "VLLM_GPU_SYNC_CHECK": "warn"}
        with Engine(model, environment, **config, **options, max_num_batched_tokens=128) as engine:
            return engine.run(*asks, arrive=[0, 0, 2, 5]), engine.call("waits", asks)

    for backend, dtype in (("TRITON_ATTN", "float32"), ("FLASH_ATTN", "bfloat16")):
        options = {
            "attention_backend": backend,
            "dtype": dtype,
            "enforce_eager": False,
            "cudagraph_capture_sizes": [1, 2, 4, 8],  # few, because each takes time to capture
        }
        graphs, ours = run(asks, "acckv", **options)
        freed = graphs.counters.get("freed_blocks", 0) > 0
        yield Check("blocks came back", backend, float(not freed), 0.0)
        without, _ = run(asks, "acckv", **options, compilation_config={"cudagraph_mode": "NONE"})
        # In bf16, FlashAttention's number of splits, another one in graphs, may turn a choice.
        bound = 0.0 if dtype == "float32" else 0.5
        yield Check("CUDA graphs", backend, differing(graphs, without), bound)
        stock, stocks = run(plain, None, **options)
        full, fulls = run(plain, "full", **options)
        yield Check("full is stock", backend, differing(full, stock), bound)
        for kind, others, name in (("decode", stocks, "stock"), ("prefill", fulls, "full")):
            what = f"waits per {kind} step beyond those of {name}"
            yield Check(what, backend, more_waits(ours[kind], others[kind]), 0.0)


def model_checks(folder: Path, **options: Any) -> Iterator[Check]:
    """The models of this package in vLLM against transformers on the CPU, fp32."""
    from tests import tiny_avicuna, tiny_videollama2
    from tests.engines import Ask, Engine
    from tests.own_models import OwnModel
    from vllm_acckv.tools import clips

    folder.mkdir()
    clip = clips.make_clip(folder / "clip.mp4", seconds=4)
    content = [
        {"type": "video_url", "video_url": {"url": clip.as_uri()}},
        {"type": "text", "text": "What happens in the clip?"},
    ]
    settings = [{"policy": policy, "budget": 0.3} for policy in ("full", "acckv", "h2o")]
    asks = [
        Ask([{"role": "user", "content": content}], xargs={"kv_policy_config": one})
        for one in settings
    ]
    for name, build in (("VideoLLaMA2", tiny_videollama2.build), ("AVicuna", tiny_avicuna.build)):
        checkpoint = build(folder / name)
        with Engine(
            checkpoint,
            additional_config={"kv_policy": "acckv"},
            limit_mm_per_prompt={"video": 1, "audio": 1},
            **options,
        ) as engine:
            answers = engine.run(*asks).answers
        own = OwnModel(checkpoint)
        for ask, answer, one in zip(asks, answers, settings, strict=True):
            _, logprobs, _ = own.run_policy(ask, one, answer.tokens)
            error = float(abs(answer.logprobs - logprobs).max())
            # cuDNN convolves fp32 in TF32.
            yield Check(f"{name} equals transformers", str(one["policy"]), error, 0.05)


def more_waits(ours: list[list[str]], theirs: list[list[str]]) -> float:
    """By how many a step's waits exceed those of the other engine, on average; says where."""
    one, other = (sum(map(len, steps)) / len(steps) for steps in (ours, theirs))
    if one > other:
        places = Counter(place for step in ours for place in step)
        print("waits for the device:", dict(places), file=sys.stderr)
    return max(0.0, one - other)


def table(machine: str, checks: list[Check]) -> str:
    lines = [f"{machine}", "", "| check | where | error | allowed | |", "|---|---|---|---|---|"]
    for check in checks:
        verdict = "ok" if check.passed else "**wrong**"
        numbers = f"{check.error:.1e} | {check.bound:.0e}"
        lines.append(f"| {check.what} | {check.shape} | {numbers} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file to add the results to")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cuda" if cuda else "cpu"
    machine = torch.cuda.get_device_name() if cuda else "no GPU, Triton's interpreter"
    torch.manual_seed(0)
    from gpu_check_kernels import kernel_checks

    checks = list(kernel_checks(device))
    if cuda:
        with tempfile.TemporaryDirectory() as folder:
            checks += engine_checks(Path(folder))
            checks += model_checks(Path(folder) / "models", attention_backend="TRITON_ATTN")
    print(table(machine, checks))
    if arguments.output is not None:
        results = [{**asdict(check), "passed": check.passed} for check in checks]
        merge(arguments.output, "gpu-check", {"machine": machine, "checks": results})
    sys.exit(0 if all(check.passed for check in checks) else 1)


if __name__ == "__main__":
    main()
