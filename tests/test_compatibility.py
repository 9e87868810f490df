# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md: what it refuses is refused, what it promises is tested."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm.config.cache import CacheDType

from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine import blocks, front_end, startup, supported, verify
from vllm_acckv.engine.connector import KVPolicyConnector
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.recent import Recent

TESTS = Path(__file__).parent
ACCKV = make_policy("acckv")
ROWS = {row.name: row for rows in supported.refusals().values() for row in rows}
PLAIN = {"auto", "float16", "bfloat16"}
HOW_TO_PRINT = "python -m vllm_acckv.engine.supported > docs/compatibility.md"


class Config(SimpleNamespace):
    """As much of ``VllmConfig`` as the rows read: an engine that can serve a policy.

    ``changed`` names fields of any of its parts.
    """

    def __init__(self, **changed: Any) -> None:
        model = {
            "architectures": ["TinyForCausalLM"],
            "is_encoder_decoder": False,
            "use_mla": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "runner_type": "generate",
            "get_sliding_window": lambda: None,
            "is_mm_prefix_lm": False,
            "is_multimodal_model": True,
            "get_total_num_hidden_layers": lambda: 4,
        }
        parallel = {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "enable_dbo": False,
            "pipeline_parallel_size": 1,
            "distributed_executor_backend": "mp",
        }
        cache = {"cache_dtype": "auto", "kv_sharing_fast_prefill": False}
        scheduler = {
            "max_num_batched_tokens": 2048,
            "max_num_scheduled_tokens": None,
            "long_prefill_token_threshold": 0,
        }
        parts = {
            "model_config": model,
            "parallel_config": parallel,
            "cache_config": cache,
            "scheduler_config": scheduler,
        }
        super().__init__(
            speculative_config=changed.pop("speculative_config", None),
            use_v2_model_runner=False,
            **{
                name: SimpleNamespace(
                    **{key: changed.pop(key, value) for key, value in part.items()}
                )
                for name, part in parts.items()
            },
        )
        assert not changed


