# SPDX-License-Identifier: Apache-2.0
"""What the processors of our models have in common: tags in a text, and what stands for them.

The models' published tokenizers know no such tags; the original code splits the text there. As
special tokens they have the same effect: no token reaches across them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from transformers import AutoConfig, AutoTokenizer, BatchFeature, PreTrainedConfig, ProcessorMixin

# Not the originals' "<video>" and "<audio>", which people write when they ask about web pages.
VIDEO_TAG, AUDIO_TAG = "<|video|>", "<|audio|>"

_LOADING = ("revision", "cache_dir", "token", "local_files_only", "trust_remote_code")


class TaggedProcessor(ProcessorMixin):
    """Text with one tag for every clip and every sound to the inputs of a model.

    A model's processor says how media become tensors (`videos_to_tensors`, `audio_to_tensors`)
    and which tokens stand for them (`replacements`). Everything is made from the checkpoint's
    tokenizer and configuration; no further file is read.

    Attributes:
        sampling_rate: Hz of the waveforms it takes.
        default_chat_template: for conversations whose content is a list of parts.
    """

    sampling_rate: ClassVar[int]
    default_chat_template: ClassVar[str]

    def __init__(
        self, tokenizer: Any, config: PreTrainedConfig, chat_template: str | None = None
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or self.default_chat_template)
        self.config = config
        tokenizer.add_tokens([VIDEO_TAG, AUDIO_TAG], special_tokens=True)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TAG)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TAG)

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> TaggedProcessor:
        """Make the processor of a checkpoint in ``path``."""
        loading = {name: kwargs[name] for name in _LOADING if name in kwargs}
        tokenizer = kwargs.get("tokenizer") or AutoTokenizer.from_pretrained(path, **loading)
        return cls(tokenizer, AutoConfig.from_pretrained(path, **loading))

    # What a model's processor defines

    def videos_to_tensors(self, videos: Sequence[Any]) -> Mapping[str, Any]:
        """Model inputs of clips, each uint8 ``[frames, height, width, 3]``."""
        raise NotImplementedError

    def audio_to_tensors(self, audio: Sequence[Any], *, of_video: bool) -> Mapping[str, Any]:
        """Model inputs of waveforms, each float ``[samples]`` at `sampling_rate`.

        Args:
            of_video: they are the sound of clips, which some models sample in another way.
        """
        raise NotImplementedError

    def expand(self, ids: Sequence[int]) -> list[int]:
        """``ids`` with every tag replaced by the tokens that stand for its medium."""
        raise NotImplementedError

    # Text

    def split_tags(self, ids: Sequence[int]) -> list[int]:
        """``ids`` with one token for every tag, if a tokenizer that lacks the tags made them."""
        ids = list(ids)
        if self.video_token_id in ids or self.audio_token_id in ids:
            return ids
        text = self.tokenizer.decode(ids)
        if VIDEO_TAG not in text and AUDIO_TAG not in text:
            return ids
        split: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return split

    def add_sound_tags(self, ids: Sequence[int], has_sound: Sequence[bool]) -> list[int]:
        """``ids`` with a sound tag behind the tags of those clips that have sound."""
        tagged, clips = [], iter(has_sound)
        for token in ids:
            tagged.append(token)
            if token == self.video_token_id and next(clips, False):
                tagged.append(self.audio_token_id)
        return tagged

    def __call__(
        self,
        text: str | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        use_audio_in_video: bool = False,
        return_tensors: str = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Inputs of one prompt.

        Args:
            text: a prompt with tags, as ``apply_chat_template`` makes it; without it only media
                are converted.
            videos: clips, each uint8 ``[frames, height, width, 3]``.
            audio: waveforms, each float ``[samples]`` at `sampling_rate`.
            use_audio_in_video: waveform i is the sound of clip i; it has no tag in ``text``.

        Raises:
            ValueError: if tags and media do not belong together.
        """
        data: dict[str, Any] = {}
        videos, audio = listed(videos, dims=4), listed(audio, dims=1)
        if videos:
            data |= self.videos_to_tensors(videos)
        if audio:
            data |= self.audio_to_tensors(audio, of_video=use_audio_in_video)
        if text is not None:
            ids = self.tokenizer(text)["input_ids"]
            if use_audio_in_video:
                ids = self.add_sound_tags(ids, [True] * len(audio))
            self._check(ids, len(videos), len(audio))
            ids = self.expand(ids)
            data |= {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        return BatchFeature(data, tensor_type=return_tensors)

    def _check(self, ids: Sequence[int], videos: int, audio: int) -> None:
        """Refuse prompts that the model class, which scatters by token id, would misread."""
        counts = Counter(ids)
        for tag, token, given, expected in (
            (VIDEO_TAG, self.video_token_id, videos, self.config.video_token_id),
            (AUDIO_TAG, self.audio_token_id, audio, self.config.audio_token_id),
        ):
            if counts[token] != given:
                raise ValueError(
                    f"The text has {counts[token]} {tag} tags for {given} of them; give one tag "
                    "for every clip and every sound."
                )
            if given and token != expected:
                name = tag.strip("<>") + "_token_id"
                raise ValueError(
                    f"The tokenizer's id of {tag} is {token}, the configuration's {name} is "
                    f"{expected}; set {name} in config.json to {token}."
                )


def listed(media: Any, dims: int) -> list[Any]:
    """A list of media from a list, one medium, or nothing."""
    if media is None:
        return []
    one = getattr(media, "ndim", None) == dims
    return [media] if one else list(media)


def frames_of(video: Any) -> npt.NDArray[np.uint8]:
    """uint8 ``[frames, height, width, 3]`` of a clip given as array, tensor or list of pictures.

    Raises:
        ValueError: for anything else.
    """
    if hasattr(video, "cpu"):
        video = video.cpu()
    if isinstance(video, list) and video and hasattr(video[0], "convert"):  # PIL's
        video = [picture.convert("RGB") for picture in video]
    frames = np.asarray(video)
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(
            f"A clip is {frames.dtype} {list(frames.shape)}; expected uint8 [frames, height, "
            "width, 3] with one frame or more."
        )
    return frames
