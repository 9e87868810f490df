# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation, svg or png by the name of the file; equal lines make equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_acckv.config import KVPolicyError
from vllm_acckv.evaluation.metrics import Interval
from vllm_acckv.evaluation.report import Line

# Okabe and Ito's colours, which people with any colour vision tell apart; markers for grey paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
VIDEO, AUDIO, TEXT = "#009E73", "#CC79A7", "#999999"
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":")
_NAMES = {"exact": "exact match", "rouge_l": "ROUGE-L", "rouge_1": "ROUGE-1"}


def quality(lines: Sequence[Line], path: Path, metric: str = "exact") -> None:
    """A metric with its intervals over the budget, a line for each policy with equal settings; the
    full cache is a band.

    Args:
        path: written anew.

    Raises:
        KVPolicyError: if no line has a budget, or some are ratios and some are numbers of tokens.
        ModuleNotFoundError: without matplotlib.
    """
    curves = _curves(lines, "budget", {line.arm: line.metrics[metric] for line in lines})
    figure, axes = _figure()
    if full := next((line for line in lines if line.arm == "full"), None):
        mean, low, high = full.metrics[metric]
        axes.axhspan(low, high, color="#dddddd", linewidth=0)
        axes.axhline(mean, color="#666666", linewidth=1.2, label="full")
    _draw(axes, curves)
    axes.set_xlabel(_budget_label(curves))
    axes.set_ylabel(f"{_NAMES.get(metric, metric)}, 95 % interval")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def weights(lines: Sequence[Line], path: Path) -> None:
    """W of the video in each layer (eq. 4), a line for each arm that weighs modalities; arms with
    the same weights share one, because budget and threshold do not change them.

    Raises:
        KVPolicyError: if none does.
        ModuleNotFoundError: without matplotlib.
    """
    curves: dict[tuple[float, ...], list[str]] = {}
    for line in lines:
        if line.video_weight:
            curves.setdefault(line.video_weight, []).append(line.arm)
    if not curves:
        raise KVPolicyError("No arm weighs modalities; one of acckv or position_prior does.")
    figure, axes = _figure()
    axes.axhline(0.5, color="#666666", linewidth=0.8)
    for number, (values, (first, *others)) in enumerate(curves.items()):
        label = f"{first} and {len(others)} more" if others else first
        axes.plot(range(len(values)), values, label=label, **_style(number))
    axes.set_xlabel("layer")
    axes.set_ylabel("W of video, 1 - W of audio")
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def rejected(lines: Sequence[Line], path: Path) -> None:
    """Share of the tokens looked at that AccKV's filter dropped, over its threshold, a line for
    each budget and other settings.

    Raises:
        KVPolicyError: if no line has a filter and says its threshold.
        ModuleNotFoundError: without matplotlib.
    """
    shares = {line.arm: line.rejected for line in lines if line.rejected is not None}
    curves = _curves(
        lines, "tau", {arm: Interval(share, share, share) for arm, share in shares.items()}
    )
    figure, axes = _figure()
    _draw(axes, curves)
    axes.set_xlabel("threshold τ")
    axes.set_ylabel("share evicted by the filter")
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def attention(groups: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Where the trailing text looks (the paper's figure 1): for each group of questions the shares
    of the modalities by layer, and a map of tokens.

    Args:
        groups: what :func:`vllm_acckv.evaluation.figure1.average` returns.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    figure = _new(10, 3 * len(groups))
    grid = figure.subplots(len(groups), 2, squeeze=False, width_ratios=[2, 3])
    for (name, group), (left, right) in zip(groups.items(), grid, strict=True):
        _shares(left, group["shares"])
        left.set_title(f"{name}, {group['samples']} prompts", fontsize=9)
        _map(figure, right, group["tokens"])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("layer" if axes is grid[-1][0] else "audio-video tokens, in equal parts")
    _save(figure, path)


def _shares(axes: Any, shares: Mapping[str, Sequence[float]]) -> None:
    """Stacked bars, one for each layer."""
    base = np.zeros(len(shares["text"]))
    for name, colour in (("video", VIDEO), ("audio", AUDIO), ("text", TEXT)):
        values = np.array(shares[name])
        axes.bar(range(len(base)), values, bottom=base, color=colour, label=name)
        base += values
    axes.set_ylabel("share of attention")
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _map(figure: Any, axes: Any, tokens: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Attention of a token by layer, each layer's largest as 1; the modalities side by side."""
    present = {name: np.array(tokens[name]) for name in ("video", "audio") if len(tokens[name])}
    values = np.concatenate([*present.values()], axis=1)
    largest = values.max(1, keepdims=True)
    shown = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    image = axes.imshow(shown, aspect="auto", cmap="Blues", origin="lower", vmin=0, vmax=1)
    edge = 0
    for name, part in present.items():
        colour = VIDEO if name == "video" else AUDIO
        axes.axvspan(edge - 0.5, edge + part.shape[1] - 0.5, ymin=0.97, color=colour, linewidth=0)
        axes.annotate(name, (edge, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
        edge += part.shape[1]
    axes.set_ylabel("layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="attention / largest of the layer")


# Curves


def _curves(
    lines: Sequence[Line], option: str, values: Mapping[str, Interval]
) -> dict[str, list[tuple[float, Interval]]]:
    """Points by an option of the arm, for each other setting of it, in rising order."""
    curves: dict[str, list[tuple[float, Interval]]] = {}
    for line in lines:
        parts = line.arm.split()
        found = [part for part in parts if part.startswith(f"{option}=")]
        if found and line.arm in values:
            rest = " ".join(part for part in parts if part not in found)
            point = (float(found[0].partition("=")[2]), values[line.arm])
            curves.setdefault(rest, []).append(point)
    if not curves:
        raise KVPolicyError(f"No arm to be drawn says its {option}.")
    return {name: sorted(points) for name, points in curves.items()}


def _budget_label(curves: Mapping[str, Sequence[tuple[float, Interval]]]) -> str:
    ratios = {budget <= 1 for points in curves.values() for budget, _ in points}
    if len(ratios) > 1:
        raise KVPolicyError("Some budgets are ratios and some numbers of tokens; draw them apart.")
    return "budget, share of tokens" if ratios == {True} else "budget, tokens"


def _draw(axes: Any, curves: Mapping[str, Sequence[tuple[float, Interval]]]) -> None:
    """Lines with bars for intervals, moved a little aside so that they do not hide each other."""
    places = [place for points in curves.values() for place, _ in points]
    axes.set_xticks(sorted(set(places)))
    aside = 0.006 * (max(places) - min(places) or max(places))
    for number, (name, points) in enumerate(curves.items()):
        shift = aside * (number - (len(curves) - 1) / 2)
        x = [place + shift for place, _ in points]
        mean, low, high = np.array([interval for _, interval in points]).T
        style = _style(number)
        axes.errorbar(x, mean, np.abs([mean - low, high - mean]), label=name, capsize=2, **style)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(COLOURS) % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.2,
    }


# Files


def _new(width: float, height: float) -> Any:
    """A figure, in inches. Without pyplot: nothing is shown, and no display is asked for."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Pictures need the package matplotlib: pip install 'vllm-acckv[eval]'."
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure() -> tuple[Any, Any]:
    figure = _new(8, 4.2)
    axes = figure.subplots()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """Without date and version; in svg, text is text and names are not random."""
    from matplotlib import rc_context

    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vllm-acckv"}):
        figure.savefig(path, metadata=metadata, dpi=150)
