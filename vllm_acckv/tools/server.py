# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` as a child process, and what its ``/metrics`` say."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

from openai import DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Small and offline: fits a machine of two cores and no network."""

ARGUMENTS = (
    *("--dtype", "float32"),
    "--enforce-eager",
    *("--block-size", "32"),
    *("--max-model-len", "4096"),
    *("--max-num-seqs", "4"),
    *("--limit-mm-per-prompt", '{"video": 1, "audio": 1, "image": 0}'),
    # Lets a request say use_audio_in_video.
    "--trust-request-mm-kwargs",
)

_HOST = "127.0.0.1"
_START_SECONDS = 300.0
_ANSWER_SECONDS = 30.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.05
_TAIL_LINES = 40

# A proxy of the environment must not see requests to this machine.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server did not start, or did not do in time what was waited for."""


class Metrics:
    """One reading of ``/metrics``."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for metric in text_string_to_metric_families(text):
            for sample in metric.samples:
                self._samples.setdefault(sample.name, []).append(sample)

    def names(self) -> set[str]:
        """Names of all samples, as a query finds them."""
        return set(self._samples)

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples called ``name`` that have ``labels``; 0 if there are none."""
        return sum(
            sample.value
            for sample in self._samples.get(name, [])
            if labels.items() <= sample.labels.items()
        )

    def labels(self, name: str) -> list[dict[str, str]]:
        """Labels of every sample called ``name``.

        Raises:
            ServerError: if there is none.
        """
        if name not in self._samples:
            raise ServerError(f"/metrics has no {name}.")
        return [sample.labels for sample in self._samples[name]]


class Server:
    """A server for ``model``, up and healthy inside the ``with`` block, gone after it.

    Args:
        arguments: further arguments of ``vllm serve``, after those in ``ARGUMENTS``.
        media: folder from which requests may name files.
        log: file for everything the server prints.
        port: 0 for any free one.
    """

    def __init__(self, model: Path, *arguments: str, media: Path, log: Path, port: int = 0) -> None:
        self.model = str(model)
        self.log = log
        port = _bindable(port)
        self._url = f"http://{_HOST}:{port}"
        self._command = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", self.model),
            *("--host", _HOST, "--port", str(port)),
            *("--allowed-local-media-path", str(media.resolve())),
            *ARGUMENTS,
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            # A session of its own, so that one signal reaches all of vLLM's processes, and
            # Ctrl-C only us.
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.wait_until(self._healthy, "the server to become healthy", _START_SECONDS)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """Id of the server's process, and of the session that all of its processes belong to."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while the server runs."""
        assert self._process is not None
        return self._process.poll()

    def client(self) -> OpenAI:
        """An OpenAI client; a failed request is not repeated."""
        http = DefaultHttpxClient(trust_env=False)
        return OpenAI(base_url=f"{self._url}/v1", api_key="unused", max_retries=0, http_client=http)

    def metrics(self) -> Metrics:
        with _direct.open(f"{self._url}/metrics", timeout=_ANSWER_SECONDS) as answer:
            return Metrics(answer.read().decode())

    def wait_until(
        self, condition: Callable[[], bool], what: str, seconds: float = _ANSWER_SECONDS
    ) -> None:
        """Wait until ``condition()``, described by ``what``, holds.

        Raises:
            ServerError: with the end of the log, when the server ends or ``seconds`` are over.
        """
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None:
                raise self._error(f"vllm serve ended with exit code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise self._error(f"Waited {seconds:.0f} s in vain for {what}")
            time.sleep(_POLL_SECONDS)

    def wait_for_metrics(self, condition: Callable[[Metrics], bool], what: str) -> Metrics:
        """The first reading that fulfils ``condition``.

        The engine sends its counters along with its output, so those of a request can arrive a
        moment after the answer.
        """
        reading = self.metrics()

        def fulfilled() -> bool:
            nonlocal reading
            reading = self.metrics()
            return condition(reading)

        if not condition(reading):
            self.wait_until(fulfilled, what)
        return reading

    def _healthy(self) -> bool:
        try:
            with _direct.open(f"{self._url}/health", timeout=_ANSWER_SECONDS) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _error(self, what: str) -> ServerError:
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return ServerError("\n".join([f"{what}. The end of {self.log}:", *lines]))

    def _stop(self) -> None:
        process = self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also ends children that outlived the server.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _bindable(port: int) -> int:
    """``port`` if it is free, any free one for 0."""
    with socket.socket() as probe:
        # As the server does: connections that an earlier one closed do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise ServerError(f"Port {port} of {_HOST} cannot be used: {error.strerror}.") from None
        return probe.getsockname()[1]
