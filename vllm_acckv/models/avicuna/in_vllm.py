# SPDX-License-Identifier: Apache-2.0
"""AVicuna in vLLM: CLIP and CLAP are those of transformers, Llama is vLLM's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.inputs import MultiModalHashes
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.qwen2_5_omni_thinker import merge_interleaved_embeddings
from vllm.model_executor.models.utils import (
    WeightsMapper,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)
from vllm.multimodal.processing.processor import (
    MultiModalProcessingResult,
    PlaceholderFeaturesInfo,
)
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoBackend
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_acckv.models.avicuna.config import AVicunaConfig
from vllm_acckv.models.avicuna.media import Media
from vllm_acckv.models.avicuna.processing import SAMPLING_RATE, STRIDE, WINDOW, AVicunaProcessor
from vllm_acckv.models.in_vllm import (
    TaggedDummyInputs,
    TaggedModel,
    TaggedMultiModalProcessor,
    TaggedProcessingInfo,
    total_frames,
)

_PUBLISHED = AVicunaConfig()

# vLLM looks for a loader by the name of the checkpoint's video processor, and for that by model
# type in this table of transformers.
_LOADER = "AVicunaVideoProcessor"
VIDEO_PROCESSOR_MAPPING_NAMES[AVicunaConfig.model_type] = _LOADER

# Which clips and sounds are pairs, by modality.
_PAIRED = {"video": "clips_with_sound", "audio": "sounds_of_clips"}


@VIDEO_LOADER_REGISTRY.register("avicuna", video_processor=_LOADER)
class AVicunaVideoBackend(VideoBackend):
    """Decodes the 75 frames that the model looks at, whatever ``num_frames`` and ``fps`` are."""

    @classmethod
    def compute_frames_index_to_sample(cls, source: Any, target: Any, **_: Any) -> list[int]:
        total = total_frames(source)
        # Decoders give no frame twice: of a short clip the processor repeats some.
        frames = min(total, _PUBLISHED.num_frames)
        return np.linspace(0, total - 1, frames, dtype=int).tolist()


class AVicunaProcessingInfo(TaggedProcessingInfo):
    processor_class = AVicunaProcessor
    processor: AVicunaProcessor

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        config = self.processor.config
        return {"video": config.num_mm_tokens, "audio": config.num_audio_tokens}


class AVicunaDummyInputs(TaggedDummyInputs):
    frames = _PUBLISHED.num_frames
    seconds = (WINDOW + (_PUBLISHED.num_audio_tokens - 1) * STRIDE) // SAMPLING_RATE


class AVicunaMultiModalProcessor(TaggedMultiModalProcessor):
    """A clip and its sound share one span, each with the mask of its own tokens.

    What is computed of a clip, or of a sound, depends on whether it has a partner, so caches must
    tell apart the two cases.
    """

    info: AVicunaProcessingInfo

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        on_cpu = {
            name: MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality, name in (*_PAIRED.items(), ("audio", "audio_windows"))
        }
        windows = hf_inputs.get("audio_windows", torch.empty(0, dtype=torch.int64))
        return {
            "pixel_values_videos": MultiModalFieldConfig.batched("video"),
            "input_features": MultiModalFieldConfig.flat_from_sizes("audio", windows),
            **on_cpu,
        }

    def _cached_apply_hf_processor(
        self, inputs: ProcessorInputs, timing_ctx: TimingContext
    ) -> MultiModalProcessingResult:
        pairs = dict(zip(_PAIRED.values(), self.info.processor.pairs(inputs.prompt), strict=True))
        kwargs = {**inputs.hf_processor_mm_kwargs, **pairs}
        return super()._cached_apply_hf_processor(
            replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx
        )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        pairs: dict[str, Any] = {kind: kwargs.pop(name) for kind, name in _PAIRED.items()}
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))
        return {
            modality: [
                f"{one}-pair" if paired else one
                for one, paired in zip(items, pairs[modality], strict=True)
            ]
            for modality, items in hashes.items()
        }

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        kwargs: dict[str, Any] = dict(inputs.hf_processor_mm_kwargs)
        for modality, cached in mm_is_cached.items():
            flags = zip(kwargs[_PAIRED[modality]], cached, strict=True)
            kwargs[_PAIRED[modality]] = [paired for paired, known in flags if not known]
        return kwargs

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]
    ) -> BatchFeature:
        # Not by way of vLLM's context, which would round spectrograms to the model's precision.
        inputs = self.info.processor(**hf_data, **hf_kwargs)
        if "pixel_values_videos" in inputs:
            precision = self.info.ctx.model_config.dtype
            inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(precision)
        return inputs

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.processor
        windows = out_mm_kwargs.get_data().get("audio_windows", ())

        def clip(item: int) -> list[int]:
            return processor.tokens_of_clip(hf_processor_mm_kwargs[_PAIRED["video"]][item])

        def sound(item: int) -> list[int]:
            if hf_processor_mm_kwargs[_PAIRED["audio"]][item]:
                return []  # its tokens are the clip's
            return [processor.audio_token_id] * int(windows[item])

        return [
            PromptReplacement(
                modality=modality, target=[processor.video_token_id], replacement=tokens
            )
            for modality, tokens in (("video", clip), ("audio", sound))
            if modality in mm_items
        ]

    def _maybe_apply_prompt_updates(
        self, mm_items: MultiModalDataItems, mm_res: MultiModalProcessingResult
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        counts = mm_items.get_all_counts()
        self._validate_mm_kwargs(mm_res.kwargs, counts)
        self._validate_mm_updates(mm_res.prompt_updates, counts)
        modality_of = {
            self.info.processor.video_token_id: "video",
            self.info.processor.audio_token_id: "audio",
        }
        prompt: list[int] = []
        placeholders: dict[str, list[PlaceholderFeaturesInfo]] = {name: [] for name in counts}
        span = 0, list[int]()  # the last one's beginning and tokens
        for token in mm_res.prompt_ids:
            modality = modality_of.get(token)
            if modality is None:
                prompt.append(token)
                continue
            item = len(placeholders[modality])
            (update,) = mm_res.prompt_updates[modality][item]
            if update.content.full:
                span = len(prompt), list(update.content.full)
                prompt += span[1]
            mask = torch.tensor(span[1]) == token
            placeholders[modality].append(PlaceholderFeaturesInfo(modality, item, *span, mask))
        self._validate_mm_placeholders(placeholders, counts)
        return prompt, placeholders


@MULTIMODAL_REGISTRY.register_processor(
    AVicunaMultiModalProcessor, info=AVicunaProcessingInfo, dummy_inputs=AVicunaDummyInputs
)
class AVicunaForConditionalGeneration(TaggedModel):
    """Loads what ``vllm-acckv convert avicuna`` writes. LoRA reaches the decoder only."""

    media: Any

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: AVicunaConfig = vllm_config.model_config.hf_config
        self.config = config
        with self._mark_tower_model(vllm_config, {"video", "audio"}):  # type: ignore[operator]
            self.media = Media(config)
        # Spectrograms in decibels lose too much in 16 bits, and CLAP is small.
        self.media.clap.float()
        self.make_decoder(vllm_config, prefix, "LlamaForCausalLM")

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Embeddings ``[tokens, hidden]`` of clips or sounds.

        Args:
            kwargs: media of one modality as in
                :class:`vllm_acckv.models.avicuna.modeling.AVicunaForCausalLM`.
        """
        if "pixel_values_videos" in kwargs:
            # One clip after the other: each is 75 pictures for CLIP.
            paired = kwargs["clips_with_sound"].flatten().tolist()
            clips = zip(kwargs["pixel_values_videos"], paired, strict=True)
            return [self.media.embed_videos(clip[None], [sound])[0] for clip, sound in clips]
        if "input_features" in kwargs:
            windows, paired = (
                kwargs[name].flatten().tolist() for name in ("audio_windows", "sounds_of_clips")
            )
            return self.media.embed_audio(kwargs["input_features"], windows, paired)
        return []

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeddings: torch.Tensor = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings or is_multimodal is None:
            return embeddings
        with gpu_sync_allowed():
            ids = input_ids.to(is_multimodal.device)
            return merge_interleaved_embeddings(
                embeddings,
                multimodal_embeddings,
                is_multimodal & (ids == self.config.video_token_id),
                is_multimodal & (ids == self.config.audio_token_id),
                is_multimodal,
            )

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector=["media.mm_projector", "media.mm_projector_a"],
            tower_model=["media.clip", "media.clap"],
        )
