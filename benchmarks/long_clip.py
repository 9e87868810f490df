# SPDX-License-Identifier: Apache-2.0
"""Full cache against AccKV on a long prompt, alternating on one engine with the tiny model.

    python benchmarks/long_clip.py [--budget 0.2] [--requests 8] [--rounds 3]

Prints the medians as a table. The model is tiny and random, so only ratios of time and the block
counts mean anything; a real model spends far more time per layer on everything but compaction.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
)

from vllm import LLM, SamplingParams

from vllm_acckv.tools import clips, tiny_model


def conversation(folder: Path) -> list[dict[str, Any]]:
    """Three clips of 28 s with picture and sound, then a question."""
    parts: list[dict[str, Any]] = []
    for seed in range(3):
        video, sound = folder / f"{seed}.mp4", folder / f"{seed}.wav"
        clips.make_clip(video, seconds=28, seed=seed, sound=False)
        clips.make_wav(sound, seconds=28, seed=seed)
        parts += [
            {"type": "video_url", "video_url": {"url": video.as_uri()}},
            {"type": "audio_url", "audio_url": {"url": sound.as_uri()}},
        ]
    parts.append({"type": "text", "text": "What happens in the clips?"})
    return [{"role": "user", "content": parts}]


def run(llm: LLM, prompt: Any, count: int, xargs: dict[str, Any]) -> dict[str, float]:
    """Answer ``count`` equal requests as one batch, stepped by hand."""
    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True, extra_args=xargs)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    for number in range(count):
        engine.add_request(f"{number}", prompt, params)
    prefill, decode, held = 0.0, [], [0]
    while engine.has_unfinished_requests():
        answering = [request.num_output_tokens > 0 for request in scheduler.running]
        started = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - started
        if len(answering) == count and all(answering):
            decode.append(elapsed)
        elif not decode:
            prefill += elapsed
        if scheduler.running:
            held.append(free - pool.get_num_free_blocks())
    return {
        "prefill of all requests (s)": prefill,
        "decode step (s)": statistics.median(decode),
        "blocks, peak": max(held),
        "blocks, last request at its end": held[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    llm = LLM(
        model=str(tiny_model.build(folder / "model")),
        dtype="float32",
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=8192,
        block_size=32,
        enable_prefix_caching=False,
        allowed_local_media_path=str(folder),
        additional_config={"kv_policy": {"policy": "acckv", "budget": args.budget}},
    )
    (prompt,) = llm._preprocess_chat([conversation(folder)])
    policies = {"full": {"kv_policy": "full"}, "acckv": {}}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    for _ in range(args.rounds + 1):
        for name, xargs in policies.items():
            runs[name].append(run(llm, prompt, args.requests, xargs))
    length = len(prompt["prompt_token_ids"])
    print(f"\n{args.requests} requests of {length} prompt tokens, budget {args.budget:g}")
    print("| | full | acckv | ratio |\n|---|---|---|---|")
    for label in runs["full"][0]:
        # The first round warms up.
        full, acckv = (statistics.median(one[label] for one in runs[name][1:]) for name in runs)
        print(f"| {label} | {full:.4g} | {acckv:.4g} | {acckv / full:.3f} |")


if __name__ == "__main__":
    main()
