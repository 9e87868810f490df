# SPDX-License-Identifier: Apache-2.0
"""From the towers of VideoLLaMA2.1 to the decoder: STC connector v35 and audio projector.

The connector (arXiv 2406.07476, section 2.2) is a RegNet stage, a strided 3-D convolution, another
RegNet stage and an MLP.

Its RegNet-Y blocks (arXiv 2003.13678) have depthwise convolutions, SiLU and layer norms over
channels, as the original makes them with timm. Modules bear the names of the published checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm_acckv.models.videollama2.config import VideoLLaMA2Config

_DEPTH = 4
_SQUEEZE = 0.25  # of a block's input channels


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of ``[n, c, h, w]``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, then norm (called ``bn`` in the checkpoint, whatever it is)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = LayerNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.bn(self.conv(x))
        return normed


class SqueezeExcite(nn.Module):
    """Scale channels by what all positions hold together."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * scale.sigmoid()


class Bottleneck(nn.Module):
    """RegNet-Y block of bottleneck ratio 1 and group width 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, kernel=3, groups=outputs)
        self.se = SqueezeExcite(outputs, round(inputs * _SQUEEZE))
        self.conv3 = ConvNorm(outputs, outputs)
        self.downsample = ConvNorm(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(self.conv2(F.silu(self.conv1(x))))
        return F.silu(self.conv3(self.se(inner)) + self.downsample(x))


class Stage(nn.Sequential):
    """Blocks ``b1`` ... ``b4``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        for index in range(_DEPTH):
            self.add_module(f"b{index + 1}", Bottleneck(outputs if index else inputs, outputs))


class STCConnector(nn.Module):
    """``[n, t, h * w, c]`` to ``[n, (t // 2) * (h // 2) * (w // 2), hidden]``, time-major."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.s1 = Stage(channels, hidden)
        self.sampler = nn.Sequential(nn.Conv3d(hidden, hidden, 2, stride=2), nn.SiLU())
        self.s2 = Stage(hidden, hidden)
        self.readout = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        clips, frames, patches, channels = x.shape
        side = int(patches**0.5)
        x = x.reshape(clips * frames, side, side, channels).permute(0, 3, 1, 2)
        x = self.s1(x)
        x = self.sampler(x.unflatten(0, (clips, frames)).transpose(1, 2))
        steps = x.shape[2]
        x = self.s2(x.transpose(1, 2).flatten(0, 1))
        x = x.unflatten(0, (clips, steps)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        tokens: torch.Tensor = self.readout(x)
        return tokens


def audio_projector(config: VideoLLaMA2Config) -> nn.Sequential:
    """``mlp2x_gelu``: ``[..., mm_hidden_size_a]`` to ``[..., hidden_size]``."""
    hidden = config.hidden_size
    return nn.Sequential(
        nn.Linear(config.mm_hidden_size_a, hidden), nn.GELU(), nn.Linear(hidden, hidden)
    )
