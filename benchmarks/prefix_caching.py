# SPDX-License-Identifier: Apache-2.0
"""A second question about a clip: what the prefix cache still holds after a compaction.

    python benchmarks/prefix_caching.py [--budget 0.2] [--rounds 5]

Each variant is an engine of its own. A round empties the prefix cache, asks a question about a long
clip, and then another one. Prints medians of the time to the first token, and the share of the
second prompt that was found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

QUESTIONS = ("What happens in the clips?", "Which sound is the last one, and what is seen then?")

# Options of the engine, and of every request.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full cache": ({}, {"kv_policy": "full"}),
    "acckv, no prefix caching": ({"enable_prefix_caching": False}, {}),
    "acckv, rewritten blocks lost": ({"kv_policy_prefix_copies": False}, {}),
    "acckv, rewritten blocks copied": ({}, {}),
}


def conversation(folder: Path, question: str) -> list[dict[str, Any]]:
    """Three clips of 28 s with picture and sound, then a question."""
    parts: list[dict[str, Any]] = []
    for seed in range(3):
        video, sound = folder / f"{seed}.mp4", folder / f"{seed}.wav"
        parts += [
            {"type": "video_url", "video_url": {"url": video.as_uri()}},
            {"type": "audio_url", "audio_url": {"url": sound.as_uri()}},
        ]
    parts.append({"type": "text", "text": question})
    return [{"role": "user", "content": parts}]


def ask(llm: Any, prompt: Any, xargs: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token, and the share of the prompt that was found."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args=xargs)
    engine = llm.llm_engine
    engine.add_request("question", prompt, params)
    first, share, started = 0.0, 0.0, time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            first = first or time.perf_counter() - started
            share = (output.num_cached_tokens or 0) / len(output.prompt_token_ids)
    return first, share


def measure(pipe: Any, folder: Path, budget: float, rounds: int, name: str) -> None:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    options, xargs = VARIANTS[name]
    copies = options.get("kv_policy_prefix_copies", True)
    llm = LLM(
        model=str(folder / "model"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        block_size=32,
        enable_prefix_caching=options.get("enable_prefix_caching", True),
        allowed_local_media_path=str(folder),
        additional_config={
            "kv_policy": {"policy": "acckv", "budget": budget},
            "kv_policy_prefix_copies": copies,
        },
    )
    prompts = [llm._preprocess_chat([conversation(folder, one)])[0] for one in QUESTIONS]
    results = []
    for _ in range(rounds + 1):
        llm.reset_prefix_cache()
        results.append([ask(llm, prompt, xargs) for prompt in prompts])
    pipe.send((results[1:], len(prompts[1]["prompt_token_ids"])))  # the first round warms up
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from vllm_acckv.tools import clips, tiny_model

    folder = Path(tempfile.mkdtemp())
    tiny_model.build(folder / "model")
    for seed in range(3):
        clips.make_clip(folder / f"{seed}.mp4", seconds=28, seed=seed, sound=False)
        clips.make_wav(folder / f"{seed}.wav", seconds=28, seed=seed)
    rows = []
    for name in VARIANTS:
        mine, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (theirs, folder, args.budget, args.rounds, name)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
        process.start()
        theirs.close()
        results, length = mine.recv()
        process.join()
        first, second = zip(*results, strict=True)
        times = [statistics.median(one[0] for one in question) for question in (first, second)]
        share = statistics.median(one[1] for one in second)
        rows.append(f"| {name} | {times[0]:.3f} | {times[1]:.3f} | {share:.1%} |")
    print(f"\nprompts of {length} tokens, budget {args.budget:g}")
    print("| | first question (s) | second question (s) | of it found |")
    print("|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
