# SPDX-License-Identifier: Apache-2.0
"""``vllm bench serve`` with clips: a server with the full KV cache against one with AccKV.

    pip install '.[bench]'
    python benchmarks/serve.py [--requests 32] [--blocks 320] [--output-tokens 384] [--rounds 2]

Starts one server of the tiny model at a time, alternating, each with the same KV space, and sends
all requests at once, so that KV space decides how many of them run. Prints means over the rounds
as a table. The model is tiny and random: only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from vllm_acckv.tools import clips, tiny_model
from vllm_acckv.tools.server import ENVIRONMENT, Server

SERVERS = {"full": (), "acckv": ("--kv-policy", "acckv")}
# Label -> key of the result of vllm bench serve, or of what /metrics said.
ROWS = {
    "requests/s": "request_throughput",
    "output tokens/s": "output_throughput",
    "TTFT, mean (ms)": "mean_ttft_ms",
    "TTFT, p99 (ms)": "p99_ttft_ms",
    "TPOT, mean (ms)": "mean_tpot_ms",
    "ITL, mean (ms)": "mean_itl_ms",
    "requests running, peak": "running",
    "preemptions": "preemptions",
}


def write_requests(folder: Path, count: int, seconds: int) -> Path:
    """A data set for vLLM's load generator: each request has a clip and a recording of its own.

    The prompts are whole conversations, which the load generator sends as they are; the recording
    that its data set wants beside each is not sent.
    """
    folder.mkdir()
    lines = []
    for seed in range(count):
        video, sound = folder / f"{seed}.mp4", folder / f"{seed}.wav"
        clips.make_clip(video, seconds=seconds, seed=seed, sound=False)
        clips.make_wav(sound, seconds=seconds, seed=seed)
        parts = [
            {"type": "video_url", "video_url": {"url": video.as_uri()}},
            {"type": "audio_url", "audio_url": {"url": sound.as_uri()}},
            {"type": "text", "text": "What happens in the clip?"},
        ]
        prompt = [{"role": "user", "content": parts}]
        lines.append(json.dumps({"prompt": prompt, "audio": str(sound)}))
    requests = folder / "requests.jsonl"
    requests.write_text("\n".join(lines))
    return requests


def load(server: Server, requests: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run ``vllm bench serve``; its result, and the peak of running requests."""
    running, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.25):
            running.append(server.metrics().value("vllm:num_requests_running"))

    before = server.metrics()
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = requests.with_name("result.json")
    command: list[Any] = [
        *(Path(sys.executable).with_name("vllm"), "bench", "serve"),
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", str(server.client().base_url).removesuffix("/v1/")),
        *("--model", server.model),
        # The one data set from a file whose prompts need not be text.
        *("--dataset-name", "custom_audio", "--dataset-path", requests),
        "--enable-multimodal-chat",
        *("--num-prompts", str(args.requests), "--output-len", str(args.output_tokens)),
        *("--temperature", "0", "--ignore-eos", "--num-warmups", "2", "--disable-tqdm"),
        *("--save-result", "--result-filename", result),
    ]
    try:
        subprocess.run(
            [str(part) for part in command],
            env={**os.environ, **ENVIRONMENT, "NO_PROXY": "127.0.0.1"},
            check=True,
            stdout=sys.stderr,
        )
    finally:
        over.set()
        watcher.join()
    after = server.metrics()
    done = json.loads(result.read_text())
    if done["failed"]:
        raise SystemExit(f"{done['failed']} requests failed.")
    preemptions = "vllm:num_preemptions_total"
    done["running"] = max(running)
    done["preemptions"] = after.value(preemptions) - before.value(preemptions)
    done["prompt"] = done["total_input_tokens"] / done["completed"]
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=24, help="length of the clips")
    parser.add_argument("--output-tokens", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=320, help="KV space, in blocks of 32 tokens")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    flags = (
        *("--num-gpu-blocks-override", str(args.blocks)),
        *("--max-num-seqs", str(args.requests)),
    )
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = tiny_model.build(folder / "model")
        requests = write_requests(folder / "clips", args.requests, args.seconds)
        for _ in range(args.rounds):
            for name, policy in SERVERS.items():
                log = folder / "server.log"
                with Server(model, *flags, *policy, media=folder, log=log) as server:
                    runs[name].append(load(server, requests, args))
    print(
        f"\n{args.requests} requests of {runs['full'][0]['prompt']:.0f} prompt tokens (clips of "
        f"{args.seconds} s) and {args.output_tokens} answer tokens, {args.blocks} blocks\n"
    )
    rounds = [f"{name} {index + 1}" for index in range(args.rounds) for name in SERVERS]
    print(f"| | full | acckv | ratio | {' | '.join(rounds)} |")
    print("|---" * (4 + len(rounds)) + "|")
    for label, key in ROWS.items():
        full, acckv = (statistics.mean(one[key] for one in runs[name]) for name in runs)
        ratio = f"{acckv / full:.2f}" if full else "-"
        single = [f"{runs[name][index][key]:.4g}" for index in range(args.rounds) for name in runs]
        print(f"| {label} | {full:.4g} | {acckv:.4g} | {ratio} | {' | '.join(single)} |")


if __name__ == "__main__":
    main()
