# SPDX-License-Identifier: Apache-2.0
"""What each policy costs per layer, and how many entries it keeps.

    python benchmarks/policies.py [--tokens 3000] [--budget 0.2] [--rounds 5]

One layer of Qwen2.5-Omni-7B's shape (28 query heads, 4 KV heads, 128 dimensions) with random bf16
tensors: 45 % video, 50 % audio, text around. Medians; only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vllm_acckv.policies import BUILT_IN, make_policy
from vllm_acckv.spans import AUDIO, TEXT, VIDEO

HEADS, KV_HEADS, WIDTH = 28, 4, 128
# A layer in the middle, so that FastV and PyramidKV have something to decide.
LAYER, NUM_LAYERS = 14, 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    video, audio = int(0.45 * args.tokens), int(0.5 * args.tokens)
    text = args.tokens - video - audio
    codes = [TEXT] * (text // 3) + [VIDEO] * video + [AUDIO] * audio + [TEXT] * (text - text // 3)
    modality = torch.tensor(codes, dtype=torch.int8)
    torch.manual_seed(0)
    query = torch.randn(HEADS, args.tokens, WIDTH, dtype=torch.bfloat16)
    key, value = torch.randn(2, KV_HEADS, args.tokens, WIDTH, dtype=torch.bfloat16)
    angles = 99 * torch.rand(args.tokens, WIDTH // 2)
    print(f"{args.tokens} tokens, budget {args.budget:g}, {torch.get_num_threads()} threads")
    print("| policy | entries per KV head | ms per layer |\n|---|---|---|")
    for name in BUILT_IN:
        policy = make_policy(name, budget=args.budget)
        seconds = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            out = policy.compress(
                query, key, value, modality, layer=LAYER, num_layers=NUM_LAYERS, angles=angles
            )
            seconds.append(time.perf_counter() - start)
        cost = statistics.median(seconds) * 1000
        print(f"| `{name}` | {out.keys.shape[1]} | {cost:.1f} |", flush=True)


if __name__ == "__main__":
    main()
