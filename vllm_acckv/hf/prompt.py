# SPDX-License-Identifier: Apache-2.0
"""What a forward call says about its prompt: padding, modalities, rotary angles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_acckv.rotary import rotate
from vllm_acckv.spans import AUDIO, TEXT, VIDEO, Modalities


def left_padding(attention_mask: Any, length: int) -> int:
    """Tokens at the left that are padding.

    Args:
        attention_mask: the decoder's argument: ``[1, length]``, ``None``, or what ``generate``
            prepares per kind of attention, if that is ``None`` throughout.

    Raises:
        ValueError: for other masks, whose attention could not be observed.
    """
    if isinstance(attention_mask, dict) and all(one is None for one in attention_mask.values()):
        return 0
    if attention_mask is None:
        return 0
    shape = list(getattr(attention_mask, "shape", []))
    if shape != [1, length]:
        form = shape or type(attention_mask).__name__
        raise ValueError(f"attention_mask of the prompt is {form}; expected [1, {length}].")
    visible = attention_mask[0].bool()
    padding = length - int(visible.sum())
    if bool(visible[:padding].any()):
        raise ValueError(
            f"attention_mask hides {padding} tokens, but not the first {padding}; expected padding "
            "at the left only."
        )
    return padding


def given_modalities(modality: Any, length: int, padding: int) -> Modalities:
    """``modality=`` of the user without its left padding, int8 ``[length - padding]``.

    Raises:
        ValueError: if it does not fit the prompt.
    """
    values = torch.as_tensor(modality).cpu()
    if values.dim() != 1 or values.is_floating_point() or len(values) != length:
        raise ValueError(
            f"modality is {str(values.dtype).removeprefix('torch.')} {list(values.shape)}; the "
            f"prompt needs int8 [{length}]."
        )
    values = values[padding:]
    outside = values[(values < TEXT) | (values > AUDIO)]
    if len(outside):
        raise ValueError(
            f"modality holds {int(outside[0])}; expected 0 text, 1 video, 2 audio for every token "
            "that is not left padding."
        )
    modalities: Modalities = values.to(torch.int8).numpy()
    return modalities


def modalities_of(
    input_ids: Any, config: Any, image_as: str, length: int, padding: int
) -> Modalities:
    """Modalities by the placeholder tokens that ``config`` names, int8 ``[length - padding]``.

    Raises:
        ValueError: without ids or names; the user must say what the prompt consists of.
    """
    tokens = {
        kind: next((token for token in found if token is not None), None)
        for kind in ("image", "video", "audio")
        if (found := [getattr(config, f"{kind}_token_{end}", None) for end in ("id", "index")])
    }
    problem = None
    if not isinstance(input_ids, torch.Tensor):
        problem = "the call has no input_ids"
    elif input_ids.shape[-1] != length:
        problem = f"the call has {input_ids.shape[-1]} input_ids for {length} embeddings"
    elif all(token is None for token in tokens.values()):
        problem = f"{type(config).__name__} names no token of audio, video or images"
    if problem is not None:
        raise ValueError(
            f"The prompt's modalities are unknown, because {problem}; pass modality=, int8 "
            f"[{length}] of 0 text, 1 video, 2 audio."
        )
    ids = input_ids[0, padding:].cpu().numpy()
    modalities = np.zeros(len(ids), dtype=np.int8)
    codes = {"image": VIDEO if image_as == "video" else TEXT, "video": VIDEO, "audio": AUDIO}
    for kind, token in tokens.items():
        if token is not None:
            modalities[ids == token] = codes[kind]
    return modalities


def rotary_angles(
    rotary: Any,
    position_ids: torch.Tensor,
    embeddings: tuple[torch.Tensor, torch.Tensor],
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None,
    width: int,
) -> torch.Tensor:
    """Angles by which the prompt's keys were rotated, whole turns included.

    Args:
        rotary: the decoder's rotary embedding after its forward call.
        position_ids: ``[1, l]``, or ``[3, 1, l]`` with M-RoPE.
        embeddings: cosines and sines that the call returned.
        apply: the model's ``apply_rotary_pos_emb``, ``None`` if it has none.
        width: d of the keys.

    Returns:
        fp32 ``[l, width/2]``.

    Raises:
        ValueError: if they do not reproduce the model's own rotation.
    """
    device = embeddings[0].device
    frequency, position_ids = rotary.inv_freq.float().to(device), position_ids.to(device)
    if position_ids.dim() == 2:
        candidates = [position_ids[0, :, None].float() * frequency]
    else:
        positions = position_ids.expand(3, -1, -1)[:, 0].float()
        candidates = [
            positions[axis].T * frequency for axis in _axes(rotary) if len(axis) == len(frequency)
        ]
    probe = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(device)
    probe = probe.expand(1, 1, position_ids.shape[-1], width)
    expected = _applied(apply, probe, embeddings)
    scale = float(getattr(rotary, "attention_scaling", 1.0))
    for angles in candidates:
        # Half-precision cosines are off by a few thousandths; another layout by much more.
        if expected is not None and torch.allclose(
            rotate(probe, angles) * scale, expected, atol=0.1
        ):
            return angles
    raise ValueError(
        f"The rotation by {type(rotary).__name__} is not understood, but the policy's settings "
        "look at keys before it; choose settings that do not."
    )


def _applied(
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None,
    key: torch.Tensor,
    embeddings: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor | None:
    """``key`` rotated by the model, ``None`` where its function takes other arguments."""
    try:
        return None if apply is None else apply(key, key, *(part.float() for part in embeddings))[1]
    except (TypeError, RuntimeError):
        return None


def _axes(rotary: Any) -> list[list[int]]:
    """Axis of every frequency under M-RoPE, ``[R/2]``: in sections, or interleaved."""
    config = getattr(rotary, "config", None)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    section = getattr(rotary, "mrope_section", None) or (parameters or {}).get("mrope_section")
    if section is None or len(section) < 3:
        return []
    sections = [part % 3 for part, count in enumerate(section) for _ in range(count)]
    interleaved = [
        channel % 3 if channel < 3 * section[channel % 3] else 0 for channel in range(sum(section))
    ]
    return [sections, interleaved]
