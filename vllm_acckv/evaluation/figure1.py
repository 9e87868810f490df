# SPDX-License-Identifier: Apache-2.0
"""Where the text behind a clip looks, by layer and modality (figure 1 of the AccKV paper).

The paper claims that in high layers attention goes to video whatever the task. What is measured is
what AccKV scores by: the trailing text's attention, here before eq. 1, mean over heads and rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic
import torch

from vllm_acckv.evaluation import plots
from vllm_acckv.evaluation.presets import need
from vllm_acckv.hf import kv_policy
from vllm_acckv.policies.base import Layer, Policy, Prompt
from vllm_acckv.selection import Selection, select_best
from vllm_acckv.spans import MODALITY_NAMES, Layout
from vllm_acckv.states import States

PARTS = 100
"""Most parts that a modality's tokens are averaged in, so that clips of different length fit."""


@dataclass(frozen=True, eq=False)
class Observed:
    """Attention of one prompt's trailing text.

    Attributes:
        modality: int8 ``[l]``.
        tokens: ``[layers, l]``, mean over rows and heads; each layer sums to 1.
    """

    modality: np.ndarray
    tokens: np.ndarray

    def of(self, code: int) -> np.ndarray:
        """Attention to the tokens of a modality, ``[layers, n]``."""
        return self.tokens[:, self.modality == code]


class _Observer(Policy):
    """Keep everything, and remember the scores of every layer."""

    name: ClassVar[str] = "observer"

    _seen: list[tuple[Layout, torch.Tensor]] = pydantic.PrivateAttr(default_factory=list)

    def entries(self, layout: Layout, layer: Layer) -> int:
        return layout.length

    def keeps_all(self, layout: Layout, layer: Layer) -> bool:
        return False  # or nobody would ask

    def needs_trailing_text(self, layout: Layout) -> bool:
        return True

    def first_query(self, layout: Layout) -> int:
        return layout.text_start

    def select(
        self,
        scores: torch.Tensor,
        states: States,
        prompt: Prompt,
        layer: Layer,
    ) -> Selection:
        mean = scores.mean(0, keepdim=True)
        self._seen.append((prompt.layout, mean[0].cpu() / prompt.layout.trailing_text))
        return select_best(mean, prompt.layout.length)


def observe(model: torch.nn.Module, inputs: Mapping[str, Any], modality: Any = None) -> Observed:
    """Run one prompt and see where its trailing text looks.

    Args:
        model: of transformers, as :func:`vllm_acckv.hf.kv_policy` takes it.
        inputs: of its forward call, prepared: ``input_ids`` ``[1, l]``, features and so on.
        modality: as for :func:`vllm_acckv.hf.kv_policy`.

    Raises:
        ValueError: for a prompt without a clip, or without text behind it.
    """
    policy = _Observer()
    with torch.inference_mode(), kv_policy(model, policy, modality) as run:
        model(**inputs, use_cache=True, logits_to_keep=1)
    if run.skipped is not None:
        raise ValueError(f"The prompt cannot be observed: {run.skipped}.")
    layouts, scores = zip(*policy._seen, strict=True)
    return Observed(layouts[0].modalities, torch.stack(scores).double().numpy())


def average(observed: Sequence[Observed]) -> dict[str, Any]:
    """Means over prompts, in the form of JSON.

    Returns:
        ``samples``, how many; by modality and layer ``shares``, attention to all its tokens, which
        sums to 1 over modalities, and ``per_token``, attention to one of them; for video and audio
        ``tokens``, attention to one token in up to :data:`PARTS` equal parts of the modality, by
        layer. The latter two are means over prompts that have the modality, empty if none has.
    """
    by_name = {name: [one.of(code) for one in observed] for code, name in MODALITY_NAMES.items()}
    having = {name: [one for one in found if one.shape[1]] for name, found in by_name.items()}
    return {
        "samples": len(observed),
        "shares": {name: _mean([one.sum(1) for one in found]) for name, found in by_name.items()},
        "per_token": {
            name: _mean([one.mean(1) for one in found]) for name, found in having.items()
        },
        "tokens": {name: _parts(having[name]) for name in ("video", "audio")},
    }


def _mean(values: Sequence[np.ndarray]) -> list[Any]:
    """Over prompts, as lists; empty without any."""
    found: list[Any] = np.mean(values, axis=0).tolist() if values else []
    return found


def _parts(attention: Sequence[np.ndarray]) -> list[list[float]]:
    """Mean over prompts of ``[layers, n]``, n differing, in equal parts: ``[layers][parts]``."""
    parts = min([PARTS, *(one.shape[1] for one in attention)])
    return _mean(
        [
            np.stack([part.mean(1) for part in np.array_split(one, parts, axis=1)], axis=1)
            for one in attention
        ]
    )


def measure(
    model: torch.nn.Module,
    prompts: Iterable[tuple[str, Mapping[str, Any]]],
    output: Path,
    modality: Any = None,
) -> dict[str, Any]:
    """Observe prompts, and write ``figure1.json`` and ``figure1.svg`` into ``output``.

    Args:
        prompts: task, such as ``tiny-av/see``, and inputs as for :func:`observe`. Tasks of tiny-av
            are grouped by what they need, others are a group each.

    Returns:
        :func:`average` by group.

    Raises:
        ValueError: without prompts, and as :func:`observe`.
        ModuleNotFoundError: without matplotlib.
    """
    seen: dict[str, list[Observed]] = {}
    for task, inputs in prompts:
        seen.setdefault(need(task), []).append(observe(model, inputs, modality))
    if not seen:
        raise ValueError("There are no prompts to observe.")
    groups = {name: average(seen[name]) for name in sorted(seen)}
    output.mkdir(parents=True, exist_ok=True)
    (output / "figure1.json").write_text(json.dumps(groups, indent=1) + "\n")
    plots.attention(groups, output / "figure1.svg")
    return groups


def markdown(groups: Mapping[str, Mapping[str, Any]], model: str, data: str) -> str:
    """Shares of attention by layer, of :func:`measure`."""
    rows = [["questions that need", "layer", "video", "audio", "text", "video per token / audio"]]
    rows.append(["---"] * 6)
    for name, group in groups.items():
        shares, each = group["shares"], group["per_token"]
        for layer in range(len(shares["text"])):
            told = [f"{shares[kind][layer]:.3f}" for kind in ("video", "audio", "text")]
            ratio = "-"
            if each["video"] and each["audio"] and each["audio"][layer]:
                ratio = f"{each['video'][layer] / each['audio'][layer]:.2f}"
            rows.append([f"{name} ({group['samples']})", str(layer), *told, ratio])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"## Figure 1: attention of the trailing text\n\n{table}\n\n"
        f"* Ours: {model} on {data}.\n"
        "* Paper: VideoLLaMA2; attention goes to video in high layers, whatever the question.\n"
    )
