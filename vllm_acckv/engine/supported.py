# SPDX-License-Identifier: Apache-2.0
"""What a KV policy works with, and what it refuses by name.

Every refusal is a row, here or, if it is about something else than the configuration, next to
what checks it. docs/compatibility.md is printed from the same rows:
``python -m vllm_acckv.engine.supported > docs/compatibility.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine import compat
from vllm_acckv.policies.base import Layer, Policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Refusal:
    """One thing a KV policy does not work with.

    Attributes:
        name: what the sentence and the table call it.
        why: the reason, for the table.
        found: whether it is there, in what :func:`refuse` is given.
        sentence: the message, with ``{who}``, ``{name}`` and ``{value}``.
        value: what exactly was found, for the sentence.
        which: the kinds of it that are refused, for the table.
    """

    name: str
    why: str
    found: Callable[..., bool]
    sentence: str = (
        "--kv-policy {who} does not work together with {name}{value}; remove one of the two."
    )
    value: Callable[..., str] = lambda *_: ""
    which: str = ""


def refuse(rows: Iterable[Refusal], who: str, *found: Any) -> None:
    """Refuse the first of ``rows`` that is there.

    Args:
        who: the policy, layer or backend that the sentences are about.
        found: what the rows look at.

    Raises:
        KVPolicyError: naming it.
    """
    for row in rows:
        if row.found(*found):
            value = row.value(*found)
            raise KVPolicyError(row.sentence.format(who=who, name=row.name, value=value))


# Options and models: VllmConfig

PLAIN_CACHES = ("auto", "float16", "bfloat16")

_one_token = "the chunk that ends a prompt needs two tokens; one would run as a decode"

OPTIONS = (
    Refusal(
        "speculative decoding (--speculative-config)",
        "a drafter's layers share the block tables but are not compacted; methods without layers "
        "are untested",
        lambda config: (
            config.speculative_config is not None and config.speculative_config.method != "ngram"
        ),
        value=lambda config: f" by method {config.speculative_config.method}",
        which="every method but `ngram`",
    ),
    Refusal(
        "--kv-cache-dtype",
        "keys are read back and merged entries are written, without the scales of a quantised "
        "cache",
        lambda config: config.cache_config.cache_dtype not in PLAIN_CACHES,
        value=lambda config: f" {config.cache_config.cache_dtype}",
        which=f"every dtype but {', '.join(f'`{dtype}`' for dtype in PLAIN_CACHES)}",
    ),
    Refusal(
        "model runner V1 on a GPU",
        "only V2 tells which slot of its tables a batch row is",
        lambda config: not (current_platform.is_cpu() or config.use_v2_model_runner),
    ),
    Refusal(
        "decode context parallelism",
        "a rank holds some tokens of a prompt only; a policy compares all of them",
        lambda config: config.parallel_config.decode_context_parallel_size > 1,
    ),
    Refusal(
        "prefill context parallelism",
        "a rank computes some rows of a prompt only; a policy adds up all it observes",
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
    ),
    Refusal(
        "dual-batch overlap (--enable-dbo)",
        "a policy hears of one batch per step, not of its halves",
        lambda config: config.parallel_config.enable_dbo,
    ),
    Refusal(
        "--kv-sharing-fast-prefill",
        "it skips rows of the prompt that a policy observes",
        lambda config: config.cache_config.kv_sharing_fast_prefill,
    ),
    Refusal(
        "pipeline parallelism through Ray",
        "Ray hands on the last stage's output only, so the other stages' reports would be lost",
        lambda config: (
            config.parallel_config.pipeline_parallel_size > 1
            and config.parallel_config.distributed_executor_backend == "ray"
        ),
    ),
    Refusal(
        "--max-num-batched-tokens 1",
        _one_token,
        lambda config: config.scheduler_config.max_num_batched_tokens == 1,
    ),
    Refusal(
        "--max-num-scheduled-tokens 1",
        _one_token,
        lambda config: config.scheduler_config.max_num_scheduled_tokens == 1,
    ),
    Refusal(
        "--long-prefill-token-threshold 1",
        _one_token,
        lambda config: config.scheduler_config.long_prefill_token_threshold == 1,
    ),
)

_Model = partial(
    Refusal,
    sentence="--kv-policy {who} does not support {value}: {name}. Serve it without a KV policy.",
    value=lambda config: ", ".join(config.model_config.architectures),
)
MODELS = (
    _Model(
        "it is an encoder-decoder model",
        "the clip is in the encoder's cache, not among the prompt's entries",
        lambda config: config.model_config.is_encoder_decoder,
    ),
    _Model(
        "it uses multi-head latent attention (MLA)",
        "one latent vector stands for the keys and values of all heads; no policy here reads that",
        lambda config: config.model_config.use_mla,
    ),
    _Model(
        "it is a hybrid of attention and state-space layers",
        "a state has no entries to drop, and the kinds of layers have block tables of their own",
        lambda config: config.model_config.is_hybrid,
    ),
    _Model(
        "it has no attention layers",
        "there is no KV cache to compress",
        lambda config: config.model_config.is_attention_free,
    ),
    _Model(
        "it does not generate text",
        "nothing is decoded from the compressed cache",
        lambda config: config.model_config.runner_type != "generate",
    ),
    _Model(
        "it uses sliding-window attention",
        "the window counts positions, and kept entries move to other slots",
        lambda config: config.model_config.get_sliding_window() is not None,
    ),
    _Model(
        "its attention over clips is bidirectional",
        "scores are computed under a causal mask",
        lambda config: config.model_config.is_mm_prefix_lm,
    ),
    _Model(
        "it takes neither audio nor video",
        "prompts without a clip are left alone",
        lambda config: not config.model_config.is_multimodal_model,
    ),
)

# A policy, of the server or of a request, and the engine it is for: VllmConfig, Policy


def _deciding_layers(config: VllmConfig, policy: Policy) -> list[int]:
    count = num_layers(config)
    return [policy.score_layer(Layer(index, count)) for index in range(count)]


POLICIES = (
    Refusal(
        "decides a layer by a later one",
        "the later one is not computed by then",
        lambda config, policy: any(
            source > index for index, source in enumerate(_deciding_layers(config, policy))
        ),
        "--kv-policy {who} {name}, which is not computed by then; choose another policy.",
    ),
    Refusal(
        "does not work with pipeline parallelism",
        "the layer that decides may belong to another stage",
        lambda config, policy: (
            config.parallel_config.pipeline_parallel_size > 1
            and _deciding_layers(config, policy) != list(range(num_layers(config)))
        ),
        "--kv-policy {who} {name}, because layers follow the attention of another one; choose "
        "another policy.",
        which="`fastv`",
    ),
    Refusal(
        "decode is 'evict'",
        "vLLM compresses once, after prefill",
        lambda _, policy: policy.evicts_at_decode,
        "--kv-policy-config {name}; vLLM compresses once after prefill, so it must be 'static' "
        "there (vllm_acckv.hf evicts at decode, too).",
        which="`h2o`",
    ),
)


def check_supported(config: VllmConfig, policy: Policy) -> None:
    """Refuse, by name, models and options a KV policy does not work with.

    Raises:
        KVPolicyError: naming the clash.
    """
    refuse(MODELS, policy.name, config)
    refuse(OPTIONS, policy.name, config)


def num_layers(config: VllmConfig) -> int:
    """Decoder layers of the whole model, over all pipeline stages."""
    return config.model_config.get_total_num_hidden_layers()


def check_policy(config: VllmConfig, policy: Policy) -> None:
    """Refuse settings of a policy that this engine or model cannot serve.

    Raises:
        KVPolicyError: saying what to change.
    """
    policy.check(num_layers(config))
    refuse(POLICIES, policy.name, config, policy)


@dataclass(frozen=True)
class Supported:
    """Something a KV policy works with.

    Attributes:
        name: for the table.
        proof: the test that shows it, ``file`` or ``file::function``, in ``tests/``.
    """

    name: str
    proof: str


SUPPORTED = (
    Supported(
        "Qwen2.5-Omni, with sound beside pictures and audio in video",
        "test_engine_parity.py::test_every_budget_and_tau",
    ),
    Supported("model runner V1 and V2", "test_engine_parity.py::test_the_runners_are_v1_and_v2"),
    Supported(
        "chunked prefill",
        "test_engine_parity.py::test_chunked_prefill_splits_the_trailing_text",
    ),
    Supported(
        "prefix caching, hits of the whole clip",
        "test_engine_prefix_caching.py::test_other_questions_about_a_clip_hit_the_whole_clip",
    ),
    Supported("preemption", "test_engine_behaviour.py::test_hazard_8_preemption_starts_over"),
    Supported(
        "batches of requests with and without compression",
        "test_engine_behaviour.py::test_batch_of_eight_mixed_requests",
    ),
    Supported("abort", "test_engine_behaviour.py::test_abort_returns_every_block"),
    Supported(
        "tensor parallelism",
        "test_engine_parity.py::test_hazard_11_tensor_parallel_ranks_agree",
    ),
    Supported("pipeline parallelism", "test_engine_parity.py::test_pipeline_stages"),
    Supported("data parallelism", "test_data_parallel.py::test_two_engines_compress_and_count"),
    Supported(
        "several API servers (--api-server-count)",
        "test_metrics.py::test_two_api_servers",
    ),
    Supported(
        "speculative decoding by method `ngram`",
        "test_engine_speculative.py::test_hazard_14_rejected_drafts_after_compaction",
    ),
    Supported(
        "attention backends `FLASH_ATTN` and `TRITON_ATTN`, on no GPU yet",
        "test_engine_gpu_attention.py::test_parity",
    ),
    Supported("LoRA", "test_engine_lora.py::test_lora_rows_beside_rows_without"),
    Supported("structured output", "test_engine_features.py::test_structured_outputs"),
    Supported(
        "penalties, biases, stop tokens and strings",
        "test_engine_features.py::test_controls_of_sampling",
    ),
    Supported("seeds", "test_engine_features.py::test_a_seed_fixes_the_answer"),
    Supported(
        "several answers (n > 1)",
        "test_engine_features.py::test_answers_of_n_are_those_of_the_next_seeds",
    ),
    Supported(
        "logprobs",
        "test_engine_features.py::test_few_logprobs_are_those_of_the_whole_vocabulary",
    ),
    Supported(
        "prompt_logprobs",
        "test_engine_features.py::test_prompt_logprobs_are_those_of_stock_vllm",
    ),
    Supported(
        "beam search, without a gain",
        "test_engine_features.py::test_beam_search_equals_stock_vllm",
    ),
    Supported("streamed answers", "test_server.py::test_streamed_clip_is_compacted"),
    Supported(
        "several engines in one process, one after the other",
        "test_engine_behaviour.py::test_engines_one_after_the_other_in_one_process",
    ),
)


def refusals() -> dict[str, tuple[Refusal, ...]]:
    """Every refusal there is, by what it is about."""
    from vllm_acckv.engine import front_end, startup, verify

    return {
        "Options and platforms": (*startup.ARGUMENTS, *startup.BACKEND, *OPTIONS),
        "Models": MODELS,
        "Layers": (*verify.BORROWED, *verify.LAYERS, *verify.KV_CACHES),
        "Policies": POLICIES,
        "Requests": front_end.REQUESTS,
    }


def table() -> str:
    """docs/compatibility.md."""
    lines = [
        "# Compatibility",
        "",
        "Printed by `python -m vllm_acckv.engine.supported` from the rows that refuse.",
        f"vLLM {compat.SUPPORTED_VLLM}. What stands in no table is untested. The tests run on CPU,",
        "those of the attention backends for GPUs, too: [gpu.md](gpu.md).",
        "",
        "## Works",
        "",
        "| with a KV policy | shown by, in `tests/` |",
        "|---|---|",
        *(f"| {_code(row.name)} | `{row.proof}` |" for row in SUPPORTED),
        "",
        "Beam search gains nothing because vLLM sends every step as a new request of one token,",
        "which is compressed again and never decoded from.",
    ]
    for title, rows in refusals().items():
        lines += ["", f"## Refused: {title.lower()}", "", _WHEN[title], ""]
        lines += ["| what | why |", "|---|---|"]
        for row in rows:
            which = f": {row.which}" if row.which else ""
            lines.append(f"| {_code(row.name)}{which} | {row.why} |")
    return "\n".join(lines)


_WHEN = {
    "Options and platforms": "At start-up, before weights are read.",
    "Models": "At start-up, before weights are read.",
    "Layers": "At start-up, when the layers exist.",
    "Policies": "At start-up for the server's policy, with status 400 for a request's.",
    "Requests": "When the request arrives.",
}


def _code(text: str) -> str:
    """``text`` with its flags set as code."""
    return re.sub(r"--[a-z-]+( \d+)?", r"`\g<0>`", text)


if __name__ == "__main__":
    print(table())
