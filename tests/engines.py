# SPDX-License-Identifier: Apache-2.0
"""vLLM engines for tests, each in a process of its own.

vLLM keeps global state (KV connector, attention backend overrides, environment), so engines with
different settings must not share a process. A test talks to an engine through :class:`Engine`;
the other half, :class:`_Host`, runs ``LLM`` in-process there and can step it by hand.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TRITON_CPU = str(Path(__file__).parent / "triton_cpu")

BASE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
RUNNER_V2 = {
    "PYTHONPATH": TRITON_CPU,
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}
# Two ranks on two cores; pipeline stages need compilation, whose backend here is eager.
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
TWO_STAGES = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
WITHOUT_PLUGIN = {"VLLM_PLUGINS": "acckv_cpu_media"}


@dataclass
class Ask:
    """One request: chat messages, per-request settings and sampling length."""

    messages: list[dict[str, Any]]
    audio_in_video: bool = False
    xargs: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 12
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What came back: full-vocabulary log-probabilities are fp32 ``[tokens, vocabulary]``."""

    request_id: str
    prompt: list[int]
    tokens: list[int]
    logprobs: np.ndarray


@dataclass
class Trace:
    """Answers of one batch, with the engine observed at every step.

    Attributes:
        held: per step, blocks held by each running request (null blocks not counted).
        hashed: per step, for each running request which of its blocks a lookup may find.
        kept: per request and layer, what the policy kept.
        free_before, free_after: free blocks of the pool around the batch.
        log: log lines of the KV policy.
        counters: what the KV policy counted, as on its way to the metrics.
    """

    answers: list[Answer]
    held: list[dict[str, int]]
    hashed: list[dict[str, list[bool]]]
    kept: dict[str, dict[str, Any]]
    free_before: int
    free_after: int
    log: list[str]
    counters: dict[str, float] = field(default_factory=dict)


