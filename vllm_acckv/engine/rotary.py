# SPDX-License-Identifier: Apache-2.0
"""Rotary angles of prompt tokens, for policies that look at keys before rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.attention import Attention

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def angles_available(vllm_config: VllmConfig) -> bool:
    """Whether :class:`RotaryAngles` understands the model that was just built."""
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled():
        return False  # positions change after a batch is announced
    modules = list(rotary_embedding._ROPE_DICT.values())
    return bool(modules) and all(map(_is_understood, modules))


def _is_understood(rotary: Any) -> bool:
    return bool(getattr(rotary, "is_neox_style", False)) and hasattr(rotary, "cos_sin_cache")


class RotaryAngles:
    """Turns a request's positions into the angles its keys were rotated by.

    Args:
        rotary: the rotary embedding module of vLLM that the decoder layers use.
    """

    def __init__(self, rotary: Any) -> None:
        self._frequency = _frequencies(rotary.cos_sin_cache.float())
        self._axis = torch.zeros_like(self._frequency, dtype=torch.int64)
        section = getattr(rotary, "mrope_section", None)
        if section and getattr(rotary, "mrope_interleaved", False):
            channel = torch.arange(len(self._frequency), device=self._frequency.device)
            for axis in (1, 2):
                self._axis[(channel % 3 == axis) & (channel < section[axis] * 3)] = axis
        elif section:
            parts = self._axis.split(section)
            for axis, part in enumerate(parts):
                part.fill_(axis)

    @classmethod
    def of(cls, model: torch.nn.Module) -> RotaryAngles:
        """Angles of the decoder layers of ``model``."""
        layers = (name for name, one in model.named_modules() if isinstance(one, Attention))
        return cls(model.get_submodule(next(layers).rpartition(".")[0]).rotary_emb)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """fp32 ``[l, R/2]`` angles for positions ``[l]``, or ``[3, l]`` of a model with M-RoPE."""
        positions = positions.to(self._frequency.device)
        if positions.dim() == 1:
            return positions[:, None] * self._frequency
        return positions.T.contiguous()[:, self._axis] * self._frequency


def _frequencies(cache: torch.Tensor) -> torch.Tensor:
    """Radians per position ``[R/2]`` from vLLM's table of cosines and sines ``[positions, R]``.

    Reading them off the table is right for every scaling of the frequencies and whatever factor
    scales the amplitude. One step is at most one radian; larger steps then refine the value,
    because their whole turns are known from the smaller ones.
    """
    frequency = torch.zeros(cache.shape[1] // 2, dtype=torch.float64, device=cache.device)
    step = 1
    while step < len(cache):
        cos, sin = cache[step].double().chunk(2)
        error = torch.atan2(sin, cos) - frequency * step
        frequency += torch.remainder(error + torch.pi, 2 * torch.pi).sub(torch.pi) / step
        step *= 4
    return frequency.float()
