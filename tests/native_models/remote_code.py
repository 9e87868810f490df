# SPDX-License-Identifier: Apache-2.0
"""What the tiny MiniCPM-o and MiMo-V2 carry in place of their publishers' remote code.

vLLM 0.32 has the models and the processors, but takes from the checkpoint the configuration and
MiniCPM-o's image processor. Copied into the checkpoints as it is.
"""

import numpy as np
import torch
from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig, WhisperConfig
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from vllm.transformers_utils.processors.minicpmo import MiniCPMOProcessor  # noqa: F401


class MiniCPMOConfig(Qwen2Config):
    model_type = "minicpmo"

    def __init__(self, vision_config=None, audio_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = SiglipVisionConfig(**vision_config or {})
        self.audio_config = WhisperConfig(**audio_config or {})


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Pictures of whole patches, never resized or cut into slices."""

    def __init__(self, patch_size=14, image_feature_size=64, max_slice_nums=1, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.image_feature_size = image_feature_size
        self.max_slice_nums = max_slice_nums

    def get_sliced_grid(self, image_size, max_slice_nums):
        return None

    def get_slice_image_placeholder(self, image_size, *_, **__):
        return f"<image>{'<unk>' * self.image_feature_size}</image>"

    def __call__(self, images, **_):
        """Of every request and picture (uint8 ``[H, W, 3]``): patches side by side, float32
        ``[3, p, H * W / p]``; its width and height; its rows and columns of patches."""
        side = self.patch_size
        requests = [[torch.as_tensor(np.asarray(one)) for one in pictures] for pictures in images]
        sizes = [[(one.shape[1], one.shape[0]) for one in pictures] for pictures in requests]
        return BatchFeature(
            {
                "pixel_values": [[self._patches(one) for one in pictures] for pictures in requests],
                "image_sizes": sizes,
                "tgt_sizes": [
                    torch.tensor([[height // side, width // side] for width, height in pictures])
                    for pictures in sizes
                ],
            }
        )

    def _patches(self, picture):
        rows = picture.permute(2, 0, 1).float().div(255).unflatten(1, (-1, self.patch_size))
        return rows.transpose(1, 2).flatten(2)


class MiMoV2Config(PreTrainedConfig):
    model_type = "mimo_v2"
