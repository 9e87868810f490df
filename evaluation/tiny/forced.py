# SPDX-License-Identifier: Apache-2.0
"""Which answers of the tiny model stay right under a policy, in milliseconds each.

Greedy decoding gives the right answer if and only if the model, fed the right answer, predicts each
of its tokens. The first is predicted before anything is dropped, and the same for all clips: it is
taken as right. And whatever a policy drops afterwards, the prompt is computed the same. So prompts
are computed once, and every policy costs its decision and one pass over the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Maker
from model import Tiny
from safetensors.torch import load_file
from transformers import AttentionInterface, DynamicCache

from vllm_acckv.evaluation import tiny_av
from vllm_acckv.hf import kv_policy
from vllm_acckv.hf.cache import CompressedLayer
from vllm_acckv.hf.decoder import names_of
from vllm_acckv.hf.prefill import Call, Prefill
from vllm_acckv.hf.prompt import rotary_angles
from vllm_acckv.hf.runner import _SEEN
from vllm_acckv.plan import make_plan
from vllm_acckv.policies.base import Policy
from vllm_acckv.policies.recent import Recent
from vllm_acckv.scores import observed_attention
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Modalities

SPLITS = {"dev": 0xDE7, "test": 0x7E57}
"""Seeds of the clips that policies are chosen on, and of those that are reported."""

Scores = Callable[["Question", int], torch.Tensor]
"""fp32 ``[G, l]`` of a question's prompt in a layer, in place of what the policy observes."""