def serve(**changed: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Start-up with a configuration."""
    return lambda patch: supported.check_supported(Config(**changed), ACCKV)


def serve_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(supported, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    serve()(patch)


def prepare(**changed: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Start-up with arguments."""
    defaults = {"kv_transfer_config": None, "kv_offloading_size": None, "worker_extension_cls": ""}
    arguments = SimpleNamespace(**{**defaults, **changed})

    def run(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(startup, "activate", lambda: None)
        patch.setattr(front_end, "install", lambda: None)
        startup.prepare(arguments, ACCKV)

    return run


def prepare_elsewhere(patch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="TPU v5")
    patch.setattr(startup, "current_platform", platform)
    prepare()(patch)


def activate_beside_another_plugin(patch: pytest.MonkeyPatch) -> None:
    backend = next(iter(startup.BACKENDS))
    patch.setattr(type(backend), "is_overridden", lambda self: True)
    patch.setattr(type(backend), "get_path", lambda self: "another.plugin.Backend")
    startup.activate()


def layer(**changed: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Start-up with a layer that has ``changed``."""

    def run(patch: pytest.MonkeyPatch) -> None:
        fields = dict(changed)
        spec = fields.pop("spec", object.__new__(blocks.KVPolicySpec))
        path = fields.pop("backend", next(iter(startup.BACKENDS.values())))
        module, _, name = path.rpartition(".")
        backend = type(name, (), {"__module__": module})
        impl = SimpleNamespace(**fields.pop("impl", {}))
        built = SimpleNamespace(get_attn_backend=lambda: backend, impl=impl, **fields)
        patch.setattr(verify, "get_layers_from_vllm_config", lambda *_: {"layers.0": built})
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layers.0"])
        caches = SimpleNamespace(kv_cache_groups=[group])
        assert verify.verify_layers(Config(), caches) == ["layers.0"]

    return run


def bind_two_kinds(patch: pytest.MonkeyPatch) -> None:
    """The scheduler's connector meets a model with two kinds of KV cache."""
    kinds = [SimpleNamespace(kv_cache_spec=object()), SimpleNamespace(kv_cache_spec="window")]
    coordinator = SimpleNamespace(single_type_managers=kinds)
    connector = object.__new__(KVPolicyConnector)
    connector.policy = ACCKV
    connector.bind_kv_cache_manager(SimpleNamespace(block_pool=None, coordinator=coordinator))


def ask(policy: Any, resumable: bool = False, **changed: Any) -> Callable[..., None]:
    """A request to a server with ``policy``."""
    return lambda patch: front_end.check_request(policy, None, resumable, Config(**changed))


class LookingUp(Recent):
    """Every layer follows layer 3."""

    name = "looking_up"

    def score_layer(self, layer: Any) -> int:
        return 3


# Name of a row -> the least that makes it refuse.
CASES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a platform other than CPU and CUDA": prepare_elsewhere,
    "KV transfer and offloading (--kv-transfer-config)": prepare(kv_offloading_size=1.0),
    "--worker-extension-cls": prepare(worker_extension_cls="my.Extension"),
    "Another plugin replaced the attention backend": activate_beside_another_plugin,
    "speculative decoding (--speculative-config)": serve(
        speculative_config=SimpleNamespace(method="eagle")
    ),
    "--kv-cache-dtype": serve(cache_dtype="fp8_e4m3"),
    "model runner V1 on a GPU": serve_on_a_gpu,
    "decode context parallelism": serve(decode_context_parallel_size=2),
    "prefill context parallelism": serve(prefill_context_parallel_size=2),
    "dual-batch overlap (--enable-dbo)": serve(enable_dbo=True),
    "--kv-sharing-fast-prefill": serve(kv_sharing_fast_prefill=True),
    "pipeline parallelism through Ray": serve(
        pipeline_parallel_size=2, distributed_executor_backend="ray"
    ),
    "--max-num-batched-tokens 1": serve(max_num_batched_tokens=1),
    "--max-num-scheduled-tokens 1": serve(max_num_scheduled_tokens=1),
    "--long-prefill-token-threshold 1": serve(long_prefill_token_threshold=1),
    "it is an encoder-decoder model": serve(is_encoder_decoder=True),
    "it uses multi-head latent attention (MLA)": serve(use_mla=True),
    "it is a hybrid of attention and state-space layers": serve(is_hybrid=True),
    "it has no attention layers": serve(is_attention_free=True),
    "it does not generate text": serve(runner_type="pooling"),
    "it uses sliding-window attention": serve(get_sliding_window=lambda: 64),
    "its attention over clips is bidirectional": serve(is_mm_prefix_lm=True),
    "it takes neither audio nor video": serve(is_multimodal_model=False),
    "it shares the KV cache of another layer": layer(kv_sharing_target_layer_name="layers.1"),
    "it runs on the attention backend": layer(backend="vllm.v1.Backend"),
    "its KV cache is a": layer(spec=object()),
    "it uses a sliding window": layer(sliding_window=64),
    "it uses attention sinks": layer(impl={"sinks": 1}),
    "it uses ALiBi": layer(impl={"alibi_slopes": [1.0]}),
    "it caps its attention logits": layer(impl={"logits_soft_cap": 30.0}),
    "kinds of KV cache": bind_two_kinds,
    "decides a layer by a later one": ask(LookingUp()),
    "does not work with pipeline parallelism": ask(
        make_policy("fastv", budget=0.9), pipeline_parallel_size=2
    ),
    "decode is 'evict'": ask(make_policy("h2o", decode="evict")),
    "Streaming input": ask(ACCKV, resumable=True),
}


def test_every_row_has_a_case() -> None:
    assert ROWS.keys() == CASES.keys()
    assert len(ROWS) == sum(len(rows) for rows in supported.refusals().values())


@pytest.mark.parametrize("name", CASES)
def test_hazard_18_a_row_refuses_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(KVPolicyError) as caught:
        CASES[name](monkeypatch)
    sentence = str(caught.value)
    assert name in sentence
    assert sentence.endswith(".")
    assert not {"{", "}"} & set(sentence)


@pytest.mark.parametrize(
    "case",
    [
        serve(),
        serve(speculative_config=SimpleNamespace(method="ngram")),
        serve(pipeline_parallel_size=2),
        *(serve(cache_dtype=dtype) for dtype in PLAIN),
        prepare(),
        prepare(worker_extension_cls=startup.WORKER_EXTENSION),
        prepare(kv_transfer_config=SimpleNamespace(kv_connector=startup.CONNECTOR)),
        layer(),
        layer(impl={"sinks": None, "alibi_slopes": None, "logits_soft_cap": 0}),
        ask(ACCKV),
        ask(make_policy("full"), resumable=True),
        ask(make_policy("fastv", budget=0.9)),
    ],
)
def test_nothing_else_is_refused(monkeypatch: pytest.MonkeyPatch, case: Callable[..., Any]) -> None:
    case(monkeypatch)


@pytest.mark.parametrize("method", ["draft_model", "eagle", "mtp", "medusa", "suffix", "ngram_gpu"])
def test_other_methods_of_speculation_are_refused_by_name(method: str) -> None:
    config = Config(speculative_config=SimpleNamespace(method=method))
    with pytest.raises(KVPolicyError, match=rf"--speculative-config\) by method {method};"):
        supported.check_supported(config, ACCKV)


@pytest.mark.parametrize("dtype", sorted({*get_args(CacheDType)} - PLAIN))
def test_hazard_18_quantised_caches_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(KVPolicyError, match=f"--kv-cache-dtype {dtype};"):
        supported.check_supported(Config(cache_dtype=dtype), ACCKV)


def test_the_document_is_up_to_date() -> None:
    written = (TESTS.parent / "docs" / "compatibility.md").read_text()
    assert written == supported.table() + "\n", f"print it again: {HOW_TO_PRINT}"


@pytest.mark.parametrize("row", supported.SUPPORTED, ids=lambda row: row.name)
def test_what_works_is_shown_by_a_test(row: supported.Supported) -> None:
    file, _, function = row.proof.partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


HAZARDS = {
    1: "a policy is configured but does not run",
    2: "compaction in the middle of a chunked prefill",
    3: "trailing text split over chunks",
    4: "the last prompt token alone in its chunk",
    5: "shared prefix blocks overwritten",
    6: "blocks hashed after they were rewritten",
    7: "stale counts under async scheduling",
    8: "counters not reset by preemption or abort",
    9: "blocks never freed, or freed twice",
    10: "writes to the null block",
    11: "layers, heads or tensor-parallel ranks disagree",
    12: "rows in prefill next to compacted rows",
    13: "rows reordered between steps",
    14: "speculative tokens rejected after compaction",
    15: "prompt_logprobs, pooling, streaming input, beam search, n > 1",
    16: "one modality only, no text behind the clip, several clips",
    17: "layers that are not full attention",
    18: "context parallelism, KV transfer, FP8 KV cache",
    19: "the first token is that of the full cache",
}


@pytest.mark.parametrize("number", HAZARDS, ids=HAZARDS.get)
def test_every_known_hazard_has_a_test_of_its_name(number: int) -> None:
    pattern = re.compile(rf"^def test_hazard_{number}_", re.MULTILINE)
    sources = (path.read_text() for path in TESTS.glob("test_*.py"))
    assert any(pattern.search(source) for source in sources)
