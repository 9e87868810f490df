# SPDX-License-Identifier: Apache-2.0
"""Decoding with a compressed cache in transformers' own Qwen2.5-Omni thinker (eager, float32).

The prompt runs once with full attention, the naive AccKV picks each layer's entries, and decoding
goes on over those entries at the true positions. Frames and sound come from vLLM's media loaders,
prompt tokens and features from the Hugging Face processor, optionally M-RoPE positions from
vLLM's function: nothing here runs vLLM's model, attention or cache. Call
`vllm_acckv.cpu_media.fix()` before importing this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2_5OmniProcessor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker
from vllm.model_executor.models import qwen2_5_omni_thinker as vllm_thinker
from vllm.multimodal.media import MediaConnector

from tests.reference.naive_acckv import (
    AUDIO,
    TEXT,
    VIDEO,
    LayerSelection,
    Options,
    naive_plan,
    naive_select,
)

ModelInputs = dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """What a request asks for. `options.k` is ignored: the plan computes it from `budget`."""

    budget: float
    options: Options = field(default_factory=Options)
    scope: Literal["av", "total"] = "av"


@dataclass(frozen=True)
class Generation:
    """`logprobs[t]` is the distribution that token t was drawn from."""

    token_ids: list[int]
    logprobs: Tensor  # [max_tokens, vocabulary], float32
    active: bool = False
    f_bound: int = 0
    selections: list[LayerSelection] = field(default_factory=list)  # per layer, empty if inactive


@dataclass(frozen=True)
class Prefill:
    """The uncompressed prompt of l tokens after one forward pass."""

    logits: Tensor  # [vocabulary], of the last prompt token
    attentions: list[Tensor]  # per layer [H, l, l]
    cache: DynamicCache  # per layer keys and values [1, G, l, d], keys after RoPE
    next_position: int  # of the first generated token: l + rope delta


def prepare_inputs(
    checkpoint_dir: str | Path,
    messages: Sequence[dict[str, Any]],
    use_audio_in_video: bool = False,
) -> tuple[list[int], ModelInputs]:
    """Prompt token ids and model inputs of OpenAI chat messages, decoded as vLLM does.

    Content parts: text, video_url, audio_url with file: or data: URLs. With
    `use_audio_in_video` every video brings its own sound track, and there are no audio parts.
    """
    processor = Qwen2_5OmniProcessor.from_pretrained(checkpoint_dir)
    loader = MediaConnector(allowed_local_media_path="/")
    videos, audios, conversation = [], [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "video_url":
                url = part["video_url"]["url"]
                name = type(processor.video_processor).__name__
                videos.append(loader.fetch_video(url, video_processor=name).media[0])
                if use_audio_in_video:
                    audios.append(loader.fetch_audio(url))
            elif part["type"] == "audio_url":
                audios.append(loader.fetch_audio(part["audio_url"]["url"]))
        rendered = [{**part, "type": part["type"].removesuffix("_url")} for part in parts]
        conversation.append({**message, "content": rendered})
    rate = processor.feature_extractor.sampling_rate
    assert all(sampled_at == rate for _, sampled_at in audios), "no resampler here"
    inputs = processor(
        text=processor.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        ),
        videos=videos or None,
        audio=[samples for samples, _ in audios] or None,
        use_audio_in_video=use_audio_in_video,
        return_tensors="pt",
    )
    inputs = dict(inputs, use_audio_in_video=use_audio_in_video)
    return inputs["input_ids"][0].tolist(), inputs


def modality_of(thinker: Thinker, token_ids: list[int]) -> list[int]:
    """0 text, 1 video, 2 audio for every prompt token."""
    kinds = {thinker.config.video_token_id: VIDEO, thinker.config.audio_token_id: AUDIO}
    return [kinds.get(token, TEXT) for token in token_ids]


def vllm_positions(thinker: Thinker, inputs: ModelInputs) -> Tensor:
    """M-RoPE positions [3, l] of the prompt, from vLLM's own function.

    They are those of transformers except with `use_audio_in_video`: there vLLM gives `audio_bos`
    the position of the first frame and lets the rest of the clip follow one token early.
    """
    token_ids = inputs["input_ids"][0].tolist()
    config, in_video = thinker.config, inputs["use_audio_in_video"]

    def offsets_after(marker: int) -> list[int]:
        return [j + 1 for j, token in enumerate(token_ids) if token == marker]

    def feature(modality: str, offset: int, **data: Tensor | bool) -> SimpleNamespace:
        fields = {key: SimpleNamespace(data=torch.as_tensor(x)) for key, x in data.items()}
        return SimpleNamespace(
            modality=modality, mm_position=SimpleNamespace(offset=offset), data=fields
        )

    video_offsets = offsets_after(config.vision_start_token_id)
    audio_offsets = video_offsets if in_video else offsets_after(config.audio_start_token_id)
    features = []
    for n, offset in enumerate(video_offsets):
        grid, seconds = inputs["video_grid_thw"][n], inputs["video_second_per_grid"][n]
        data = {"video_grid_thw": grid, "second_per_grid_ts": seconds}
        features.append(feature("video", offset, use_audio_in_video=in_video, **data))
    for n, offset in enumerate(audio_offsets):
        frames = inputs["feature_attention_mask"][n].sum()
        features.append(feature("audio", offset, audio_feature_lengths=frames))
    cls = vllm_thinker.Qwen2_5OmniThinkerForConditionalGeneration
    model = cls.__new__(cls)  # without weights: the function reads its configuration only
    model.config = config
    return model.get_mrope_input_positions(token_ids, features)[0]


@torch.inference_mode()
def prefill(thinker: Thinker, inputs: ModelInputs, positions: Tensor | None = None) -> Prefill:
    """Run the prompt with full attention; `positions` [3, l] replace HF's own M-RoPE ones."""
    if positions is not None:
        inputs = {**inputs, "position_ids": positions[:, None]}
    out = thinker(**inputs, use_cache=True, output_attentions=True)
    deltas = out.rope_deltas
    size = inputs["input_ids"].shape[1]
    next_position = size + int(deltas) if positions is None else int(positions.max()) + 1
    attentions = [weights[0] for weights in out.attentions]
    return Prefill(out.logits[0, -1], attentions, out.past_key_values, next_position)


