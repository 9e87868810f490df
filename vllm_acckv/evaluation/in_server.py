# SPDX-License-Identifier: Apache-2.0
"""Answers through a running ``vllm serve MODEL --kv-policy ...``, over HTTP."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation.arms import Answer, Arm
from vllm_acckv.evaluation.in_vllm import conversation
from vllm_acckv.evaluation.samples import Sample
from vllm_acckv.tools.demo import COMPACTIONS, FINISHED, FREED_BLOCKS, SKIPPED
from vllm_acckv.tools.server import Metrics

_AT_ONCE = 8
_BATCH = 32
"""Questions between two readings of the counters; answers are written down after each batch."""
_LAG_SECONDS = 30.0
_POLL_SECONDS = 0.1
_TIMEOUT_SECONDS = 30.0
_LOCAL = ("localhost", "127.0.0.1", "::1")


class InServer:
    """A server that answers under the policy of each arm, as its requests ask for.

    Attributes:
        model: the name it is served by; checkpoint: what the server loaded, in its own file system.

    What an arm does not set is as the server was told by its flags, if that runs the same policy.

    KV entries are measured by the server's counters: what a batch freed, divided among its answers
    in proportion to their prompts. A freed block is one of the block table, which all layers share,
    so it counts ``block_size`` tokens once, and the layer that keeps most decides how many there
    are. ``InVLLM`` counts each layer's own; it finds fewer entries where layers differ, as under
    AccKV's filter or PyramidKV. A request that ends with its first token frees nothing. What the
    filter dropped and W are not among the counters.

    Other traffic on the server disturbs all this: its freed blocks are taken for the batch's.
    """

    def __init__(
        self, url: str, model: str | None = None, max_tokens: int = 64, api_key: str | None = None
    ) -> None:
        """
        Args:
            url: such as ``http://localhost:8000``, with or without ``/v1``.
            model: the name it is served by; the server's first by default.
            max_tokens: of an answer.

        Raises:
            KVPolicyError: for a server that cannot be reached, does not accept the key, does not
                have the model or runs without KV policies.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise KVPolicyError(f"{url} is no URL of a server, such as http://localhost:8000.")
        # A proxy of the environment must not see requests to this machine.
        local = parts.hostname in _LOCAL
        handlers = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(*handlers)
        self._client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key or "none",
            # A request that is sent again would be counted twice.
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )
        self.max_tokens = max_tokens
        self.block_size = self._block_size()
        served = {one.id: one for one in self._told(lambda: list(self._client.models.list()))}
        self.model = model or next(iter(served))
        if self.model not in served:
            raise KVPolicyError(
                f"The server at {self.url} has no model {model}; it serves {', '.join(served)}."
            )
        self.checkpoint = str((served[self.model].model_extra or {}).get("root") or self.model)

    def answer(self, arm: Arm, samples: Sequence[Sample]) -> Iterator[Answer]:
        """In the order of ``samples``.

        Raises:
            KVPolicyError: if the server refuses a request, or goes away.
        """
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            before = self._metrics()
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                asked = [pool.submit(self._ask, arm, sample) for sample in batch]
                try:
                    said = [one.result() for one in asked]
                finally:
                    pool.shutdown(cancel_futures=True)
            after = self._after(before, len(batch))
            freed = after.value(FREED_BLOCKS) - before.value(FREED_BLOCKS)
            share = freed * self.block_size / sum(tokens for _, tokens in said)
            for sample, (text, tokens) in zip(batch, said, strict=True):
                yield Answer(sample.id, arm.name, text, tokens * (1 - share), tokens)

    def _ask(self, arm: Arm, sample: Sample) -> tuple[str, int]:
        """The answer's text and the number of prompt tokens."""
        messages: Any = conversation(sample)
        # vllm serve takes what is not set from the checkpoint's generation_config.json.
        body = {"vllm_xargs": arm.request(), "repetition_penalty": 1.0}
        completion = self._told(
            lambda: self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                max_tokens=self.max_tokens,
                temperature=0,
                extra_body=body,
            ),
            f"{arm.name}, {sample.id}: ",
        )
        assert completion.usage is not None
        return completion.choices[0].message.content or "", completion.usage.prompt_tokens

    def _told(self, call: Callable[[], Any], what: str = "") -> Any:
        """Result of a call to the API; what went wrong as a sentence, after ``what`` was asked."""
        try:
            return call()
        except openai.APITimeoutError:
            raise KVPolicyError(
                f"{what}the server at {self.url} gave no answer in time; what it said before is "
                "kept, so run the command again once the server is less busy."
            ) from None
        except openai.APIConnectionError:
            raise self._unreachable() from None
        except openai.AuthenticationError:
            raise KVPolicyError(
                f"The server at {self.url} does not accept the API key; give the one that it was "
                "started with by --api-key or in VLLM_API_KEY."
            ) from None
        except openai.APIStatusError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else None
            raise KVPolicyError(
                f"{what}the server at {self.url} answers {error.status_code}: {said or error}"
            ) from None

    def _unreachable(self) -> KVPolicyError:
        return KVPolicyError(
            f"The server at {self.url} cannot be reached; start it, or give its address by --url."
        )

    # Counters

    def _metrics(self) -> Metrics:
        try:
            with self._opener.open(f"{self.url}/metrics", timeout=_TIMEOUT_SECONDS) as answer:
                return Metrics(answer.read().decode())
        except urllib.error.HTTPError as error:
            raise KVPolicyError(
                f"{self.url}/metrics answers {error.code}; give the address of vllm serve itself, "
                "because KV entries are measured by its counters."
            ) from None
        except ValueError:
            raise KVPolicyError(
                f"{self.url}/metrics holds no counters; give the address of vllm serve by --url."
            ) from None
        except (OSError, http.client.HTTPException):
            raise self._unreachable() from None

    def _block_size(self) -> int:
        metrics = self._metrics()
        if FREED_BLOCKS not in metrics.names():
            raise KVPolicyError(
                f"The server at {self.url} runs without KV policies; install vllm-acckv there and "
                "start it with --kv-policy."
            )
        return int(metrics.labels("vllm:cache_config_info")[0]["block_size"])

    def _after(self, before: Metrics, requests: int) -> Metrics:
        """The counters with as many ``requests`` more, which come a moment after the answers."""

        def missing(names: Sequence[str]) -> bool:
            more = sum(now.value(name) - before.value(name) for name in names)
            return more < requests

        deadline = time.monotonic() + _LAG_SECONDS
        now = self._metrics()
        while missing([FINISHED]) or missing([COMPACTIONS, SKIPPED]):
            if time.monotonic() > deadline:
                raise KVPolicyError(
                    f"{self.url}/metrics did not count {requests} requests within "
                    f"{_LAG_SECONDS:.0f} s of their answers; several servers behind one address "
                    "cannot be measured."
                )
            time.sleep(_POLL_SECONDS)
            now = self._metrics()
        return now
