# SPDX-License-Identifier: Apache-2.0
"""The baselines written out loop by loop on the full attention matrix, for one layer.

Test oracle: slow on purpose, shares no code with the package. Arithmetic is float64.

Arguments: A [H, l, l] causal attention after softmax; K, V [G, l, d] after RoPE, query head h
reads KV head h // (H / G); modality [l] with 0 text, 1 video, 2 audio; capacity, the entries a
KV head may keep, at most l. Positions are sorted.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

TEXT, VIDEO, AUDIO = 0, 1, 2
Scores = list[list[float]]  # [G][l]
Merge = Literal["pivot", "average", "weighted", "none"]


@dataclass(frozen=True)
class Choice:
    """What every KV head keeps.

    `gap` is the least relative distance of a decision; under about 1e-5 a float32 implementation
    may rightly decide otherwise. Exact ties are no such decision: the lower position wins.
    """

    kept: list[list[int]]
    gap: float


@dataclass(frozen=True)
class Folded:
    """LOOK-M: what every KV head keeps, and the entries [L, d] after merging."""

    kept: list[list[int]]
    keys: list[Tensor]
    values: list[Tensor]
    gap: float


def full_attention(Q: Tensor, K: Tensor, scale: float) -> Tensor:
    """A for queries [H, l, d]."""
    num_heads, size, _ = Q.shape
    A = torch.zeros(num_heads, size, size, dtype=torch.float64)
    for h in range(num_heads):
        logits = Q[h].double() @ K[h * K.shape[0] // num_heads].double().T * scale
        for i in range(size):
            A[h, i, : i + 1] = logits[i, : i + 1].softmax(0)
    return A


def half_up(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def capacity_of(modality: list[int], budget: float, scope: str) -> int:
    """Entries a budget allows: audio-video tokens on top of all text, or all entries."""
    text = len(tokens_of(modality, TEXT))
    whole = len(modality) - text if scope == "av" else len(modality)
    # A float product, not a fraction: 0.1 * 25 has to be the tie that its user sees.
    count = math.floor(budget * whole + 0.5) if budget <= 1 else int(budget)
    return min(count, whole) + (text if scope == "av" else 0)


def tokens_of(modality: list[int], *kinds: int) -> list[int]:
    return [j for j, kind in enumerate(modality) if kind in kinds]


def column_sums(A: Tensor, groups: int, rows: Iterable[int]) -> Scores:
    """Per KV head the sum over rows of the mean over its query heads."""
    attention = A.double().tolist()
    share = len(attention) // groups
    sums = [[0.0] * A.shape[2] for _ in range(groups)]
    for i in rows:
        for h, head in enumerate(attention):
            for j, probability in enumerate(head[i]):
                sums[h // share][j] += probability / share
    return sums


def mean_over_heads(scores: Scores) -> list[float]:
    return [sum(column) / len(scores) for column in zip(*scores, strict=True)]


def top(scores: list[float], candidates: list[int], count: int) -> tuple[set[int], float]:
    """The `count` candidates of highest score, lowest position first, and how clear that is."""
    order = sorted(candidates, key=lambda j: (-scores[j], j))
    count = max(count, 0)
    chosen, rest = order[:count], order[count:]
    if not chosen or not rest or scores[chosen[-1]] == scores[rest[0]]:
        return set(chosen), math.inf
    return set(chosen), 1 - scores[rest[0]] / scores[chosen[-1]]


def pick(scores: Scores, fixed: set[int], candidates: list[int], count: int) -> Choice:
    """Per KV head the fixed tokens and the best `count` candidates."""
    kept, gaps = [], []
    for row in scores:
        chosen, gap = top(row, [j for j in candidates if j not in fixed], count)
        kept.append(sorted(fixed | chosen))
        gaps.append(gap)
    return Choice(kept, min(gaps))


def h2o(
    A: Tensor,
    groups: int,
    modality: list[int],
    capacity: int,
    recent_ratio: float = 0.5,
    normalize: bool = False,
    protect_text: bool = False,
) -> Choice:
    """Heavy hitters of all rows and the latest tokens; with `protect_text` both are audio-video
    tokens and all text stays on top."""
    size = len(modality)
    scores = column_sums(A, groups, range(size))
    if normalize:
        scores = [[s / (size - j) for j, s in enumerate(row)] for row in scores]
    text = set(tokens_of(modality, TEXT)) if protect_text else set()
    competing = [j for j in range(size) if j not in text]
    room = max(capacity - len(text), 0)
    recent = int(room * recent_ratio)
    latest = set(competing[len(competing) - recent :])
    return pick(scores, text | latest, competing, room - recent)


def pooled(row: list[float], kernel: int, pooling: str) -> list[float]:
    """Stride 1; outside of the row there are zeros to average and nothing to take a maximum of."""
    smooth = []
    for j in range(len(row)):
        around = [row[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < len(row)]
        smooth.append(max(around) if pooling == "max" else sum(around) / kernel)
    return smooth


def snapkv(
    A: Tensor,
    groups: int,
    modality: list[int],
    capacity: int,
    window: int = 32,
    kernel: int = 5,
    pooling: str = "average",
    protect_text: bool = False,
) -> Choice:
    """The window and what it attends to most in front of it; the average over the query heads of
    a group comes before pooling."""
    size = len(modality)
    if capacity >= size:
        return Choice([list(range(size))] * groups, math.inf)
    front = max(size - window, 0)
    sums = column_sums(A, groups, range(front, size))
    scores = [pooled(row[:front], kernel, pooling) + row[front:] for row in sums]
    fixed = set(range(front, size))
    if protect_text:
        fixed |= set(tokens_of(modality, TEXT))
    elif capacity < len(fixed):
        fixed = set(range(size - capacity, size))
    return pick(scores, fixed, list(range(front)), capacity - len(fixed))


def pyramidkv_caps(size: int, capacity: int, window: int, beta: int, layers: int) -> list[Fraction]:
    """Capacity of every layer before rounding."""
    window = min(window, size)
    mean = Fraction(capacity - window)
    if capacity >= size or mean <= 0 or size < 2 * mean:
        return [Fraction(capacity)] * layers
    highest = min(2 * mean - mean / beta, Fraction(size - window))
    lowest = 2 * mean - highest
    step = (highest - lowest) / max(layers - 1, 1)
    return [window + highest - i * step for i in range(layers)]


def lookm(
    A: Tensor,
    K: Tensor,
    V: Tensor,
    modality: list[int],
    capacity: int,
    recent_ratio: float = 0.5,
    merge: Merge = "pivot",
) -> Folded:
    """All text and the latest tokens, audio-video heavy hitters as far as older text leaves room
    among the heavy hitters; every other token goes into the kept one of the most similar key."""
    size, groups = len(modality), K.shape[0]
    recent = int(capacity * recent_ratio)
    old_text = [j for j in tokens_of(modality, TEXT) if j < size - recent]
    fixed = set(old_text) | set(range(size - recent, size))
    scores = column_sums(A, groups, range(size))
    room = capacity - recent - len(old_text)
    choice = pick(scores, fixed, tokens_of(modality, VIDEO, AUDIO), room)
    keys, values, gaps = [], [], [choice.gap]
    for g, kept in enumerate(choice.kept):
        key, value = K[g].double(), V[g].double()
        pruned = [j for j in range(size) if j not in kept] if kept and merge != "none" else []
        nearest, cosine, gap = nearest_pivots(key, kept, pruned, weighted=merge == "weighted")
        gaps.append(gap)
        for states, entries in ((key, keys), (value, values)):
            entries.append(merged_pivots(states, kept, pruned, nearest, cosine, merge))
    return Folded(choice.kept, keys, values, min(gaps))


def nearest_pivots(
    key: Tensor, kept: list[int], pruned: list[int], weighted: bool
) -> tuple[list[int], list[float], float]:
    """Kept token of highest cosine for every pruned one, that cosine, and how clear it is."""
    nearest, cosine, gap = [], [], math.inf
    for x in pruned:
        cosines = {p: float(torch.cosine_similarity(key[x], key[p], dim=0)) for p in kept}
        best = max(kept, key=lambda p: (cosines[p], -p))
        nearest.append(best)
        cosine.append(cosines[best])
        gap = min([gap, *(cosines[best] - c for p, c in cosines.items() if p != best)])
    if weighted and len(pruned) > 1:
        mean = sum(cosine) / len(cosine)
        gap = min([gap, *(abs(c - mean) for c in cosine)])
    return nearest, cosine, gap


def merged_pivots(
    states: Tensor,
    kept: list[int],
    pruned: list[int],
    nearest: list[int],
    cosine: list[float],
    merge: Merge,
) -> Tensor:
    """Mean of every kept token [d] and of what its pruned tokens add, [L, d]."""
    entries = []
    for p in kept:
        parts = [states[p]]
        for x, pivot, similarity in zip(pruned, nearest, cosine, strict=True):
            if pivot != p:
                continue
            if merge == "pivot":
                parts.append((states[x] + states[p]) / 2)
            elif merge == "average":
                parts.append(states[x])
            elif similarity >= sum(cosine) / len(cosine):
                parts.append(similarity * states[x])
        entries.append(torch.stack(parts).mean(0))
    return torch.stack(entries) if entries else states[:0]


def fastv_share(average: Fraction, layers: int, first_pruned: int) -> Fraction:
    """Share of audio-video tokens in layers from K on so that all layers have `average`."""
    return (average * layers - first_pruned) / (layers - first_pruned)


def fastv(A: Tensor, modality: list[int], count: int) -> Choice:
    """All text and the audio-video tokens the last row attends to; A is of layer K - 1."""
    last = mean_over_heads(column_sums(A, 1, [len(modality) - 1]))
    text, av = set(tokens_of(modality, TEXT)), tokens_of(modality, VIDEO, AUDIO)
    return pick([last], text, av, count)


def streaming(size: int, capacity: int, sinks: int) -> list[int]:
    first = min(sinks, capacity)
    return [*range(first), *range(size - (capacity - first), size)]


def recent(modality: list[int], capacity: int) -> list[int]:
    text, av = tokens_of(modality, TEXT), tokens_of(modality, VIDEO, AUDIO)
    return sorted(text + av[len(av) - max(capacity - len(text), 0) :])


def random_count(modality: list[int], capacity: int, protect_text: bool) -> int:
    return max(capacity, len(tokens_of(modality, TEXT))) if protect_text else capacity


def drop(
    A: Tensor, modality: list[int], capacity: int, dropped: int, layer: int, first_layer: int
) -> Choice:
    """All text and, of the other modality, what the trailing text attends to."""
    size = len(modality)
    if layer < first_layer:
        return Choice([list(range(size))], math.inf)
    t0 = max(tokens_of(modality, VIDEO, AUDIO), default=-1) + 1
    scores = mean_over_heads(column_sums(A, 1, range(t0, size)))
    text, others = tokens_of(modality, TEXT), tokens_of(modality, VIDEO + AUDIO - dropped)
    return pick([scores], set(text), others, capacity - len(text))