def compress(state: Prefill, modality: list[int], opts: Options) -> list[LayerSelection]:
    """Select in every layer and cut its cache down to the kept and merged entries."""
    selections = []
    for layer, attention in zip(state.cache.layers, state.attentions, strict=True):
        K, V = layer.keys[0], layer.values[0]
        selection = naive_select(attention, K, V, modality, opts)
        layer.keys = entries_of(K, selection, side=0)
        layer.values = entries_of(V, selection, side=1)
        selections.append(selection)
    return selections


def entries_of(states: Tensor, selection: LayerSelection, side: int) -> Tensor:
    """Kept rows, then merged ones: [1, G, length, d] of states [G, l, d] (side 0 K, 1 V)."""
    heads = []
    for own, kept, merged in zip(states, selection.kept, selection.merged, strict=True):
        heads.append(torch.stack([*own[kept], *(token[side] for token in merged.values())]))
    return torch.stack(heads)[None]


@torch.inference_mode()
def decode_step(thinker: Thinker, token: int, position: int, cache: DynamicCache) -> Tensor:
    """Logits [vocabulary] after one more token.

    A lone query may see every entry of its layer and itself, so there is no mask, and layers may
    have different lengths. Text has the same position on the three axes of M-RoPE.
    """
    out = thinker.model(
        inputs_embeds=thinker.get_input_embeddings()(torch.tensor([[token]])),
        position_ids=torch.full((3, 1, 1), position),
        attention_mask={"full_attention": None},
        past_key_values=cache,
        use_cache=True,
    )
    return thinker.lm_head(out.last_hidden_state)[0, -1]


def generate(
    thinker: Thinker,
    inputs: ModelInputs,
    max_tokens: int,
    policy: Policy | None = None,
    forced_tokens: Sequence[int] | None = None,
    positions: Tensor | None = None,
) -> Generation:
    """Greedy (or teacher-forced) decoding; the first token comes from the uncompressed prompt."""
    state = prefill(thinker, inputs, positions)
    modality = modality_of(thinker, inputs["input_ids"][0].tolist())
    f_bound, active, selections = 0, False, []
    if policy is not None:
        opts = policy.options
        k, f_bound, active = naive_plan(
            modality,
            policy.budget,
            opts.block_size,
            opts.calibration,
            opts.keep_prefix,
            policy.scope,
        )
        if active:
            selections = compress(state, modality, replace(opts, k=k))
    tokens: list[int] = []
    logprobs: list[Tensor] = []
    logits = state.logits
    for step in range(max_tokens):
        logprobs.append(logits.float().log_softmax(dim=-1))
        tokens.append(int(logits.argmax()) if forced_tokens is None else forced_tokens[step])
        if step + 1 < max_tokens:
            logits = decode_step(thinker, tokens[-1], state.next_position + step, state.cache)
    return Generation(tokens, torch.stack(logprobs), active, f_bound, selections)
