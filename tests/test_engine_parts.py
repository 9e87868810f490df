# SPDX-License-Identifier: Apache-2.0
"""Parts of the engine that can be checked without a server."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_acckv.config import KVPolicyError
from vllm_acckv.engine import compat
from vllm_acckv.engine.blocks import bounded_chunk
from vllm_acckv.engine.front_end import check_request
from vllm_acckv.engine.requests import plan_request
from vllm_acckv.engine.supported import check_policy
from vllm_acckv.plan import make_plan
from vllm_acckv.policies import make_policy
from vllm_acckv.policies.recent import Recent
from vllm_acckv.rotary import rotate
from vllm_acckv.spans import TEXT, VIDEO


def test_every_touch_point_is_as_expected() -> None:
    """The installed vLLM still has every function this package wraps, with these parameters."""
    for name, point in compat.TOUCH_POINTS.items():
        assert point.reason
        assert point.removal
        if "gpu.model_runner" in point.target:
            continue  # needs Triton to import; the tests on model runner V2 wrap it
        compat.find(name)


def test_a_changed_function_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("changed")
    module.function = lambda one, two: None
    monkeypatch.setitem(sys.modules, "changed", module)
    for target, message in (
        ("changed:function", "takes one, two instead of one"),
        ("changed:gone", "changed:gone: it no longer exists"),
    ):
        point = compat.TouchPoint(target, ("one",), "a test", "never")
        monkeypatch.setitem(compat.TOUCH_POINTS, "changed", point)
        with pytest.raises(compat.IncompatibleVLLMError, match=message):
            compat.wrap("changed", lambda original: original)
    assert module.function(1, 2) is None


@pytest.mark.parametrize("model", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_sound_in_front_of_pictures_is_merged_by_modality(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """A chunk that begins with a clip's sound and ends with its pictures, in either Qwen-Omni."""
    from vllm_acckv.engine import runners

    module = importlib.import_module(f"vllm.model_executor.models.{model}")
    for name in ("", " in Qwen3-Omni"):  # undone when the test is over
        owner, original = compat.find(f"check_interleaved_audio_video{name}")
        monkeypatch.setattr(owner, "check_interleaved_audio_video", original)
    monkeypatch.setattr(compat, "_wrapped", set())
    monkeypatch.setattr(runners, "current_worker", lambda: object())
    is_audio = torch.arange(24) < 16
    assert not module.check_interleaved_audio_video(~is_audio, is_audio, 8, 16)
    runners.fix_audio_in_video()
    assert module.check_interleaved_audio_video(~is_audio, is_audio, 8, 16)
    assert not module.check_interleaved_audio_video(~is_audio, is_audio, 0, 16)


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0"])
def test_other_versions_of_vllm_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(compat.IncompatibleVLLMError, match=rf">=0\.32,<0\.33.*{version}"):
        compat.check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1rc1+cu130"])
