# SPDX-License-Identifier: Apache-2.0
"""``policy.compress``: one layer of one prompt, tensors in, tensors out, no engine.

Here, and only here, arguments are checked and counts are read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_acckv.policies.base import Compacted, Layer, Prompt
from vllm_acckv.scores import observed_attention
from vllm_acckv.selection import Kept, Selection
from vllm_acckv.spans import AUDIO, MODALITY_NAMES, TEXT, VIDEO, Layout

if TYPE_CHECKING:
    from vllm_acckv.policies.base import Policy

MODALITIES = (TEXT, VIDEO, AUDIO)


@dataclass(frozen=True)
class Stats:
    """What happened to a layer. Token counts are means over KV heads, by modality name.

    Attributes:
        video_weight, audio_weight: W of AccKV's eq. 4, ``None`` for policies without it.
        kept: tokens that stay, in place of which nothing else stands.
        merged: dropped tokens that live on inside another entry.
        evicted: tokens that are gone.
        merged_entries: entries that stand for merged tokens alone.
        filtered: heavy hitters of the low-priority modality that AccKV's similarity filter looked
            at, summed over selections; ``None`` where it did not run.
        rejected: those of them that it dropped (eq. 17).
    """

    video_weight: float | None
    audio_weight: float | None
    kept: dict[str, float]
    merged: dict[str, float]
    evicted: dict[str, float]
    merged_entries: float
    filtered: int | None
    rejected: int

    @property
    def rejected_share(self) -> float | None:
        """Of what the filter looked at, what it dropped; ``None`` where it did not run."""
        return None if self.filtered is None else self.rejected / max(1, self.filtered)


@dataclass(frozen=True)
class Compressed:
    """The result of :func:`compress`.

    Attributes:
        keys, values: ``[G, L, d]`` in the dtype of the input.
        positions: int64 ``[1, L]`` if all heads keep the same tokens, else ``[G, L]``; position
            of each entry in the prompt, -1 for merged entries.
        stats: counts.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    stats: Stats


@torch.no_grad()
def compress(
    policy: Policy,
    queries: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    modality: torch.Tensor,
    *,
    scores: torch.Tensor | None = None,
    layer: int = 0,
    num_layers: int = 1,
    scale: float | None = None,
    angles: torch.Tensor | None = None,
    block_size: int | None = None,
) -> Compressed:
    """Compress the cache of one layer of one prompt.

    Args:
        policy: from :func:`vllm_acckv.policies.make_policy`.
        queries: ``[H, n, d]`` queries of the prompt's last ``n`` tokens, after rotary embedding,
            of the layer :meth:`Policy.score_layer`; at least those from
            :meth:`Policy.first_query` on. AccKV observes the trailing text, SnapKV its window,
            H2O every token. ``None`` for policies that observe nothing, and with ``scores``.
        keys, values: ``[G, l, d]`` cached keys (after rotary embedding) and values; ``H`` is a
            multiple of ``G``.
        modality: int8 ``[l]`` of 0 text, 1 video, 2 audio; -1 for left padding, which is dropped
            and counts nowhere.
        scores: fp32 ``[G, l]`` attention observed already, in place of ``queries``; sums of
            :func:`vllm_acckv.scores.observed_attention`, such as H2O's accumulated scores.
        layer, num_layers: which layer this is, for policies that treat layers differently.
        scale: softmax scale, ``d ** -0.5`` if not given.
        angles: fp32 ``[l, R/2]`` rotary angles, for policies with :attr:`Policy.needs_angles`.
        block_size: fill up to whole blocks with the next best tokens and leave a layer that would
            free less than a block as it is, as vLLM does. Without it exactly the selected entries
            come back.

    Raises:
        ValueError: naming an argument that does not fit, its value and what was expected.
    """
    _check_shapes(keys, values, modality)
    padding = int((modality < 0).sum())
    _check_modality(modality, padding)
    keys, values, modality = keys[:, padding:], values[:, padding:], modality[padding:]
    for name, states in (("keys", keys), ("values", values)):
        if not bool(states.isfinite().all()):
            raise ValueError(f"{name} hold NaN or infinity; expected finite numbers only.")
    layout = Layout(modality.to("cpu", torch.int8).numpy())
    _check_layer(policy, layer, num_layers)
    if block_size is not None and not (isinstance(block_size, int) and block_size >= 1):
        raise ValueError(f"block_size is {block_size}; expected a whole number from 1 on.")
    angles = _checked_angles(policy, angles, padding, layout, keys.shape[2])
    where = Layer(layer, num_layers)
    if not layout.av or _too_little(policy, layout, where, block_size):
        return untouched(keys, values, layout, padding)
    if policy.needs_trailing_text(layout) and not layout.trailing_text:
        raise ValueError(
            f"modality has no text after its last audio-video token, position "
            f"{layout.length - 1 + padding}; expected the text rows that {policy.name} observes."
        )
    if scores is not None:
        observed = _checked_scores(scores, keys, padding)
    else:
        observed = _observed(policy, queries, keys, layout, scale)
    if not bool(observed.isfinite().all()):
        what = "queries" if scores is None else "scores"
        raise ValueError(f"{what} hold NaN or infinity; expected finite numbers only.")
    prompt = Prompt.of(layout, keys.device, angles)
    done = policy.compact(observed, keys, values, prompt, where, block_size or 1)
    return _result(done, layout, padding)


