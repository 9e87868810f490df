# SPDX-License-Identifier: Apache-2.0
"""Where this package touches vLLM outside its public extension points.

Public extension points in use: the ``vllm.general_plugins`` and ``vllm.platform_plugins`` entry
points, ``additional_config``, ``register_backend``, ``AttentionBackend.customize_spec``,
``KVCacheSpecRegistry``, ``worker_extension_cls`` and the KV connector interface. Everything else
is one row of :data:`TOUCH_POINTS`: checked before it is wrapped, overridden or called, and refused
by name when vLLM has changed it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vllm_acckv import __version__

SUPPORTED_VLLM = ">=0.32,<0.33"


class IncompatibleVLLMError(RuntimeError):
    """The installed vLLM is not one this package knows."""


@dataclass(frozen=True)
class TouchPoint:
    """A vLLM function that is wrapped, or overridden or called although it is internal.

    Attributes:
        target: ``module:Class.function`` or ``module:function``.
        parameters: its parameter names in order.
        reason: what it is wrapped, overridden or called for.
        removal: the upstream change that makes this unnecessary.
    """

    target: str
    parameters: tuple[str, ...]
    reason: str
    removal: str

    @property
    def function(self) -> str:
        """Its name alone."""
        return self.target.rpartition(":")[2].rpartition(".")[2]


_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_STABLE = "vLLM declaring the interface of block managers and of the block pool stable"

TOUCH_POINTS = {
    point.function: point
    for point in (
        TouchPoint(
            "vllm.engine.arg_utils:EngineArgs.add_cli_args",
            ("parser",),
            "adds the --kv-* flags of engine/flags.py",
            "a plugin hook for command-line flags that is given the parser",
        ),
        TouchPoint(
            "vllm.engine.arg_utils:EngineArgs.from_cli_args",
            ("args",),
            "marks arguments of a command line, whose errors end with a sentence, not a traceback",
            "vLLM ending so on a ValueError of its configuration",
        ),
        TouchPoint(
            "vllm.engine.arg_utils:EngineArgs.create_engine_config",
            ("self", "usage_context", "headless"),
            "checks a requested policy and names our worker extension and KV connector, before "
            "any process is started or weight is read",
            "a plugin hook that may amend VllmConfig",
        ),
        TouchPoint(
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
            (
                "self",
                "request_id",
                "prompt",
                "params",
                "supported_tasks",
                "arrival_time",
                "lora_request",
                "tokenization_kwargs",
                "trace_headers",
                "priority",
                "data_parallel_rank",
                "resumable",
                "session_id",
                "kv_hints",
            ),
            "a request's own KV policy settings are checked before it is queued",
            "a plugin hook that validates a request and its extra_args",
        ),
        TouchPoint(
            "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
            ("self", "request"),
            "a prefix-cache hit ends at the first row that the request's policy observes, and "
            "before blocks that cannot be copied yet",
            "passing the request to SingleTypeKVCacheManager.find_longest_cache_hit",
        ),
        TouchPoint(
            "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks",
            ("self", "blocks", "num_computed_tokens"),
            "called: cuts a prefix-cache hit",
            _STABLE,
        ),
        TouchPoint(
            f"{_MANAGER}._apply_cow",
            ("self", "request_id", "block_idx", "source_block", "cow_block"),
            "called: a compacted request gets its own copies of the cached blocks it rewrites",
            "a public name for it",
        ),
        TouchPoint(
            f"{_MANAGER}._remove_blocks_in_range",
            ("self", "request_id", "first_block", "last_block"),
            "called: a compacted request gives back its leading blocks",
            "a public name for it",
        ),
        TouchPoint(
            f"{_MANAGER}.get_num_blocks_to_allocate",
            (
                "self",
                "request_id",
                "num_tokens",
                "new_computed_blocks",
                "total_computed_tokens",
                "num_local_computed_tokens",
                "num_tokens_main_model",
                "apply_admission_cap",
                "prefill_end",
            ),
            "overridden: counts those copies",
            _STABLE,
        ),
        TouchPoint(
            f"{_MANAGER}.add_local_computed_blocks",
            (
                "self",
                "request_id",
                "new_computed_blocks",
                "num_local_computed_tokens",
                "num_external_computed_tokens",
            ),
            "overridden: takes those copies",
            _STABLE,
        ),
        TouchPoint(
            f"{_MANAGER}.remove_skipped_blocks",
            ("self", "request_id", "processed_computed_tokens", "num_prompt_tokens"),
            "overridden: called before each allocation, where leading blocks are given back",
            _STABLE,
        ),
        TouchPoint(
            f"{_MANAGER}.pop_blocks_for_free",
            ("self", "request_id"),
            "overridden: a preempted request starts again with all its blocks",
            _STABLE,
        ),
        TouchPoint(
            f"{_MANAGER}.cache_blocks",
            ("self", "request", "num_tokens", "retention_interval", "replay_boundaries"),
            "overridden: blocks that will be rewritten are not hashed",
            _STABLE,
        ),
        TouchPoint(
            f"{_POOL}.get_new_blocks",
            ("self", "num_blocks"),
            "called: takes free blocks for copies",
            _STABLE,
        ),
        TouchPoint(
            f"{_POOL}.get_cached_block",
            ("self", "block_hash", "kv_cache_group_ids"),
            "called: is a block in the prefix cache already?",
            _STABLE,
        ),
        TouchPoint(
            f"{_POOL}.cache_full_blocks",
            (
                "self",
                "request",
                "blocks",
                "num_cached_blocks",
                "num_full_blocks",
                "block_size",
                "kv_cache_group_id",
                "block_mask",
            ),
            "called: enters copies into the prefix cache",
            _STABLE,
        ),
        TouchPoint(
            f"{_POOL}.free_blocks",
            ("self", "ordered_blocks"),
            "called: frees copies, which stay findable",
            _STABLE,
        ),
        TouchPoint(
            "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
            ("self", "request", "num_computed_tokens", "num_new_tokens"),
            "a prefill chunk ends exactly at the compaction point and has two tokens or more",
            "a hook by which a KV cache manager bounds the next chunk",
        ),
        TouchPoint(
            "vllm.v1.core.sched.output:strip_covered_mm_data",
            ("mm_features", "num_computed_tokens", "uses_mrope"),
            "keeps the clips of a request whose prefix-cache hit covers them: preempted, it may "
            "start again without that hit, and model runner V1 would end the engine for want of "
            "them",
            "vLLM sending them again to a request that it resumes on V1, or the removal of V1",
        ),
        TouchPoint(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
            ("self", "grammar_output"),
            "on CPU, keeps a seeded request that is in the middle of its prompt from stopping the "
            "engine; a preempted request in the middle of its answer is one more such case",
            "rewinding generators without Generator.get_offset, which CPU generators do not have",
        ),
        TouchPoint(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
            (
                "self",
                "num_tokens",
                "num_reqs",
                "max_query_len",
                "num_tokens_padded",
                "num_reqs_padded",
                "ubatch_slices",
                "logits_indices",
                "max_num_sampled_tokens",
                "use_spec_decode",
                "for_cudagraph_capture",
                "num_scheduled_tokens",
                "slot_mappings",
            ),
            "model runner V1 does not tell an attention backend which request a batch row is",
            "CommonAttentionMetadata.req_idx in V1, or the removal of V1",
        ),
        TouchPoint(
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
            ("self", "scheduler_output"),
            "model runner V2 gives an attention backend the index of a request, not the request",
            "a backend hook for added requests",
        ),
        TouchPoint(
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state",
            ("self", "scheduler_output", "dummy_run"),
            "a step that observes or compacts is no decode, though each row may have one token: a "
            "replayed CUDA graph of the whole model would skip it",
            "a backend hook that keeps a batch out of FULL CUDA graphs",
        ),
        TouchPoint(
            "vllm.v1.worker.gpu.mm.rope:RopeState.read_prefill_positions",
            ("self", "req_idx", "length"),
            "called: M-RoPE positions of a prompt, for policies that un-rotate keys",
            "positions of a request in CommonAttentionMetadata",
        ),
        TouchPoint(
            "vllm.model_executor.models.qwen2_5_omni_thinker:check_interleaved_audio_video",
            ("is_video", "is_audio", "num_video", "num_audio"),
            "a defect of vLLM 0.32: a prefill chunk that sees sound before pictures of one clip "
            "(audio in video, any chunk boundary inside it) gets their embeddings swapped",
            "the fix in vLLM, patches/README.md",
        ),
    )
}
# Imported there by its name, so that wrapping the original does not reach it.
TOUCH_POINTS["check_interleaved_audio_video in Qwen3-Omni"] = replace(
    TOUCH_POINTS["check_interleaved_audio_video"],
    target="vllm.model_executor.models.qwen3_omni_moe_thinker:check_interleaved_audio_video",
)


def check_version() -> None:
    """Refuse a vLLM outside the supported range, naming both versions.

    Raises:
        IncompatibleVLLMError: see above.
    """
    import vllm
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    version = Version(vllm.__version__)
    if not SpecifierSet(SUPPORTED_VLLM).contains(version.base_version, prereleases=True):
        raise IncompatibleVLLMError(
            f"vllm-acckv {__version__} needs vllm{SUPPORTED_VLLM}, but vllm {version} is "
            "installed; install a matching pair."
        )


def find(name: str) -> tuple[Any, Any]:
    """The class or module that holds touch point ``name``, and the function as it is stored there.

    Raises:
        IncompatibleVLLMError: when the function is gone or its parameters changed.
    """
    point = TOUCH_POINTS[name]
    module_name, _, path = point.target.partition(":")
    class_name, _, function_name = path.rpartition(".")
    owner: Any = importlib.import_module(module_name)
    if class_name:
        owner = getattr(owner, class_name, None)
    stored = inspect.getattr_static(owner, function_name, None)
    if stored is None:
        raise IncompatibleVLLMError(_changed(point, "it no longer exists"))
    found = tuple(inspect.signature(getattr(stored, "__func__", stored)).parameters)
    expected = ("cls", *point.parameters) if isinstance(stored, classmethod) else point.parameters
    if found != expected:
        raise IncompatibleVLLMError(
            _changed(point, f"it takes {', '.join(found)} instead of {', '.join(expected)}")
        )
    return owner, stored


def check(*names: str) -> None:
    """Touch points that are overridden or called are as expected.

    Raises:
        IncompatibleVLLMError: when one is gone or its parameters changed.
    """
    for name in names:
        find(name)


def wrap(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the touch point ``name`` by ``make(original)``; a second call does nothing.

    Raises:
        IncompatibleVLLMError: when the function is gone or its parameters changed.
    """
    if name in _wrapped:
        return
    owner, stored = find(name)
    original = getattr(stored, "__func__", stored)
    wrapper: Any = functools.wraps(original)(make(original))
    if isinstance(stored, (classmethod, staticmethod)):
        wrapper = type(stored)(wrapper)
    setattr(owner, TOUCH_POINTS[name].function, wrapper)
    _wrapped.add(name)


_wrapped: set[str] = set()


def _changed(point: TouchPoint, what: str) -> str:
    import vllm

    return (
        f"vLLM {vllm.__version__} changed {point.target}: {what}. vllm-acckv {__version__} needs "
        f"vllm{SUPPORTED_VLLM}."
    )


if __name__ == "__main__":
    for touch_point in TOUCH_POINTS.values():
        print(f"{touch_point.target}\n  why: {touch_point.reason}")
        print(f"  gone when: {touch_point.removal}\n")
