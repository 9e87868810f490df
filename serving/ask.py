# SPDX-License-Identifier: Apache-2.0
"""Ask a running server about a local clip: python serving/ask.py clip.mp4 "What happens?"."""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path, help="mp4 with sound")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--policy", choices=("acckv", "full"), help="default: the server's")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--tau", type=float)
    parser.add_argument(
        "--no-settings",
        action="store_true",
        help="do not ask for the clip's sound: for models that take it by themselves, and for "
        "servers without --trust-request-mm-kwargs",
    )
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key="none")
    data = base64.b64encode(args.clip.read_bytes()).decode()
    clip = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
    own = {"kv_policy": args.policy, "kv_budget": args.budget, "kv_tau": args.tau}
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": [clip, {"type": "text", "text": args.question}]}],
        extra_body={
            **({} if args.no_settings else {"mm_processor_kwargs": {"use_audio_in_video": True}}),
            "vllm_xargs": {key: value for key, value in own.items() if value is not None},
        },
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