@dataclass(frozen=True)
class Rows:
    """What one layer computed for some tokens: ``[H, n, D]`` queries, ``[G, n, D]`` the others."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def at(self, places: torch.Tensor) -> Rows:
        return Rows(self.query[:, places], self.key[:, places], self.value[:, places])


@dataclass(frozen=True)
class Question:
    """A question about a clip, computed with the full cache.

    Attributes:
        prompt, answer: by layer, the rows of the prompt's tokens and of the answer's.
        tokens: int64 ``[n]`` of the answer with its end.
        positions: int64 ``[3, 1, l + n]`` of prompt and answer.
        modality: int8 ``[l]`` of the prompt.
        clip: number of the clip.
    """

    task: str
    prompt: tuple[Rows, ...]
    answer: tuple[Rows, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    modality: Modalities
    clip: int = 0


def load(folder: Path) -> tuple[Maker, Tiny]:
    """A trained checkpoint."""
    maker = Maker(folder, 1, 0)
    model = Tiny(folder, maker, 0)
    weights = load_file(folder / "model.safetensors")
    model.thinker.load_state_dict(
        {name.removeprefix("thinker."): tensor for name, tensor in weights.items()}
    )
    return maker, model.eval()


# The full cache

_recorded: list[Rows] = []


def _recording(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    _recorded.append(Rows(query[0], key[0], value[0]))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, mask, enable_gqa=True).transpose(1, 2), None


AttentionInterface.register("recording", _recording)


def record(maker: Maker, model: Tiny, clips: int, split: str, seed: int = 0) -> list[Question]:
    """A question of each task about each clip."""
    rng = np.random.default_rng([SPLITS[split], seed])
    return [
        replace(one, clip=clip) for clip in range(clips) for one in _about_one(maker, model, rng)
    ]


@torch.inference_mode()
def _about_one(maker: Maker, model: Tiny, rng: np.random.Generator) -> Iterator[Question]:
    clip = tiny_av.make_clip(rng)
    asked = [make(clip, rng) for make in tiny_av.TASKS.values()]
    batch, places = maker.about(clip, [one for one in asked if one is not None])
    text = model.thinker.model
    before = text.config._attn_implementation
    _recorded.clear()
    text.config._attn_implementation = "recording"
    try:
        model(batch)
    finally:
        text.config._attn_implementation = before
    layers = [*_recorded]
    _recorded.clear()
    position = model.positions(batch)
    prefix = torch.arange(len(maker.prefix))
    kinds = torch.full_like(prefix, TEXT)
    kinds[model.video], kinds[model.audio] = VIDEO, AUDIO
    for question, (start, middle, end) in zip(
        (one for one in asked if one is not None), places, strict=True
    ):
        prompt = torch.cat([prefix, torch.arange(start, middle)])
        answer = torch.arange(middle, end)
        modality = torch.full((len(prompt),), TEXT, dtype=torch.int8)
        modality[: len(prefix)] = kinds
        yield Question(
            question.task,
            tuple(rows.at(prompt) for rows in layers),
            tuple(rows.at(answer) for rows in layers),
            batch.tokens[0, answer],
            position[:, :, torch.cat([prompt, answer])],
            modality.numpy(),
        )


# Policies


class _Told(Prefill):
    """Decides by scores from elsewhere."""

    scores: Callable[[int], torch.Tensor]

    def _observed(self, call: Call, key: torch.Tensor) -> torch.Tensor:
        return self.scores(call.module.layer_idx)


def answered_rows(question: Question, layer: int) -> torch.Tensor:
    """Scores of an oracle: the attention that the right answer pays to the prompt."""
    rows, prompt = question.answer[layer], question.prompt[layer]
    length = prompt.key.shape[1]
    key = torch.cat([prompt.key, rows.key], 1)
    scale = key.shape[-1] ** -0.5
    return observed_attention(rows.query.transpose(0, 1), key, length, scale)[:, :length]


def clip_rows(question: Question, layer: int, rows: int | None = None) -> torch.Tensor:
    """Scores of what H2O sees more of: the mean attention that the clip's own tokens pay.

    Args:
        rows: so many of them, equally far apart (default: all).
    """
    prompt, modality = question.prompt[layer], torch.from_numpy(question.modality)
    (seen,) = (modality != TEXT).nonzero(as_tuple=True)
    if rows is not None:
        seen = seen[torch.linspace(0, len(seen) - 1, rows).round().long()]
    query = prompt.query[:, seen].unflatten(0, (len(prompt.key), -1))
    logits = query @ prompt.key.transpose(1, 2)[:, None] * query.shape[-1] ** -0.5
    later = torch.arange(len(modality)) > seen[:, None]
    attention = logits.masked_fill(later, -torch.inf).softmax(-1).mean(1).sum(1)
    return attention / (~later).sum(0).clamp(min=1)


def alike(question: Question, layer: int) -> torch.Tensor:
    """Scores that prefer no token."""
    return torch.ones(question.prompt[layer].key.shape[:2])


@torch.inference_mode()
def right(
    model: Tiny, questions: Sequence[Question], policy: Policy, scores: Scores | None = None
) -> tuple[list[bool], float]:
    """Whether each answer is right, and the mean number of entries that a layer keeps."""
    text, found, entries = model.thinker.model, list[bool](), list[int]()
    # Any policy makes the model read compressed caches; the prompts are compressed already.
    with kv_policy(model.thinker, Recent(budget=1.0)):
        for question in questions:
            cache, length = _compressed(model, question, policy, scores), len(question.modality)
            entries += [layer.keys.shape[2] for layer in cache.layers]
            out = text(
                inputs_embeds=text.embed_tokens(question.tokens[None, :-1]),
                position_ids=question.positions[:, :, length : length + len(question.tokens) - 1],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            guess = model.thinker.lm_head(out)[0].argmax(-1)
            found.append(torch.equal(guess, question.tokens[1:]))
    return found, float(np.mean(entries))


def _compressed(
    model: Tiny, question: Question, policy: Policy, scores: Scores | None
) -> DynamicCache:
    plan = make_plan(question.modality, policy, 1, len(question.prompt))
    if policy.name != "full":
        plan = replace(plan, skipped=None)
    angles = _angles(model, question) if plan.active and policy.needs_angles else None
    prefill: Prefill = Prefill(plan, 0, angles, None)
    if scores is not None:
        told = _Told(plan, 0, angles, None)
        told.scores = lambda layer: scores(question, layer)
        prefill = told
    cache = DynamicCache()
    setattr(cache, _SEEN, True)
    for module, rows in zip(model.thinker.model.layers, question.prompt, strict=True):
        states = (rows.query[None], rows.key[None], rows.value[None])
        layer = CompressedLayer(*states[1:], prompt_tokens=rows.key.shape[1])
        if plan.active:
            scale = rows.key.shape[-1] ** -0.5
            call = Call(module.self_attn, *states, scale, attend=_never)
            layer, _ = prefill.compact(call)
        cache.layers.append(layer)
    return cache


def _angles(model: Tiny, question: Question) -> torch.Tensor:
    text = model.thinker.model
    apply = names_of(text.layers[0].self_attn)["apply_rotary_pos_emb"]
    positions = question.positions[:, :, : len(question.modality)]
    embeddings = text.rotary_emb(question.prompt[0].key, positions)
    width = question.prompt[0].key.shape[-1]
    return rotary_angles(text.rotary_emb, positions, embeddings, apply, width)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the prompt is computed already")
