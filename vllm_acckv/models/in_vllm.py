# SPDX-License-Identifier: Apache-2.0
"""What our models have in common inside vLLM: prompts with tags, and sound out of clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm import envs
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.audio import load_audio_pyav
from vllm.multimodal.parse import (
    MultiModalDataItems,
    MultiModalDataParser,
    VideoProcessorItems,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    TimingContext,
)

from vllm_acckv.models import register_processors
from vllm_acckv.models.processing import AUDIO_TAG, VIDEO_TAG, TaggedProcessor

# vLLM takes chat templates from AutoProcessor.
register_processors()

_FROM_CLIP = "use_audio_in_video"
_SILENCE_SECONDS = 30

# Float32 [samples], and how many make a second.
_Sound = tuple[npt.NDArray[np.float32], float]


class TaggedProcessingInfo(BaseProcessingInfo):
    """A checkpoint's processor, made from its tokenizer and configuration alone."""

    processor_class: ClassVar[type[TaggedProcessor]]
    # What resamples the sound of clips: FFmpeg, or like recordings soxr.
    ffmpeg_resamples: ClassVar[bool] = False

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        # Now, because it adds tags to the tokenizer, of which vLLM is about to make copies.
        self.processor = self.processor_class(ctx.get_tokenizer(), ctx.get_hf_config())

    def get_hf_processor(self, **_: object) -> TaggedProcessor:
        return self.processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"video": None, "audio": None}

    def get_data_parser(self) -> MultiModalDataParser:
        # vLLM's default resampler needs torchaudio; soxr comes with vllm[audio].
        return MultiModalDataParser(
            target_sr=self.processor.sampling_rate,
            target_channels=1,
            audio_resample_method="soxr",
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class TaggedDummyInputs(BaseDummyInputsBuilder[TaggedProcessingInfo]):
    """The largest inputs; a model says how many frames and seconds it looks at."""

    frames: ClassVar[int]
    seconds: ClassVar[int]

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return VIDEO_TAG * mm_counts.get("video", 0) + AUDIO_TAG * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: MultiModalDummyOptions,
    ) -> MultiModalDataDict:
        samples = self.seconds * self.info.processor.sampling_rate
        return {
            "video": self._get_dummy_videos(
                width=64, height=64, num_frames=self.frames, num_videos=mm_counts.get("video", 0)
            ),
            "audio": self._get_dummy_audios(length=samples, num_audios=mm_counts.get("audio", 0)),
        }