class Engine:
    """A vLLM engine in a child process."""

    def __init__(self, model: Path, environment: dict[str, str] | None = None, **options: Any):
        self.environment = environment or {}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = {**BASE_ENVIRONMENT, **self.environment}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            self._process = context.Process(target=_serve, args=(theirs, str(model), options))
            self._process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value
        theirs.close()
        self._started = False

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of :class:`_Host`; its exceptions are raised here as RuntimeError."""
        if not self._started:
            self._started = True
            self._receive()
        self._pipe.send((method, args, kwargs))
        return self._receive()

    def _receive(self) -> Any:
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the engine process died") from None
        if not ok:
            raise RuntimeError(value)
        return value

    def run(self, *asks: Ask, **kwargs: Any) -> Trace:
        """Answer all requests as one batch."""
        return self.call("run", list(asks), **kwargs)

    def answer(self, ask: Ask) -> Answer:
        return self.run(ask).answers[0]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._pipe.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.terminate()


def _serve(pipe: Any, model: str, options: dict[str, Any]) -> None:
    import sys
    import traceback

    # A spawned process takes over its parent's sys.path, whatever PYTHONPATH says.
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    try:
        host = _Host(model, options)
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, getattr(host, method)(*args, **kwargs)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    host.llm.llm_engine.engine_core.shutdown()


class _Host:
    """Runs ``LLM`` and gives tests a look at its scheduler."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import logging

        from vllm import LLM

        if sabotage := options.pop("sabotage", None):
            _disable(sabotage)
        self.log: list[str] = []
        options = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 8192,
            "block_size": 32,
            "max_num_seqs": 16,
            "num_gpu_blocks_override": 2000,
            "max_logprobs": -1,
            "allowed_local_media_path": "/",
            "limit_mm_per_prompt": {"video": 4, "audio": 4, "image": 0},
            "enable_prefix_caching": False,
            **options,
        }
        self.policy = "kv_policy" in options.get("additional_config", {})
        self.llm = LLM(model=model, **options)
        # Only now: vLLM configures logging on its way and drops handlers added before.
        handler = logging.Handler()
        handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vllm.acckv").addHandler(handler)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.counters: dict[str, float] = {}
        if self.policy:
            self._count(self.scheduler.connector)

    def restart(self, **options: Any) -> None:
        """Shut the engine down and start another one in the same process."""
        import gc

        model = self.llm.model_config.model
        self.engine.engine_core.shutdown()
        self.__dict__.clear()
        gc.collect()
        self.__init__(model, options)  # type: ignore[misc]

    def _count(self, connector: Any) -> None:
        """Add up the statistics that the scheduler takes from ``connector`` every step."""
        take = connector.get_kv_connector_stats

        def counted() -> Any:
            stats = take()
            for name, value in (stats.data if stats is not None else {}).items():
                self.counters[name] = self.counters.get(name, 0) + value
            return stats

        connector.get_kv_connector_stats = counted

    def free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    def runner(self) -> list[str]:
        """Modules of the model runner's class and its bases."""
        worker = self.engine.model_executor.driver_worker.worker
        return [base.__module__ for base in type(worker.model_runner).__mro__]

    def leftovers(self) -> dict[str, int]:
        """Sizes of what scheduler and connector remember of requests."""
        connector = self.scheduler.connector
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        kept = {
            "plans": manager.plans,
            "freed": manager.freed,
            "reports": connector._reports,
            "finished": connector._finished,
        }
        return {name: len(entries) for name, entries in kept.items()}

    def null_block(self) -> float:
        """Sum of absolute values in block 0 of every layer, which nobody may write."""
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        return sum(float(cache[0].abs().sum()) for cache in runner.kv_caches)

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()

    def held(self) -> dict[str, int]:
        """Blocks that each request owns now."""
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return {
            request_id: sum(not block.is_null for block in blocks)
            for request_id, blocks in manager.req_to_blocks.items()
        }

    def hashed(self) -> dict[str, list[bool]]:
        """For each request, which of its blocks may be found by a later prefix-cache lookup."""
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return {
            request_id: [block.block_hash is not None for block in blocks]
            for request_id, blocks in manager.req_to_blocks.items()
        }

    def add(self, ask: Ask, request_id: str) -> None:
        """Queue a request under ``request_id``."""
        from vllm import SamplingParams

        sampling = {"temperature": 0, "ignore_eos": True, "logprobs": -1, **ask.sampling}
        params = SamplingParams(max_tokens=ask.max_tokens, extra_args=ask.xargs or None, **sampling)
        mm_kwargs = {"use_audio_in_video": True} if ask.audio_in_video else None
        (prompt,) = self.llm._preprocess_chat([ask.messages], mm_processor_kwargs=mm_kwargs)
        self.engine.add_request(request_id, prompt, params)

    def run(
        self,
        asks: list[Ask],
        arrive: list[int] | None = None,
        abort: dict[int, int] | None = None,
        preempt_at: int | None = None,
    ) -> Trace:
        """Step the engine until all requests are done.

        Args:
            arrive: step at which each request is queued (default: all at step 0).
            abort: request number -> step before which it is aborted.
            preempt_at: step before which every running request is preempted.
        """
        if self.policy:
            self.llm.collective_rpc("kv_policy_record")
        self.log.clear()
        self.counters.clear()
        free_before, held, hashed, done = self.free_blocks(), [], [], {}
        step = 0
        while step == 0 or len(done) + len(abort or {}) < len(asks):
            for number, ask in enumerate(asks):
                if (arrive[number] if arrive else 0) == step:
                    self.add(ask, f"r{number}")
            for number in [n for n, at in (abort or {}).items() if at == step]:
                self.engine.abort_request([f"r{number}"])
            if step == preempt_at:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            for output in self.engine.step():
                if output.finished and output.outputs[0].finish_reason != "abort":
                    done[output.request_id] = _answer(output)
            held.append(_by_name(self.held()))
            hashed.append(_by_name(self.hashed()))
            step += 1
        while self.engine.has_unfinished_requests():
            self.engine.step()
        kept = self.llm.collective_rpc("kv_policy_take_records")[0] if self.policy else {}
        return Trace(
            [done[f"r{n}"] for n in range(len(asks)) if f"r{n}" in done],
            held,
            hashed,
            _by_name(kept),
            free_before,
            self.free_blocks(),
            list(self.log),
            dict(self.counters),
        )


def _disable(target: str) -> None:
    """Make ``module:path`` do nothing but return its argument, as if somebody had undone it."""
    import importlib

    module, _, path = target.partition(":")
    owner_name, _, name = path.rpartition(".")
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, owner_name) if owner_name else owner
    setattr(owner, name, staticmethod(lambda *args: args[-1] if args else None))


def _by_name(by_id: dict[str, Any]) -> dict[str, Any]:
    """vLLM appends a random part to request ids; take it off again."""
    return {key.partition("-")[0]: value for key, value in by_id.items()}


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    rows = []
    for entry in completion.logprobs:
        row = np.full(len(entry), -np.inf, dtype=np.float32)
        for token, logprob in entry.items():
            row[token] = logprob.logprob
        rows.append(row)
    return Answer(
        output.request_id,
        list(output.prompt_token_ids),
        list(completion.token_ids),
        np.stack(rows),
    )