def test_known_versions_of_vllm(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    compat.check_version()


def test_plugin_survives_a_changed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hazard: an import crash after an upgrade takes down servers that use no policy."""
    from vllm_acckv.engine import flags, plugin

    def install() -> None:
        raise compat.IncompatibleVLLMError("vLLM changed something")

    monkeypatch.setattr(flags, "install", install)
    plugin.register()


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def parsed() -> tuple[list[str], str]:
    """Our modules that parsing arguments without a policy loads, and pickled arguments with one."""
    modules, pickled = run_python(
        "import pickle, sys\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())\n"
        "parser.parse_args([])\n"
        "print(*sorted(name for name in sys.modules if name.startswith('vllm_acckv')))\n"
        "flags = ['--kv-policy', 'acckv', '--kv-budget=0.3', '--model', '.']\n"
        "print(pickle.dumps(parser.parse_args(flags)).hex())"
    ).splitlines()
    return modules.split(), pickled


def test_plugin_imports_nothing_heavy(parsed: tuple[list[str], str]) -> None:
    """Without a policy, of this package only what knows the flags and the models' configurations
    is loaded; neither models nor processors are."""
    assert parsed[0] == [
        "vllm_acckv",
        "vllm_acckv.config",
        "vllm_acckv.cpu_media",
        "vllm_acckv.engine",
        "vllm_acckv.engine.compat",
        "vllm_acckv.engine.flags",
        "vllm_acckv.engine.plugin",
        "vllm_acckv.models",
        "vllm_acckv.models.avicuna",
        "vllm_acckv.models.avicuna.config",
        "vllm_acckv.models.beats",
        "vllm_acckv.models.videollama2",
        "vllm_acckv.models.videollama2.config",
        "vllm_acckv.policies",
    ]


def test_flags_reach_processes_that_are_handed_parsed_arguments(
    parsed: tuple[list[str], str],
) -> None:
    """``--api-server-count`` and data parallelism pickle the namespace to fresh processes."""
    printed = run_python(
        "import pickle\n"
        f"args = pickle.loads(bytes.fromhex('{parsed[1]}'))\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "print(AsyncEngineArgs.from_cli_args(args).additional_config['kv_policy']['budget'])"
    )
    assert printed == "0.3"


def test_plugins_loaded_before_the_arguments_module() -> None:
    printed = run_python(
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "print(EngineArgs.create_engine_config.__wrapped__.__module__)"
    )
    assert printed == "vllm.engine.arg_utils"


def test_hazard_4_chunks_end_at_the_compaction_point() -> None:
    """A chunk never crosses ``end``, and the last one has two tokens or more."""
    modality = np.array([TEXT] * 4 + [VIDEO] * 90 + [TEXT] * 6, dtype=np.int8)
    plan = make_plan(modality, make_policy("acckv"), 16)
    assert plan.active
    assert plan.end == 100
    assert bounded_chunk(plan, 0, 150) == 100  # resumed with 50 generated tokens
    assert bounded_chunk(plan, 0, 99) == 98
    assert bounded_chunk(plan, 64, 36) == 36
    assert bounded_chunk(plan, 98, 1) == 0  # waits for a step with room for two
    assert bounded_chunk(plan, 100, 7) == 7
    for size in range(2, 12):
        computed, chunks = 0, []
        while computed < plan.end:
            chunks.append(bounded_chunk(plan, computed, size))
            computed += chunks[-1]
        assert computed == plan.end
        assert chunks[-1] >= 2


def engine_config(num_layers: int = 28, pipeline_stages: int = 1) -> SimpleNamespace:
    """The part of ``VllmConfig`` that decides whether a policy can be served."""
    return SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: num_layers),
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline_stages),
    )


def test_streaming_input_is_refused() -> None:
    config = engine_config()
    check_request(make_policy("acckv"), None, False, config)
    check_request(make_policy("full"), None, True, config)
    with pytest.raises(KVPolicyError, match="Streaming input does not work with --kv-policy acckv"):
        check_request(make_policy("acckv"), None, True, config)


@pytest.mark.parametrize(
    ("config", "xargs", "sentence"),
    [
        (engine_config(), {"kv_policy": "fastv"}, None),
        (engine_config(4), {"kv_policy": "fastv"}, r"^kv_budget is 0\.2; it must be above 0\.50"),
        (engine_config(2), {"kv_policy": "fastv"}, "first_pruned_layer is 2; .* model's 2 layers"),
        (engine_config(28, 2), {"kv_policy": "fastv"}, "kv_policy fastv .* pipeline parallelism"),
        (
            engine_config(),
            {"kv_policy": "h2o", "kv_policy_config": {"decode": "evict"}},
            "kv_policy_config decode is 'evict'; vLLM compresses once after prefill",
        ),
    ],
)
def test_policies_that_this_engine_cannot_serve(
    config: SimpleNamespace, xargs: dict, sentence: str | None
) -> None:
    params = SimpleNamespace(extra_args=xargs)
    if sentence is None:
        check_request(make_policy("acckv"), params, False, config)
        return
    with pytest.raises(KVPolicyError, match=sentence):
        check_request(make_policy("acckv"), params, False, config)


@pytest.mark.parametrize(
    ("source", "stages", "sentence"),
    [
        (3, 1, "looking_up decides a layer by a later one"),
        (0, 2, "looking_up does not work with pipeline parallelism"),
        (0, 1, None),
    ],
)
def test_policies_that_follow_another_layer(source: int, stages: int, sentence: str | None) -> None:
    class LookingUp(Recent):
        name = "looking_up"

        def score_layer(self, layer):
            return source

    if sentence is None:
        check_policy(engine_config(4, stages), LookingUp())
        return
    with pytest.raises(KVPolicyError, match=sentence):
        check_policy(engine_config(4, stages), LookingUp())


def test_prefix_cache_hits_leave_the_observed_rows_to_be_computed() -> None:
    modality = np.array([TEXT] * 4 + [VIDEO] * 90 + [TEXT] * 6, dtype=np.int8)
    reusable = {
        name: make_plan(modality, make_policy(name), 16).reusable_blocks
        for name in ("acckv", "h2o", "lookm", "snapkv", "streaming")
    }
    assert reusable == {
        "acckv": 94 // 16,
        "h2o": 0,
        "lookm": 0,
        "snapkv": 68 // 16,
        "streaming": 98 // 16,
    }
    wide = make_policy("snapkv", window=64)
    assert make_plan(modality, wide, 16).reusable_blocks == 36 // 16


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_and_writes_the_packed_cpu_cache(dtype: torch.dtype, isa: str) -> None:
    """What vLLM's kernel wrote is read back; what is written lands in the right slots."""
    from vllm import _custom_ops as ops

    from vllm_acckv.engine.cpu_attention import CPUPagedKV

    heads, block, width = 2, 32, 64

    class Impl:
        def do_kv_cache_update(self, layer, key, value, cache, slots):
            view = cache.view(len(cache), heads, block * 2, -1)
            halves = view.chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(
                key, value, *halves, slots, layer.isa, k_scale=1.0, v_scale=1.0,
                kv_cache_dtype="auto",
            )  # fmt: skip

    impl, layer = Impl(), SimpleNamespace(isa=isa)
    cache = torch.zeros(9, heads, block, 2 * width, dtype=dtype)
    table = torch.tensor([5, 2, 7], dtype=torch.int32)
    length = 70
    key = torch.randn(length, heads, width).to(dtype)
    value = torch.randn(length, heads, width).to(dtype)
    position = torch.arange(length)
    slots = table.long()[position // block] * block + position % block
    impl.do_kv_cache_update(layer, key, value, cache, slots)
    paged = CPUPagedKV(impl, layer, cache, table)
    read_key, read_value = paged.read(length)
    assert torch.equal(read_key, key.movedim(0, 1))
    assert torch.equal(read_value, value.movedim(0, 1))
    paged.write(40, read_key[:, :20], read_value[:, :20])
    again_key, again_value = paged.read(length)
    assert torch.equal(again_key[:, 40:60], read_key[:, :20])
    assert torch.equal(again_value[:, 40:60], read_value[:, :20])
    assert torch.equal(again_key[:, :40], read_key[:, :40])
    assert torch.equal(again_value[:, 60:], read_value[:, 60:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_angles_are_vllms(interleaved: bool) -> None:
    """Rotating by our angles equals vLLM's own M-RoPE forward."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

    from vllm_acckv.engine.rotary import RotaryAngles

    with set_current_vllm_config(VllmConfig()):
        rotary = MRotaryEmbedding(
            64, 64, 512, 10000.0, True, torch.float32,
            mrope_section=[12, 10, 10], mrope_interleaved=interleaved,
        )  # fmt: skip
        positions = torch.randint(0, 400, (3, 11))
        key = torch.randn(11, 64)
        expected = rotary.forward_native(positions, key.clone(), key.clone())[1]
    rotated = rotate(key, RotaryAngles(rotary)(positions))
    torch.testing.assert_close(rotated, expected, atol=5e-5, rtol=1e-4)


def test_wrong_settings_that_slip_through_stop_nothing() -> None:
    """Scheduler and worker come to the same plan, and neither raises."""
    place = SimpleNamespace(offset=0, length=90, is_embed=None)
    request = SimpleNamespace(
        mm_features=[SimpleNamespace(modality="video", mm_position=place)],
        num_prompt_tokens=100,
        prompt_token_ids=[0] * 100,
        sampling_params=SimpleNamespace(extra_args={"kv_budget": -1}),
    )
    acckv = make_policy("acckv")
    assert plan_request(request, acckv, 16, 4, None).skipped == "invalid settings"
    request.sampling_params.extra_args = {"kv_policy_config": {"merge_space": "pre_rope"}}
    assert plan_request(request, acckv, 16, 4, None, has_angles=True).active
    plan = plan_request(request, acckv, 16, 4, None, has_angles=False)
    assert plan.skipped == "unknown rotary embedding"
    request.sampling_params.extra_args = {}
    assert plan_request(request, acckv, 16, 4, None, has_angles=False).active


@pytest.mark.parametrize(("style", "understood"), [(True, True), (False, False)])
def test_other_rotary_layouts_are_recognised(
    monkeypatch: pytest.MonkeyPatch, style: bool, understood: bool
) -> None:
    from vllm.model_executor.layers import rotary_embedding

    from vllm_acckv.engine.rotary import angles_available

    config = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=None))
    rotary = SimpleNamespace(is_neox_style=style, cos_sin_cache=torch.zeros(2, 4))
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {(): rotary})
    assert angles_available(config) == understood
    pruning = SimpleNamespace(is_multimodal_pruning_enabled=lambda: True)
    config.model_config.multimodal_config = pruning
    assert not angles_available(config)
