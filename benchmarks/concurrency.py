# SPDX-License-Identifier: Apache-2.0
"""How many requests decode at once in a KV cache that holds N of them uncompressed.

    python benchmarks/concurrency.py [--full 8] [--budgets 1.0 0.5 0.2 0.1] [--answer 256]

The pool is exactly as large as N requests with the full cache need to their last token. For each
budget, more requests than can ever run are queued at once, with answers of half to one and a half
times ``--answer`` tokens; the means are over the steps in which some still wait and one has already
finished. "decoding" are requests whose prompt is complete.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

# First: it sets the environment that vLLM reads when it is imported.
from long_clip import conversation
from vllm import LLM, SamplingParams

from vllm_acckv.tools import tiny_model

BLOCK_SIZE = 32


def run(llm: LLM, prompt: Any, count: int, budget: float, answer: int) -> dict[str, float]:
    """Answer ``count`` equal requests, stepped by hand."""
    xargs = {"kv_policy": "full"} if budget == 1 else {"kv_budget": budget}
    lengths = random.Random(0)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    for number in range(count):
        tokens = lengths.randint(answer // 2, answer + answer // 2)
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=xargs)
        engine.add_request(f"{number}", prompt, params)
    requests = list(scheduler.requests.values())
    decoding = []
    while engine.has_unfinished_requests():
        engine.step()
        if len(scheduler.requests) < count and scheduler.waiting:
            complete = [one.num_output_tokens > 0 for one in scheduler.running]
            decoding.append(sum(complete))
    return {
        "decoding": statistics.mean(decoding or [0]),
        "most": max(decoding, default=0),
        "preemptions": sum(request.num_preemptions for request in requests),
        "requests": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", type=int, default=8, help="N, requests that fit uncompressed")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1])
    parser.add_argument("--answer", type=int, default=256, help="tokens per answer")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--watermark", type=float, default=0.0, help="vLLM's own option")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    model, messages = tiny_model.build(folder / "model"), conversation(folder)
    length = 3154  # of this conversation; checked below
    blocks = args.full * -(-(length + args.answer) // BLOCK_SIZE)
    llm = LLM(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=256,
        watermark=args.watermark,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=blocks + 1,  # vLLM keeps one for itself
        enable_prefix_caching=False,
        allowed_local_media_path=str(folder),
        additional_config={"kv_policy": "acckv"},
    )
    (prompt,) = llm._preprocess_chat([messages])
    assert len(prompt["prompt_token_ids"]) == length
    print(f"\n{length} prompt tokens, {args.answer} answer tokens, {blocks} blocks of {BLOCK_SIZE}")
    print("| budget | decoding, mean | of full | most | preemptions |\n|---|---|---|---|---|")
    run(llm, prompt, 2, 0.2, 8)  # warms up
    full = 0.0
    for budget in args.budgets:
        share = budget + (length // 100 + args.answer / 2) / length
        result = run(llm, prompt, int(4 * args.full / share), budget, args.answer)
        full = full or result["decoding"]
        print(
            f"| {budget:g} | {result['decoding']:.1f} | {result['decoding'] / full:.2f}x "
            f"| {result['most']:.0f} "
            f"| {result['preemptions']:.0f} of {result['requests']:.0f} requests |",
            flush=True,
        )


if __name__ == "__main__":
    main()
