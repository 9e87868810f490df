# SPDX-License-Identifier: Apache-2.0
"""Where this package touches vLLM outside its public extension points.

Public extension points in use: the ``vllm.general_plugins`` and ``vllm.platform_plugins`` entry
points, ``additional_config``, ``register_backend``, ``AttentionBackend.customize_spec``,
``KVCacheSpecRegistry``, ``worker_extension_cls`` and the KV connector interface. Everything else
is one row of :data:`TOUCH_POINTS`: wrapped once, checked before it is wrapped, and refused by
name when vLLM has changed it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_acckv import __version__

SUPPORTED_VLLM = ">=0.32,<0.33"


class IncompatibleVLLMError(RuntimeError):
    """The installed vLLM is not one this package knows."""


@dataclass(frozen=True)
class TouchPoint:
    """A vLLM function that is wrapped, or called although it is private.

    Attributes:
        target: ``module:Class.function`` or ``module:function``.
        parameters: its parameter names in order.
        reason: what it is wrapped or called for.
        removal: the upstream change that makes this unnecessary.
    """

    target: str
    parameters: tuple[str, ...]
    reason: str
    removal: str


TOUCH_POINTS = {
    point.target.rpartition(":")[2].rpartition(".")[2]: point
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
            "a prefix-cache hit of a request that will be compacted ends where its own blocks "
            "will be rewritten",
            "passing the request to SingleTypeKVCacheManager.find_longest_cache_hit",
        ),
        TouchPoint(
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager._apply_cow",
            ("self", "request_id", "block_idx", "source_block", "cow_block"),
            "called: a compacted request gets its own copies of the cached blocks it rewrites",
            "a public name for it",
        ),
        TouchPoint(
            "vllm.v1.core.single_type_kv_cache_manager:"
            "SingleTypeKVCacheManager._remove_blocks_in_range",
            ("self", "request_id", "first_block", "last_block"),
            "called: a compacted request gives back its leading blocks",
            "a public name for it",
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
            "vllm.model_executor.models.qwen2_5_omni_thinker:check_interleaved_audio_video",
            ("is_video", "is_audio", "num_video", "num_audio"),
            "a defect of vLLM 0.32: a prefill chunk that sees sound before pictures of one clip "
            "(audio in video, any chunk boundary inside it) gets their embeddings swapped",
            "the fix in vLLM, patches/README.md",
        ),
    )
}


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
    setattr(owner, name, wrapper)
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
