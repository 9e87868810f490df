# SPDX-License-Identifier: Apache-2.0
"""BEATs, the audio encoder of VideoLLaMA2.1-7B-AV: inference only, plain PyTorch.

A transformer over 16 x 16 patches of a Mel spectrogram. BEATs: https://arxiv.org/abs/2212.09058;
gated relative position bias: WavLM, https://arxiv.org/abs/2110.13900; scaled residuals: DeepNet,
https://arxiv.org/abs/2203.00555. Built like BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2 without
its classifier; modules bear the names of the published checkpoint.

There is no padding mask: VideoLLaMA2 pads the waveform with zeros and encodes them like sound.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What the spectrograms of AudioSet, the training data, were normalised with.
FBANK_MEAN, FBANK_STD = 15.41663, 6.55582

# Checkpoint keys to rename, or to skip (None), before they are looked up in named_parameters(), in
# the form of the argument orig_to_new_regex of vLLM's WeightsMapper. All layers use one table of
# position biases. It is a parameter of layer 0 here; a file may repeat it for every layer.
CHECKPOINT_KEYS: dict[re.Pattern[str], str | None] = {
    re.compile(r"(^|\.)predictor\."): None,
    re.compile(r"(layers\.)\d+(\.self_attn\.relative_attention_bias\.)"): r"\g<1>0\g<2>",
}


@dataclass(frozen=True)
class BeatsConfig:
    """Sizes; the defaults are the published model's."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 16
    patch_channels: int = 512
    mel_bins: int = 128
    conv_positions: int = 128
    conv_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800

    def num_tokens(self, frames: int) -> int:
        """Tokens of a spectrogram; frames that do not fill a patch are dropped."""
        return (frames // self.patch_size) * (self.mel_bins // self.patch_size)


class Beats(nn.Module):
    """Spectrogram to one embedding per patch."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        patch, channels = config.patch_size, config.patch_channels
        self.patch_embedding = nn.Conv2d(1, channels, patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(channels)
        self.post_extract_proj = nn.Linear(channels, config.hidden_size)
        self.encoder = Encoder(config)

    def forward(self, fbank: Tensor) -> Tensor:
        """Encode Kaldi filter banks of a waveform in the range of 16-bit integers.

        Args:
            fbank: ``[batch, frames, mel_bins]``, logarithmic, not normalised.

        Returns:
            ``[batch, tokens, hidden_size]`` in the dtype of the weights, time-major: the
            ``mel_bins / patch_size`` patches of one time step are neighbours.
        """
        normalised = (fbank.float() - FBANK_MEAN) / (2 * FBANK_STD)
        patches = self.patch_embedding(normalised.to(self.patch_embedding.weight.dtype)[:, None])
        patches = self.layer_norm(patches.flatten(2).transpose(1, 2))
        return self.encoder(self.post_extract_proj(patches))


class Encoder(nn.Module):
    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.pos_conv = nn.Sequential(PositionConv(config), nn.GELU())
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        layers = [EncoderLayer(config) for _ in range(config.num_layers)]
        layers[0].self_attn.relative_attention_bias = nn.Embedding(
            config.num_buckets, config.num_heads
        )
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, hidden_size]`` to the same."""
        x = self.layer_norm(x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        bias = self.position_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def position_bias(self, tokens: int) -> Tensor:
        """``[heads, queries, keys]``: what each head adds for the offset of key from query."""
        table = self.get_parameter("layers.0.self_attn.relative_attention_bias.weight")
        buckets = offset_buckets(tokens, self.num_buckets, self.max_distance)
        # [heads, 2 * tokens - 1]; the row of query i is the window that begins at offset -i.
        by_offset = F.embedding(buckets.to(table.device), table).T
        return by_offset.unfold(1, tokens, 1).flip(1)


def offset_buckets(tokens: int, num_buckets: int, max_distance: int) -> Tensor:
    """Rows of the bias table for the offsets ``1 - tokens`` ... ``tokens - 1``, int64.

    T5's scheme: one half of the table for keys after the query, and of each half one half for
    exact distances, the other for logarithmic steps up to `max_distance` and beyond.

    Computed on the CPU, as by the authors: elsewhere the logarithm may round into another bucket.
    """
    offset = torch.arange(1 - tokens, tokens, device="cpu")
    distance = offset.abs()
    half, exact = num_buckets // 2, num_buckets // 4
    # Every distance is at least 1 here; 0 is among the exact ones.
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (steps * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class PositionConv(nn.Module):
    """Convolution over tokens whose kernel is normalised per tap.

    `torch.nn.utils.parametrizations.weight_norm` computes the same under other parameter names.
    """

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        hidden, self.groups = config.hidden_size, config.conv_groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, config.conv_positions))
        self.weight_v = nn.Parameter(
            torch.randn(hidden, hidden // self.groups, config.conv_positions)
        )
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, hidden_size, tokens]`` to the same."""
        v = self.weight_v.float()  # its sums of squares may exceed fp16's range
        # The epsilon is VideoLLaMA2's.
        unit = v * torch.rsqrt(v.square().sum((0, 1), keepdim=True) + 1e-6)
        kernel, padding = self.weight_g * unit.to(x.dtype), unit.shape[2] // 2
        out = F.conv1d(x, kernel, self.bias, padding=padding, groups=self.groups)
        return out[..., : x.shape[2]]  # an even kernel yields one token too many


class EncoderLayer(nn.Module):
    """Attention and MLP, each followed by a LayerNorm over its output and the scaled residual."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.residual_scale = (2 * config.num_layers) ** 0.25
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, hidden)
        self.final_layer_norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x * self.residual_scale + self.self_attn(x, bias))
        return self.final_layer_norm(x * self.residual_scale + self.fc2(F.gelu(self.fc1(x))))


class Attention(nn.Module):
    """Full attention. The query decides, per head and token, how much position counts."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.num_heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)
        self.grep_linear = nn.Linear(hidden // self.num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """
        Args:
            x: ``[batch, tokens, hidden_size]``.
            bias: ``[heads, tokens, tokens]``, the same for all layers.
        """
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1, keepdim=True).sigmoid()
        update, reset = gates.unbind(-2)  # [batch, heads, tokens, 1] each
        gate = update * (reset * self.grep_a - 1) + 2
        # The authors divide the logits by 32 before they subtract the maximum, for fp16's range;
        # softmax here runs in fp32 on every backend and needs neither.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=gate * bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))
