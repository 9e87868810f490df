# SPDX-License-Identifier: Apache-2.0
"""Configuration of VideoLLaMA2.1 checkpoints (``model_type`` ``videollama2_qwen2``).

The published file names its towers by where its authors kept them. Nothing is loaded from there:
their sizes are built in, and a checkpoint may override them.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, SiglipVisionConfig

from vllm_acckv.models.beats import BeatsConfig

FRAMES = 16

# google/siglip-so400m-patch14-384
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@strict
class VideoLLaMA2Config(Qwen2Config):
    """Fields of the published file with the values of VideoLLaMA2.1-7B-AV, and three of ours.

    Attributes:
        num_frames: pictures that stand for a clip, T.
        vision_tower_config: overrides of SigLIP so400m/14@384.
        audio_tower_config: overrides of :class:`vllm_acckv.models.beats.BeatsConfig`.
        video_token_id, audio_token_id: what ``<|video|>`` and ``<|audio|>`` become in
            transformers. The published tokenizer has neither; these are the two ids behind its
            last one, which the embedding table has rows for.
    """

    model_type = "videollama2_qwen2"

    mm_vision_tower: str | None = "google/siglip-so400m-patch14-384"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "stc_connector_v35"
    mm_hidden_size: int = 1152
    mm_audio_tower: str | None = None
    mm_projector_a_type: str = "mlp2x_gelu"
    mm_hidden_size_a: int = 768
    num_frames: int = FRAMES

    vision_tower_config: dict[str, Any] | None = None
    audio_tower_config: dict[str, Any] | None = None
    video_token_id: int = 151646
    audio_token_id: int = 151647

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        expected = {
            "mm_projector_type": "stc_connector_v35",
            "mm_projector_a_type": "mlp2x_gelu",
            "mm_vision_select_feature": "patch",
            "num_frames": FRAMES,  # vLLM's loader of clips does not see this file
        }
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; only {value!r}, as in "
                    "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV, is supported."
                )
        tower = (self.mm_vision_tower or "").lower()
        if "clip" in tower and "siglip" not in tower:
            raise ValueError(
                f"mm_vision_tower is {self.mm_vision_tower!r}; only SigLIP towers, as in "
                "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV, are supported."
            )

    @property
    def vision_tower(self) -> SiglipVisionConfig:
        """SigLIP with as many layers as are used and without pooling head."""
        config = SiglipVisionConfig(**{**_SIGLIP, **(self.vision_tower_config or {})})
        # Hidden state 0 is in front of the first layer, so state -1 takes all layers.
        skipped = -1 - self.mm_vision_select_layer
        if not 0 <= skipped < config.num_hidden_layers:
            raise ValueError(
                f"mm_vision_select_layer is {self.mm_vision_select_layer}; expected a negative "
                f"index into the {config.num_hidden_layers} layers of the vision tower."
            )
        config.num_hidden_layers -= skipped
        config.vision_use_head = False
        return config

    @property
    def audio_tower(self) -> BeatsConfig | None:
        """BEATs, or ``None`` for a checkpoint without sound."""
        if self.mm_audio_tower is None and self.audio_tower_config is None:
            return None
        return BeatsConfig(**(self.audio_tower_config or {}))

    @property
    def video_tokens(self) -> int:
        """Tokens of one clip: the connector halves time, height and width."""
        vision = self.vision_tower
        side = vision.image_size // vision.patch_size
        return (self.num_frames // 2) * (side // 2) ** 2