def _check_shapes(keys: torch.Tensor, values: torch.Tensor, modality: torch.Tensor) -> None:
    for name, argument in (("keys", keys), ("values", values), ("modality", modality)):
        if not isinstance(argument, torch.Tensor):
            raise ValueError(f"{name} is a {type(argument).__name__}; expected a tensor.")
    if keys.dim() != 3 or not keys.is_floating_point() or 0 in (keys.shape[0], keys.shape[2]):
        raise ValueError(f"keys are {_form(keys)}; expected floating-point [G, l, d].")
    if values.dim() != 3 or values.shape[:2] != keys.shape[:2] or values.dtype != keys.dtype:
        raise ValueError(
            f"values are {_form(values)}; expected [G, l, d] like keys, {_form(keys)}."
        )
    if modality.dim() != 1 or modality.dtype.is_floating_point or len(modality) != keys.shape[1]:
        raise ValueError(f"modality is {_form(modality)}; expected int8 [{keys.shape[1]}].")


def _check_modality(modality: torch.Tensor, padding: int) -> None:
    low, high = (int(modality.min()), int(modality.max())) if len(modality) else (0, 0)
    if low < -1 or high > AUDIO:
        raise ValueError(
            f"modality holds {low if low < -1 else high}; expected 0 text, 1 video, 2 audio or "
            "-1 for padding."
        )
    if bool((modality[padding:] < 0).any()):
        raise ValueError("modality has padding (-1) behind tokens; expected it at the left only.")


def _check_layer(policy: Policy, layer: int, num_layers: int) -> None:
    if not (isinstance(layer, int) and 0 <= layer < num_layers):
        raise ValueError(f"layer is {layer}; expected 0 to num_layers - 1 = {num_layers - 1}.")
    policy.check(num_layers)


def _checked_angles(
    policy: Policy, angles: torch.Tensor | None, padding: int, layout: Layout, width: int
) -> torch.Tensor | None:
    if not policy.needs_angles:
        return None
    length = layout.length + padding
    fits = angles is not None and angles.dim() == 2 and len(angles) == length
    if angles is None or not fits or 2 * angles.shape[1] > width:
        form = None if angles is None else _form(angles)
        raise ValueError(
            f"angles are {form}; {policy.name} with these settings expects [{length}, R/2], "
            f"R at most {width}."
        )
    return angles[padding:].float()


def _checked_scores(scores: torch.Tensor, keys: torch.Tensor, padding: int) -> torch.Tensor:
    expected = (keys.shape[0], keys.shape[1] + padding)
    if tuple(scores.shape) != expected or not scores.is_floating_point():
        raise ValueError(f"scores are {_form(scores)}; expected fp32 {list(expected)}.")
    return scores[:, padding:].float()


def _observed(
    policy: Policy,
    queries: torch.Tensor | None,
    keys: torch.Tensor,
    layout: Layout,
    scale: float | None,
) -> torch.Tensor:
    """Attention of the rows the policy observes, fp32 ``[G, l]``."""
    first = policy.first_query(layout)
    needed = layout.length - first
    if not needed:
        return keys.new_zeros(keys.shape[:2], dtype=torch.float32)
    groups, _, width = keys.shape
    fits = (
        queries is not None
        and queries.dim() == 3
        and queries.is_floating_point()
        and queries.shape[0] % groups == 0
        and queries.shape[1] >= needed
        and queries.shape[2] == width
    )
    if queries is None or not fits:
        form = None if queries is None else _form(queries)
        raise ValueError(
            f"queries are {form}; {policy.name} expects [H, n, {width}] of the last n >= {needed} "
            f"tokens, H a multiple of {groups}."
        )
    rows = queries[:, queries.shape[1] - needed :].movedim(0, 1)
    factor = width**-0.5 if scale is None else scale
    return observed_attention(rows, keys, first, factor, policy.weights(layout, keys.device))


def _too_little(policy: Policy, layout: Layout, layer: Layer, block_size: int | None) -> bool:
    if block_size is None:
        return False
    return layout.length - policy.entries(layout, layer) < block_size


def untouched(keys: torch.Tensor, values: torch.Tensor, layout: Layout, padding: int) -> Compressed:
    """A layer that keeps all ``l`` tokens of ``keys`` and ``values`` ``[G, l, d]``, which
    followed ``padding`` others."""
    all_kept = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
    positions = torch.arange(layout.length, device=keys.device).expand(keys.shape[:2])
    kept = Kept(0, layout.length, all_kept, None)
    everything = Selection(all_kept, positions, layout.length)
    return _result(Compacted(keys, values, positions, kept, everything), layout, padding)


def _result(done: Compacted, layout: Layout, padding: int) -> Compressed:
    positions = torch.where(done.positions < 0, -1, done.positions + padding)
    if bool((positions == positions[:1]).all()):
        positions = positions[:1]
    return Compressed(done.key, done.value, positions, _stats(done, layout))


def _stats(done: Compacted, layout: Layout) -> Stats:
    modality = torch.from_numpy(layout.modalities).to(done.key.device)
    kept, merged, evicted = (
        {MODALITY_NAMES[code]: count for code, count in enumerate(fate)}
        for fate in done.kept.fates(modality).tolist()
    )
    selection = done.selection
    weight, filtered, rejected = None, None, 0
    if selection.video_weight is not None:
        weight = float(selection.video_weight.mean())
    if selection.filtered is not None and selection.rejected is not None:
        filtered = int(selection.filtered.sum())
        rejected = int(selection.rejected.sum())
    entries = 0.0
    if done.kept.merged is not None:
        entries = float(done.kept.merged.valid.float().sum(1).mean())
    audio = None if weight is None else 1 - weight
    return Stats(weight, audio, kept, merged, evicted, entries, filtered, rejected)


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
