# SPDX-License-Identifier: Apache-2.0
"""Requests on their way through vLLM, and the modality of every token that the plugin sees."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from tests.engines import BASE_ENVIRONMENT, Ask

OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 8192,
    "allowed_local_media_path": "/",
    "limit_mm_per_prompt": {"video": 2, "audio": 2, "image": 0},
    "trust_remote_code": True,
}


@dataclass(frozen=True)
class Seen:
    """One request.

    Attributes:
        prompt: token ids.
        modalities: by code, of every prompt token: as planned by the scheduler and, in an
            engine, by the worker.
        held: blocks after every step of an engine.
    """

    prompt: list[int]
    modalities: list[list[int]]
    held: list[int]


class FrontEnd:
    """vLLM up to the scheduler's door: chat template, media and processor, but no model."""

    def __init__(self, checkpoint: Path) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.renderers.registry import renderer_from_config
        from vllm.v1.engine.input_processor import InputProcessor

        with mock.patch.dict(os.environ):  # the CPU platform sets variables
            self.config = EngineArgs(str(checkpoint), **OPTIONS).create_engine_config()
        self.renderer = renderer_from_config(self.config)
        self._inputs = InputProcessor(self.config, self.renderer)

    def request(self, ask: Ask) -> Any:
        """The scheduler's request."""
        from vllm import SamplingParams
        from vllm.renderers.params import ChatParams
        from vllm.v1.request import Request

        settings = {"use_audio_in_video": True} if ask.audio_in_video else {}
        _, (rendered,) = self.renderer.render_chat(
            [ask.messages],
            ChatParams(mm_processor_kwargs=settings),
            prompt_extras={"mm_processor_kwargs": settings},
        )
        params = SamplingParams(extra_args=ask.xargs)
        made = self._inputs.process_inputs("request", rendered, params, ("generate",))
        return Request.from_engine_core_request(made, None)

    def see(self, ask: Ask) -> Seen:
        from vllm_acckv.engine.requests import plan_request
        from vllm_acckv.policies import make_policy

        request = self.request(ask)
        plan = plan_request(
            request, make_policy("acckv"), 32, 2, self.config.model_config.hf_config
        )
        return Seen(request.prompt_token_ids, [plan.layout.modalities.tolist()], [])


def see_in_engine(checkpoint: Path, asks: list[Ask]) -> list[Seen]:
    """Answer the requests one by one in an engine with acckv_plus, in a process of its own."""
    with (
        mock.patch.dict(os.environ, BASE_ENVIRONMENT),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        return pool.submit(_see_in_engine, str(checkpoint), asks).result()


def _see_in_engine(checkpoint: str, asks: list[Ask]) -> list[Seen]:
    import torch

    from tests.engine_host import Host

    # vLLM's MiniCPM asks whether a CUDA graph is being captured, where PyTorch has none.
    torch.cuda.is_current_stream_capturing = lambda: False
    policy = {"kv_policy": {"policy": "acckv_plus", "budget": 0.2}}
    host = Host(checkpoint, {**OPTIONS, "load_format": "dummy", "additional_config": policy})

    from vllm_acckv.engine import connector, worker
    from vllm_acckv.engine.requests import plan_request

    modalities: list[list[int]] = []

    def noted(*args: Any) -> Any:
        plan = plan_request(*args)
        modalities.append(plan.layout.modalities.tolist())
        return plan

    connector.plan_request = worker.plan_request = noted  # type: ignore[attr-defined]
    seen = []
    for ask in asks:
        modalities.clear()
        trace = host.run([ask])
        held = [step.get("r0", 0) for step in trace.held]
        seen.append(Seen(trace.answers[0].prompt, list(modalities), held))
    host.llm.llm_engine.engine_core.shutdown()
    return seen


def count_frames(sample_rate: int, n_mels: int, hop_length: int, **_: Any) -> Any:
    """In place of torchaudio's ``MelSpectrogram``: as many frames, all alike. Layouts depend on
    nothing else."""
    import torch

    return lambda samples: torch.ones(1, n_mels, samples.shape[-1] // hop_length + 1)
