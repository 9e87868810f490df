# SPDX-License-Identifier: Apache-2.0
"""The half of :class:`tests.engines.Engine` that runs in the engine's own process."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.engines import Answer, Ask, Trace


class Host:
    """Runs ``LLM`` and gives tests a look at its scheduler."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import logging

        from vllm import LLM

        if sabotage := options.pop("sabotage", None):
            _disable(sabotage)
        if backend := options.pop("gpu_backend", None):
            _attend_with(backend, "additional_config" in options)
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
        self.vocabulary = self.llm.model_config.get_vocab_size()
        # Only now: vLLM configures logging on its way and drops handlers added before.
        handler = logging.Handler()
        handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vllm.acckv").addHandler(handler)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.counters: dict[str, Any] = {}
        self.saved: list[dict[str, float]] = []
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
        from vllm_acckv.engine.prometheus import KVPolicyStats

        take = connector.get_kv_connector_stats

        def counted() -> Any:
            stats = take()
            data = stats.data if stats is not None else {}
            self.counters |= KVPolicyStats(dict(self.counters)).aggregate(KVPolicyStats(data)).data
            self.saved.append({key: data[key] for key in data if key.startswith("saved_")})
            return stats

        connector.get_kv_connector_stats = counted

    def take_saved(self) -> list[dict[str, float]]:
        """The gauges sent in every step since the last call; empty where there was no need to."""
        saved, self.saved = self.saved, []
        return saved

    def free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    def runner(self) -> list[str]:
        """Modules of the model runner's class and its bases."""
        worker = self.engine.model_executor.driver_worker.worker
        return [base.__module__ for base in type(worker.model_runner).__mro__]

    def attention(self) -> list[str]:
        """Class of each decoder layer's attention."""
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        layers = runner.vllm_config.compilation_config.static_forward_context.values()
        return [type(layer.impl).__name__ for layer in layers if hasattr(layer, "kv_cache")]

    def leftovers(self) -> dict[str, int]:
        """Sizes of what scheduler and connector remember of requests."""
        connector = self.scheduler.connector
        copies = connector._copies
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        kept = {
            "plans": manager.plans,
            "freed": manager.freed,
            "reports": connector._reports,
            "finished": connector._finished,
            "copies": copies._requests | copies._pending if copies else (),
        }
        return {name: len(entries) for name, entries in kept.items()}

    def schedule_ahead(self, ask: Ask) -> dict[str, int]:
        """Blocks that a request holds when vLLM's asynchronous scheduler runs one step ahead.

        The CPU platform does not run it, so no step is computed here; made-up outputs come back
        one step late, as they would.
        """
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.outputs import ModelRunnerOutput

        core = self.engine.engine_core.engine_core
        scheduler = AsyncScheduler(
            vllm_config=core.vllm_config,
            kv_cache_config=self.scheduler.kv_cache_config,
            structured_output_manager=core.structured_output_manager,
            block_size=self.scheduler.block_size,
        )
        core.add_request = lambda request, wave: scheduler.add_request(request)
        try:
            self.add(ask, "ahead")
        finally:
            del core.add_request
        (request_id,) = scheduler.requests
        (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers

        def held() -> int:
            return sum(not block.is_null for block in manager.req_to_blocks[request_id])

        prefill, seen = scheduler.schedule(), {"prefill": held()}
        scheduler.schedule()
        seen["decode in flight"] = held()
        done = ModelRunnerOutput([request_id], {request_id: 0}, [[7]])
        scheduler.update_from_output(prefill, done)
        scheduler.schedule()
        seen["prefill done"] = held()
        self.engine.abort_request([request_id.partition("-")[0]])
        return seen

    def drafts(self) -> tuple[float, float]:
        """Speculative tokens drafted and accepted so far; needs ``disable_log_stats=False``."""
        counted = {metric.name: metric for metric in self.llm.get_metrics()}
        names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
        drafted, accepted = (float(counted[name].value) for name in names)
        return drafted, accepted

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
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        sampling = {
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": -1,
            "output_kind": RequestOutputKind.FINAL_ONLY,
            **ask.sampling,
        }
        if structure := sampling.get("structured_outputs"):
            sampling["structured_outputs"] = StructuredOutputsParams(**structure)
        params = SamplingParams(max_tokens=ask.max_tokens, extra_args=ask.xargs or None, **sampling)
        lora = LoRARequest(ask.lora.name, 1, str(ask.lora)) if ask.lora else None
        self.engine.add_request(request_id, self._prompt(ask), params, lora_request=lora)

    def _prompt(self, ask: Ask) -> Any:
        mm_kwargs = {"use_audio_in_video": True} if ask.audio_in_video else None
        (prompt,) = self.llm._preprocess_chat([ask.messages], mm_processor_kwargs=mm_kwargs)
        return prompt

    def beams(self, ask: Ask, width: int) -> tuple[list[tuple[list[int], float]], float]:
        """Prompt and answer of the best beams with log-probabilities, and compactions counted."""
        from vllm.sampling_params import BeamSearchParams

        self.counters.clear()
        # Beam search takes no chat messages, so hand it the processed prompt.
        self.llm._preprocess_cmpl = list
        params = BeamSearchParams(beam_width=width, max_tokens=ask.max_tokens, ignore_eos=True)
        try:
            (output,) = self.llm.beam_search([self._prompt(ask)], params)
        finally:
            del self.llm._preprocess_cmpl
        beams = [(beam.tokens, beam.cum_logprob) for beam in output.sequences]
        return beams, self.counters.get("compactions", 0)

    def run(
        self,
        asks: list[Ask],
        arrive: list[int] | None = None,
        abort: dict[int, int] | None = None,
        preempt_at: int | None = None,
        free: int | None = None,
    ) -> Trace:
        """Step the engine until all requests are done.

        Args:
            arrive: step at which each request is queued (default: all at step 0).
            abort: request number -> step before which it is aborted.
            preempt_at: step before which every running request is preempted, and nothing
                computed is found again: neither blocks nor embeddings of clips.
            free: leave only so many free blocks in the pool for this batch.
        """
        if self.policy:
            self.llm.collective_rpc("kv_policy_record")
        self.log.clear()
        self.counters.clear()
        free_before, held, hashed, done = self.free_blocks(), [], [], {}
        preemptions: dict[str, list[int]] = {}
        taken = [] if free is None else self.pool.get_new_blocks(free_before - free)
        step = 0
        while step == 0 or len(done) + len(abort or {}) < len(asks):
            for number, ask in enumerate(asks):
                if (arrive[number] if arrive else 0) == step:
                    self.add(ask, f"r{number}")
            for number in [n for n, at in (abort or {}).items() if at == step]:
                self.engine.abort_request([f"r{number}"])
            if step == preempt_at:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
                self.engine.reset_encoder_cache()
            for output in self.engine.step():
                if output.finished and output.outputs[0].finish_reason != "abort":
                    done[output.request_id] = _answer(output, self.vocabulary)
            held.append(_by_name(self.held()))
            hashed.append(_by_name(self.hashed()))
            for request_id, request in self.scheduler.requests.items():
                so_far = preemptions.setdefault(request_id, [])
                if request.num_preemptions > len(so_far):
                    so_far.append(request.num_output_tokens)
            step += 1
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.pool.free_blocks(taken)
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
            _by_name(preemptions),
        )

    def waits(self, asks: list[Ask]) -> dict[str, list[list[str]]]:
        """Where the model runner waits for the GPU in each ``decode`` step, and in each ``prefill``
        step, which computes a prompt. Needs ``VLLM_GPU_SYNC_CHECK=warn``: vLLM then arms
        ``torch.cuda.set_sync_debug_mode`` around its worker."""
        import warnings

        from vllm.utils import gpu_sync_debug

        from vllm_acckv.engine.worker import current_worker

        assert gpu_sync_debug._sync_check_enabled, "vLLM does not look for waits"
        if self.policy:
            current_worker().records = None  # type: ignore[union-attr]  # recording waits
        found: dict[str, list[list[str]]] = {"decode": [], "prefill": []}
        for number, ask in enumerate(asks):
            self.add(ask, f"w{number}")
        while self.engine.has_unfinished_requests():
            requests = self.scheduler.requests.values()
            decode = all(one.num_computed_tokens >= one.num_prompt_tokens for one in requests)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.engine.step()
            places = [
                f"{one.filename}:{one.lineno}" for one in caught if "synchron" in str(one.message)
            ]
            found["decode" if decode else "prefill"].append(places)
        return found


