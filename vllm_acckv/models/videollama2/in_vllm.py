# SPDX-License-Identifier: Apache-2.0
"""VideoLLaMA2.1-7B-AV in vLLM: SigLIP and Qwen2 are vLLM's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import (
    WeightsMapper,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoBackend

from vllm_acckv.models.beats import CHECKPOINT_KEYS, Beats
from vllm_acckv.models.in_vllm import (
    TaggedDummyInputs,
    TaggedModel,
    TaggedMultiModalProcessor,
    TaggedProcessingInfo,
    total_frames,
)
from vllm_acckv.models.videollama2.config import VideoLLaMA2Config
from vllm_acckv.models.videollama2.connector import STCConnector, audio_projector
from vllm_acckv.models.videollama2.processing import (
    SECONDS,
    VideoLLaMA2Processor,
    middle_frames,
)

_FRAMES = VideoLLaMA2Config.num_frames

# vLLM looks for a loader by the name of the checkpoint's video processor, and for that by model
# type in this table of transformers.
_LOADER = "VideoLLaMA2VideoProcessor"
VIDEO_PROCESSOR_MAPPING_NAMES[VideoLLaMA2Config.model_type] = _LOADER


@VIDEO_LOADER_REGISTRY.register("videollama2", video_processor=_LOADER)
class VideoLLaMA2VideoBackend(VideoBackend):
    """Decodes the 16 frames that the model looks at, whatever ``num_frames`` and ``fps`` are."""

    @classmethod
    def compute_frames_index_to_sample(cls, source: Any, target: Any, **_: Any) -> list[int]:
        total = total_frames(source)
        # Decoders give no frame twice: of a short clip the processor repeats some.
        return list(range(total)) if total < _FRAMES else middle_frames(total, _FRAMES).tolist()


class VideoLLaMA2ProcessingInfo(TaggedProcessingInfo):
    processor_class = VideoLLaMA2Processor
    processor: VideoLLaMA2Processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits = super().get_supported_mm_limits()
        if self.processor.config.audio_tower is None:
            return {"video": limits["video"]}
        return limits

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        counts = {"video": self.processor.video_tokens}
        if "audio" in self.supported_mm_limits:
            counts["audio"] = self.processor.audio_tokens
        return counts


class VideoLLaMA2DummyInputs(TaggedDummyInputs):
    frames = _FRAMES
    seconds = SECONDS


class VideoLLaMA2MultiModalProcessor(TaggedMultiModalProcessor):
    info: VideoLLaMA2ProcessingInfo

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.processor
        tokens = {"video": processor.video_token_id, "audio": processor.audio_token_id}
        return [
            PromptReplacement(
                modality=modality, target=[token], replacement=processor.expand([token])
            )
            for modality, token in tokens.items()
            if modality in mm_items
        ]


@MULTIMODAL_REGISTRY.register_processor(
    VideoLLaMA2MultiModalProcessor,
    info=VideoLLaMA2ProcessingInfo,
    dummy_inputs=VideoLLaMA2DummyInputs,
)
class VideoLLaMA2ForConditionalGeneration(TaggedModel):
    """Loads the published files as they are. LoRA reaches the decoder only."""

    vision_tower: Any
    mm_projector: Any
    audio_tower: Any
    mm_projector_a: Any

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex=CHECKPOINT_KEYS,
        orig_to_new_prefix={
            "model.vision_tower.vision_tower.": "vision_tower.",
            "model.mm_projector.": "mm_projector.",
            "model.audio_tower.": "audio_tower.",
            "model.mm_projector_a.": "mm_projector_a.",
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: VideoLLaMA2Config = vllm_config.model_config.hf_config
        self.config = config
        self.configure_mm_token_handling(  # type: ignore[operator]
            config.vocab_size, [config.video_token_id, config.audio_token_id]
        )
        with self._mark_tower_model(vllm_config, "video"):  # type: ignore[operator]
            vision = config.vision_tower
            self.vision_tower = SiglipVisionModel(
                vision,
                None,  # checkpoints are quantized in their decoder
                num_hidden_layers_override=vision.num_hidden_layers,
                require_post_norm=False,
                prefix=maybe_prefix(prefix, "vision_tower"),
            )
            self.mm_projector = STCConnector(config.mm_hidden_size, config.hidden_size)
        if config.audio_tower is not None:
            with self._mark_tower_model(vllm_config, "audio"):  # type: ignore[operator]
                self.audio_tower = Beats(config.audio_tower)
                self.mm_projector_a = audio_projector(config)
        self.make_decoder(vllm_config, prefix, "Qwen2ForCausalLM")

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embeddings ``[tokens, hidden]`` of clips and sounds, in the order of ``kwargs``.

        Args:
            kwargs: ``pixel_values_videos [clips, T, 3, side, side]`` and ``input_features
                [sounds, 2998, 128]``.
        """
        embeddings: list[torch.Tensor] = []
        for name, value in kwargs.items():
            # One item after the other: a layer of BEATs holds [heads, 1496, 1496] of each sound.
            if name == "pixel_values_videos":
                embeddings += [self._embed_video(clip) for clip in _items(value)]
            elif name == "input_features":
                embeddings += [self._embed_audio(sound) for sound in _items(value)]
        return embeddings

    def _embed_video(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[T, 3, side, side]`` to ``[video tokens, hidden]``."""
        patches = self.vision_tower(pixels.to(self.vision_tower.dtype))
        tokens: torch.Tensor = self.mm_projector(patches[None])[0]
        return tokens

    def _embed_audio(self, features: torch.Tensor) -> torch.Tensor:
        """``[2998, 128]`` to ``[audio tokens, hidden]``."""
        tokens: torch.Tensor = self.mm_projector_a(self.audio_tower(features[None]))[0]
        return tokens

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector=["mm_projector", "mm_projector_a"],
            tower_model=["vision_tower", "audio_tower"],
        )


def _items(value: Any) -> Iterable[torch.Tensor]:
    """Tensors of single items, whether vLLM could stack them or not."""
    return value.unbind(0) if isinstance(value, torch.Tensor) else value
