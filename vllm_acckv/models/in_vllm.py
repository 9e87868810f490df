# SPDX-License-Identifier: Apache-2.0
"""What our models have in common inside vLLM: prompts with tags, and sound out of clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalHashes, MultiModalInput
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
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
from vllm.sequence import IntermediateTensors

from vllm_acckv.models import register_processors
from vllm_acckv.models.processing import AUDIO_TAG, VIDEO_TAG, TaggedProcessor, frames_of
from vllm_acckv.models.sound import clip_sound

# vLLM takes chat templates from AutoProcessor.
register_processors()

_FROM_CLIP = "use_audio_in_video"
_SILENCE_SECONDS = 30


class TaggedProcessingInfo(BaseProcessingInfo):
    """A checkpoint's processor, made from its tokenizer and configuration alone."""

    processor_class: ClassVar[type[TaggedProcessor]]

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        # A copy, because it adds the tags: in text without media they are no more than text.
        self.processor = self.processor_class(deepcopy(ctx.get_tokenizer()), ctx.get_hf_config())

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
    of a request or of the server) decides otherwise: ``false`` ignores the files' sound; ``true``
    of the server encodes silence for clips that have none, as the models' authors do. (Of a
    request, vLLM's chat parser refuses such clips.)
    """

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values_videos": MultiModalFieldConfig.batched("video"),
            "input_features": MultiModalFieldConfig.batched("audio"),
        }

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return replace(inputs, hf_processor_mm_kwargs={_FROM_CLIP: False})

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        processor = self.info.processor
        _check_media(inputs.mm_data_items)
        prompt = processor.split_tags(inputs.prompt)
        beside = prompt.count(processor.audio_token_id) > 0
        with timing_ctx.record("sound_of_clips"):
            items, has_sound = self._with_sound(inputs, beside)
        if not (beside and "audio" in inputs.mm_data_items):
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
        kwargs = {**inputs.hf_processor_mm_kwargs, _FROM_CLIP: any(has_sound)}
        return super().apply(
            replace(inputs, prompt=prompt, mm_data_items=items, hf_processor_mm_kwargs=kwargs),
            timing_ctx,
        )

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        """Pictures are the same with sound and without."""
        hashes = super()._get_mm_hashes(inputs)
        if "video" in hashes:
            kwargs = {k: v for k, v in inputs.hf_processor_mm_kwargs.items() if k != _FROM_CLIP}
            plain = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))
            hashes = {**hashes, "video": plain["video"]}
        return hashes

    def _with_sound(
        self, inputs: ProcessorInputs, beside: bool
    ) -> tuple[MultiModalDataItems, list[bool]]:
        """All media, and of which clips the sounds among them are (of none: they are parts of
        their own).

        Args:
            beside: sounds of the request have tags of their own in the prompt.
        """
        items = inputs.mm_data_items
        clips, sounds = (items.get_count(name, strict=False) for name in ("video", "audio"))
        settings = self.info.ctx.get_mm_config().merge_mm_processor_kwargs(
            inputs.hf_processor_mm_kwargs
        )
        wanted = settings.get(_FROM_CLIP)
        if wanted is False or not clips or self.info.allowed_mm_limits.get("audio", 0) == 0:
            return items, []
        if sounds and not wanted:
            return items, []
        if sounds not in (0, clips):
            raise ValueError(
                f"{_FROM_CLIP} needs one sound for every clip, but the request has {clips} "
                f"clips and {sounds} sounds; leave the audio parts or the setting out."
            )
        videos = items["video"]
        files = [clip for clip in getattr(videos, "data", ()) if isinstance(clip, MediaWithBytes)]
        if sounds and (beside or len(files) < clips):  # the client says what is to be heard
            return items, [True] * clips
        # Also where vLLM's chat parser brings the sound: it decodes in another way.
        found = self._sound_of_clips(items, silence=bool(wanted))
        has_sound = [sound is not None for sound in found]
        if sum(has_sound) > (most := self.info.allowed_mm_limits["audio"]):
            raise ValueError(
                f"The clips bring {sum(has_sound)} sounds, but the server takes {most} in one "
                f"prompt; send fewer clips, or ask for a higher --limit-mm-per-prompt."
            )
        if not any(has_sound):
            return items, []
        parsed = self.data_parser.parse_mm_data(
            {"audio": [sound for sound in found if sound is not None]}
        )
        return MultiModalDataItems({**items, **parsed}), has_sound

    def _sound_of_clips(
        self, items: MultiModalDataItems, *, silence: bool
    ) -> list[npt.NDArray[np.float32] | None]:
        """Float32 ``[samples]`` of every clip; without track ``None``, or silence if asked for."""
        rate = self.info.processor.sampling_rate
        sounds: list[npt.NDArray[np.float32] | None] = []
        videos = items.get("video")
        for clip in videos.data if isinstance(videos, VideoProcessorItems) else ():
            sound = None
            if clip is None:
                raise ValueError(
                    "A clip that is named by its uuid only brings no sound; send the clip again, "
                    f"or set {_FROM_CLIP} to false."
                )
            if isinstance(clip, MediaWithBytes):
                try:
                    limit = envs.VLLM_MAX_AUDIO_DECODE_DURATION_S
                    sound = clip_sound(clip.original_bytes, rate, limit)
                except ValueError as error:
                    raise ValueError(
                        f"{error} Set {_FROM_CLIP} to false, or raise the server's "
                        "VLLM_MAX_AUDIO_DECODE_DURATION_S."
                    ) from None
            elif silence:
                raise ValueError(
                    f"{_FROM_CLIP} needs the clip's file, but the request has pictures only; send "
                    "their sound as audio."
                )
            if sound is None and silence:
                sound = np.zeros(_SILENCE_SECONDS * rate, np.float32)
            sounds.append(sound)
        return sounds


def _check_media(items: MultiModalDataItems) -> None:
    """Here, because vLLM hides what a Hugging Face processor says.

    Raises:
        ValueError: for clips and sounds that cannot be what they seem.
    """
    for clip in items["video"].get_all() if "video" in items else ():
        if clip is not None:
            frames_of(clip)
    for sound in items["audio"].get_all() if "audio" in items else ():
        if sound is not None and not (
            np.issubdtype(sound.dtype, np.floating) and sound.size and np.isfinite(sound).all()
        ):
            raise ValueError(
                f"A sound is {sound.dtype} {list(sound.shape)}; expected one sample or more, as "
                "finite floating-point numbers from -1 to 1."
            )


_complete: WeakSet[Any] = WeakSet()


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
    if model.quant_config is None and model not in _complete:  # later updates may be of a part
        expected = {
            name
            for parameter, _ in model.named_parameters()
            for name in _unstacked(parameter, model.packed_modules_mapping)
        }
        if missing := sorted(expected - seen):
            raise ValueError(f"The checkpoint lacks weights of {', '.join(missing)}.")
    _complete.add(model)
    return loaded


def _unstacked(parameter: str, stacked: Mapping[str, list[str]]) -> list[str]:
    """Names of the matrices that a parameter holds."""
    for whole, parts in stacked.items():
        if f".{whole}." in parameter:
            return [parameter.replace(f".{whole}.", f".{part}.") for part in parts]
    return [parameter]


class TaggedModel(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """A decoder of vLLM with media in front of it. LoRA reaches the decoder only.

    A model's own class makes its towers, names the decoder (`make_decoder`) and embeds media.
    """

    language_model: Any
    hf_to_vllm_mapper: WeightsMapper

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return placeholder(modality)

    def make_decoder(self, vllm_config: VllmConfig, prefix: str, architecture: str) -> None:
        self.quant_config = vllm_config.quant_config
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[architecture],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.hf_to_vllm_mapper)


def placeholder(modality: str) -> str:
    """The tag of a part of a chat message.

    Raises:
        ValueError: for parts that the models do not take.
    """
    tags = {"video": VIDEO_TAG, "audio": AUDIO_TAG}
    if modality not in tags:
        raise ValueError(
            f"Parts of type {modality} are not supported; send video_url or audio_url."
        )
    return tags[modality]


def total_frames(source: Any) -> int:
    """How many frames a file says it has.

    Raises:
        ValueError: if it does not say.
    """
    total: int = source.total_frames_num
    if total <= 0:
        raise ValueError(
            "The clip's file does not say how long it is; copy it into a new one, for example with "
            "ffmpeg -i CLIP -c copy NEW.mp4."
        )
    return total