def _disable(target: str) -> None:
    """Make ``module:path`` do nothing but return its argument, as if somebody had undone it."""
    import importlib

    module, _, path = target.partition(":")
    owner_name, _, name = path.rpartition(".")
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, owner_name) if owner_name else owner
    setattr(owner, name, staticmethod(lambda *args: args[-1] if args else None))


def _attend_with(name: str, policy: bool) -> None:
    """Replace the attention backend for CPUs by one for GPUs: Triton's in the interpreter,
    FlashAttention's with its functions in PyTorch."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from tests import flash_attention
    from vllm_acckv.engine import startup

    torch.cuda.get_device_capability = lambda *_: (9, 0)  # asked by vLLM's Triton kernel
    if name == "FLASH_ATTN":
        flash_attention.install()
    replaced, backend = AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum[name]
    if policy:
        startup.BACKENDS[replaced] = startup.BACKENDS[backend]
    else:
        register_backend(replaced, backend.get_path())


def _by_name(by_id: dict[str, Any]) -> dict[str, Any]:
    """vLLM appends a random part to request ids; take it off again."""
    return {key.partition("-")[0]: value for key, value in by_id.items()}


def _answer(output: Any, vocabulary: int) -> Answer:
    first, prompt = output.outputs[0], output.prompt_logprobs
    return Answer(
        output.request_id,
        list(output.prompt_token_ids),
        list(first.token_ids),
        _dense(first.logprobs, vocabulary),
        first.text,
        (first.finish_reason, first.stop_reason),
        [list(completion.token_ids) for completion in output.outputs],
        _dense(prompt[1:], vocabulary) if prompt else None,
        output.num_cached_tokens or 0,
    )


def _dense(entries: Any, vocabulary: int) -> np.ndarray:
    """vLLM's dictionaries of log-probabilities as rows of an array."""
    rows = np.full((len(entries), vocabulary), -np.inf, dtype=np.float32)
    for row, entry in zip(rows, entries, strict=True):
        for token, logprob in entry.items():
            row[token] = logprob.logprob
    return rows