class TaggedMultiModalProcessor(BaseMultiModalProcessor[TaggedProcessingInfo]):
    """Prompts with tags.

    The sound of a clip counts as a part of its own, directly behind the clip. It is taken from the
    clip's file unless the request has audio parts. ``use_audio_in_video`` (``mm_processor_kwargs``
    of a request or of the server) decides otherwise: ``false`` ignores the files' sound, ``true``
    demands it and encodes silence for clips that have none, as the models' authors do.
    """

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values_videos": MultiModalFieldConfig.batched("video"),
            "input_features": MultiModalFieldConfig.batched("audio"),
        }

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        processor = self.info.processor
        with timing_ctx.record("sound_of_clips"):
            items, of_clips, has_sound = self._with_sound(inputs)
        prompt = processor.split_tags(inputs.prompt)
        if of_clips and processor.audio_token_id not in prompt:
            prompt = processor.add_sound_tags(prompt, has_sound)
        for modality, tag, token in (
            ("video", VIDEO_TAG, processor.video_token_id),
            ("audio", AUDIO_TAG, processor.audio_token_id),
        ):
            given = items.get_count(modality, strict=False)
            if prompt.count(token) != given:
                raise ValueError(
                    f"The prompt has {prompt.count(token)} {tag} tags for {given} {modality} "
                    f"parts; the chat template writes one for each part, so do not write {tag} "
                    "yourself."
                )
        return super().apply(
            replace(
                inputs,
                prompt=prompt,
                mm_data_items=items,
                hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, _FROM_CLIP: of_clips},
            ),
            timing_ctx,
        )

    def _with_sound(self, inputs: ProcessorInputs) -> tuple[MultiModalDataItems, bool, list[bool]]:
        """All media, whether the sounds among them are the clips', and which clips have one."""
        items = inputs.mm_data_items
        clips, sounds = (items.get_count(name, strict=False) for name in ("video", "audio"))
        settings = self.info.ctx.get_mm_config().merge_mm_processor_kwargs(
            inputs.hf_processor_mm_kwargs
        )
        wanted = settings.get(_FROM_CLIP)
        if wanted is False or not clips or self.info.allowed_mm_limits.get("audio", 0) == 0:
            return items, False, []
        if sounds:
            if wanted and sounds != clips:
                raise ValueError(
                    f"{_FROM_CLIP} needs one sound for every clip, but the request has {clips} "
                    f"clips and {sounds} sounds; leave the audio parts or the setting out."
                )
            return items, bool(wanted), [True] * clips if wanted else []
        found = self._sound_of_clips(items, silence=bool(wanted))
        if all(sound is None for sound in found):
            return items, False, []
        self.info.validate_num_items("audio", sum(sound is not None for sound in found))
        parsed = self.data_parser.parse_mm_data(
            {"audio": [sound for sound in found if sound is not None]}
        )
        has_sound = [sound is not None for sound in found]
        return MultiModalDataItems({**items, **parsed}), True, has_sound

    def _sound_of_clips(self, items: MultiModalDataItems, *, silence: bool) -> list[_Sound | None]:
        """Of every clip; without track ``None``, or silence if asked for."""
        rate = self.info.processor.sampling_rate
        nothing = (np.zeros(_SILENCE_SECONDS * rate, np.float32), rate) if silence else None
        sounds: list[_Sound | None] = []
        videos = items.get("video")
        for clip in videos.data if isinstance(videos, VideoProcessorItems) else ():
            if clip is None:
                raise ValueError(
                    "A clip that is named by its uuid only brings no sound; send the clip again, "
                    f"or set {_FROM_CLIP} to false."
                )
            if isinstance(clip, MediaWithBytes) and has_track(clip.original_bytes):
                limit = envs.VLLM_MAX_AUDIO_DECODE_DURATION_S
                file = BytesIO(clip.original_bytes)
                to = rate if self.info.ffmpeg_resamples else None
                sounds.append(load_audio_pyav(file, sr=to, max_duration_s=limit))
            elif silence and not isinstance(clip, MediaWithBytes):
                raise ValueError(
                    f"{_FROM_CLIP} needs the clip's file, but the request has pictures only; send "
                    "their sound as audio."
                )
            else:
                sounds.append(nothing)
        return sounds


def load_weights(
    model: Any, weights: Iterable[tuple[str, torch.Tensor]], mapper: WeightsMapper
) -> set[str]:
    """Load a checkpoint into ``model``; names of what was loaded.

    vLLM notices a parameter that nothing was loaded into, but not one of a linear layer, nor that
    one of the matrices is missing that it stacks in one parameter.

    Raises:
        ValueError: naming what the checkpoint lacks, if the model is not quantized.
    """
    seen: set[str | None] = set()

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            seen.add(mapper.map_name(name))
            yield name, tensor

    loaded = AutoWeightsLoader(model).load_weights(noted(), mapper=mapper)
    if model.quant_config is None:
        expected = {
            name
            for parameter, _ in model.named_parameters()
            for name in _unstacked(parameter, model.packed_modules_mapping)
        }
        if missing := sorted(expected - seen):
            raise ValueError(f"The checkpoint lacks weights of {', '.join(missing)}.")
    return loaded


def _unstacked(parameter: str, stacked: Mapping[str, list[str]]) -> list[str]:
    """Names of the matrices that a parameter holds."""
    for whole, parts in stacked.items():
        if f".{whole}." in parameter:
            return [parameter.replace(f".{whole}.", f".{part}.") for part in parts]
    return [parameter]


def has_track(file: bytes) -> bool:
    """Whether a media file has a sound track."""
    import av

    try:
        with av.open(BytesIO(file)) as container:
            return bool(container.streams.audio)
    except av.FFmpegError:  # pictures in a form that vLLM reads and FFmpeg does not
        return False
