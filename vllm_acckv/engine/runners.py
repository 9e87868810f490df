# SPDX-License-Identifier: Apache-2.0
"""Tell the policy worker which batch row is which request, on both model runners."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm_acckv.engine import compat
from vllm_acckv.engine.rotary import RotaryAngles
from vllm_acckv.engine.worker import current_worker


def install(use_v2_model_runner: bool) -> None:
    """Wrap the model runner in use."""
    if use_v2_model_runner:
        compat.check("read_prefill_positions")
        compat.wrap("add_requests", _with_slots)
        compat.wrap("gather_batch_req_state", _with_whole_graphs_for_decodes)
    else:
        compat.wrap("_build_attention_metadata", _with_batch)
        compat.wrap("sample_tokens", _with_generators_at_rest)


def fix_audio_in_video() -> None:
    """Wrap the embedding merge of Qwen2.5-Omni and Qwen3-Omni if they are in use."""
    for name in ("", " in Qwen3-Omni"):
        name = f"check_interleaved_audio_video{name}"
        if compat.TOUCH_POINTS[name].target.partition(":")[0] in sys.modules:
            compat.wrap(name, _with_sound_first)


def _with_sound_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM takes embeddings in the order video, audio unless it sees each behind the other; a
    chunk that begins with sound and ends with pictures is in neither order. Merging by modality
    is right for every order, so ask for it whenever a chunk holds both."""

    def check_interleaved_audio_video(
        is_video: Any, is_audio: Any, num_video: int, num_audio: int
    ) -> bool:
        if current_worker() is None:
            return original(is_video, is_audio, num_video, num_audio)
        return num_video > 0 and num_audio > 0

    return check_interleaved_audio_video


def _with_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        worker = current_worker()
        if worker is None:
            return original(self, *args, **kwargs)
        if kwargs.get("num_scheduled_tokens") is None:  # a warm-up run has no requests
            worker.batch = []
        else:
            worker.batch = [
                worker.request(request_id, state, partial(_angles_v1, self, state))
                for request_id in self.input_batch.req_ids
                for state in (self.requests[request_id],)
            ]
            if len(worker.requests) > len(self.requests):
                worker.forget_all_but(self.requests)
        try:
            return original(self, *args, **kwargs)
        finally:
            worker.batch = None

    return _build_attention_metadata


def _with_generators_at_rest(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM samples a token for every row, and takes back the step of a seeded generator where the
    token is not wanted, by an offset that CPU generators do not have. There, such rows lend their
    generators no more: the token is thrown away whoever draws it."""

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        if current_worker() is None or self.device.type != "cpu":
            return original(self, grammar_output)
        batch = self.input_batch
        unwanted = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        resting = {row: batch.generators.pop(row) for row in unwanted if row in batch.generators}
        try:
            return original(self, grammar_output)
        finally:
            batch.generators.update(resting)

    return sample_tokens


def _angles_v1(runner: Any, state: Any, length: int) -> torch.Tensor:
    positions = state.mrope_positions if runner.uses_mrope else torch.arange(length)
    return _rotary_angles(runner)(positions[..., :length])


def _angles_v2(runner: Any, slot: int, length: int) -> torch.Tensor:
    rope_state = runner.model_state.rope_state
    if rope_state is not None:
        positions = rope_state.read_prefill_positions(slot, length)
    else:
        positions = torch.arange(length, device=runner.device)
    return _rotary_angles(runner)(positions)


def _rotary_angles(runner: Any) -> RotaryAngles:
    """Those of the runner's model, made once."""
    if runner not in _angles_of:
        _angles_of[runner] = RotaryAngles.of(runner.get_model())
    return _angles_of[runner]


_angles_of: WeakKeyDictionary[Any, RotaryAngles] = WeakKeyDictionary()


class _NewRequest:
    """V2's ``NewRequestData`` under the names that :mod:`.requests` reads."""

    def __init__(self, data: Any) -> None:
        self.sampling_params = data.sampling_params
        self.mm_features = data.mm_features
        self.prompt_token_ids = data.prompt_token_ids
        self.num_prompt_tokens = data.prompt_len


def _with_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        worker = current_worker()
        if worker is None:
            return
        for data in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[data.req_id]
            angles = partial(_angles_v2, self, slot)
            worker.take_slot(slot, worker.request(data.req_id, _NewRequest(data), angles))
        worker.step_open = True
        known = self.req_states.req_id_to_index
        if len(worker.requests) > len(known):
            worker.forget_all_but(known)

    return add_requests


def _with_whole_graphs_for_decodes(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather_batch_req_state(self: Any, scheduler_output: Any, dummy_run: bool) -> Any:
        state, uniform_token_count = original(self, scheduler_output, dummy_run)
        worker = current_worker()
        if worker is None or state is None or not state.has_prefill:
            return state, uniform_token_count
        computed, scheduled = state.num_computed_prefill_tokens_np, state.num_scheduled_tokens
        if worker.works_on(state.req_ids, computed.tolist(), scheduled.tolist()):
            return state._replace(decode_graph_eligible=False), None
        return state, uniform_token_count

    return gather_batch_req_state
