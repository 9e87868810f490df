# SPDX-License-Identifier: Apache-2.0
"""AccKV written out equation by equation on the full attention matrix, for one layer.

Test oracle: slow on purpose, shares no code with the package. Equation numbers are the paper's.

Symbols: l prompt length, H query heads, G KV heads, d head size, T the text after the last
audio/video token. Index lists are sorted positions in the prompt. Arithmetic is float64, except
that cosine similarities are rounded to float32 before they are compared with tau.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

TEXT, VIDEO, AUDIO = 0, 1, 2
Redistribution = Literal["paper", "visible", "off"]
MergedToken = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Options:
    """What the policy lets a user choose; `k` counts audio/video tokens."""

    k: int = 0
    tau: float = 0.9
    redistribution: Redistribution = "paper"
    focusing: bool = True
    calibration: bool = True
    head_mode: Literal["layer", "head"] = "layer"
    tau_mode: Literal["absolute", "quantile"] = "absolute"
    keep_prefix: bool = True
    block_size: int = 16


@dataclass
class HeadSelection:
    """What one KV head keeps before the lengths of layer and heads are aligned (eq. 7-18)."""

    video_weight: float
    kept: set[int]
    merged: dict[int, MergedToken]
    scores: dict[int, float]  # S of eq. 6, audio/video positions only
    top: dict[int, set[int]]  # Itop of eq. 10 per modality
    merge_sources: dict[int, set[int]]  # Imrg of eq. 11-12 per modality
    similarity: dict[int | str, float] = field(default_factory=dict)  # eq. 16; "merged": its own
    threshold: float = -math.inf  # what `similarity` has to reach
    rejected: set[int] = field(default_factory=set)  # tokens under it


@dataclass(frozen=True)
class LayerSelection:
    """One layer after alignment. Every list has one entry per KV head, also in layer mode."""

    f: int  # leading blocks that hold nothing this layer needs
    length: int  # entries every KV head keeps: len(kept[g]) + len(merged[g])
    W_v: list[float]  # weight of video, eq. 4
    kept: list[list[int]]
    merged: list[dict[int, MergedToken]]  # modality -> (k [d], v [d])
    evicted: list[list[int]]  # positions not kept
    fillers: list[list[int]]  # kept only to round the length up, in the order they were taken
    unaligned: list[int]  # entries per head before rounding
    heads: list[HeadSelection]  # before alignment, for diagnosis


def members(modality: list[int], kind: int) -> list[int]:
    """Positions of one modality."""
    return [j for j, m in enumerate(modality) if m == kind]


def first_trailing_text(modality: list[int]) -> int:
    """t0, the position after the last audio/video token (0 without such tokens)."""
    return max(members(modality, VIDEO) + members(modality, AUDIO), default=-1) + 1


def redistribute(attention: Tensor, t0: int, mode: Redistribution) -> Tensor:
    """Eq. 1 on the full matrix [H, l, l], or its `visible` form for text rows only (E2)."""
    if mode == "off":
        return attention.double()
    size = attention.shape[-1]
    i = torch.arange(size, dtype=torch.float64)[:, None]
    j = torch.arange(size, dtype=torch.float64)[None, :]
    seen_by = size - j if mode == "paper" else size - j.clamp(min=t0)
    return attention.double() * (i + 1) / seen_by


def column_sums(attention: Tensor, t0: int, mode: Redistribution) -> Tensor:
    """Sum of the redistributed rows in T for every column: [H, l] (inner sum of eq. 3 and 6)."""
    return redistribute(attention, t0, mode)[:, t0:, :].sum(dim=1)


def video_weight(s: Tensor, video: list[int], audio: list[int]) -> float:
    """Eq. 3-4 on the column sums s [l] of one head (or of the head mean)."""
    if not video or not audio:
        return 1.0 if video else 0.0
    mean_video = sum(float(s[j]) for j in video) / len(video)
    mean_audio = sum(float(s[j]) for j in audio) / len(audio)
    total = mean_video + mean_audio
    if total == 0 or not math.isfinite(total):
        return 0.5
    return mean_video / total


def best(scores: dict[int, float], candidates: list[int], count: int) -> set[int]:
    """The `count` candidates of highest score, lowest position first among equals."""
    return set(sorted(candidates, key=lambda j: (-scores[j], j))[:count])


def mean_similarity(keys: Tensor, anchors: Tensor) -> list[float]:
    """Eq. 15-16: keys [n, N_lo, d] and anchors [n, N_hi, d] of n KV heads to [N_lo] means."""
    unit_keys = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    unit_anchors = anchors.double() / anchors.double().norm(dim=-1, keepdim=True)
    cosines = unit_keys @ unit_anchors.transpose(1, 2)  # [n, N_lo, N_hi]
    return cosines.mean(dim=2).mean(dim=0).float().tolist()


def threshold(similarities: list[float], opts: Options) -> float:
    """The similarity a low-priority token must reach: tau itself, or the tau-quantile."""
    if opts.tau_mode == "absolute":
        return opts.tau
    return float(torch.quantile(torch.tensor(similarities, dtype=torch.float32), opts.tau))


def select_top(head: HeadSelection, present: dict[int, list[int]], opts: Options) -> None:
    """Eq. 7-12: joint top-k, at least one token per modality, and what is left to merge."""
    everything = sorted(j for positions in present.values() for j in positions)
    joint = best(head.scores, everything, opts.k)
    for m, positions in present.items():
        in_joint = joint & set(positions)
        if opts.calibration:
            head.top[m] = best(head.scores, positions, max(len(in_joint), 1))
            head.merge_sources[m] = set(positions) - head.top[m]
        else:
            head.top[m] = in_joint
        head.kept |= head.top[m]


def merge_rest(head: HeadSelection, K: Tensor, V: Tensor) -> dict[int, list[MergedToken]]:
    """Eq. 13-14: per modality the mean K and V [d] of Imrg in each KV head of K, V [n, l, d]."""
    merged = {}
    for m, sources in head.merge_sources.items():
        if sources:
            rows = sorted(sources)
            means = (x[:, rows].double().mean(dim=1).to(x.dtype) for x in (K, V))
            merged[m] = list(zip(*means, strict=True))
    return merged


def with_merged(rows: set[int], merged: list[MergedToken], K: Tensor) -> Tensor:
    """[K[I_top], K_merge] of eq. 15, [n, N (+ 1), d], for K [n, l, d]."""
    top = K[:, sorted(rows)]
    if not merged:
        return top
    return torch.cat([top, torch.stack([key for key, _ in merged])[:, None]], dim=1)


def filter_low(
    head: HeadSelection, merged: dict[int, list[MergedToken]], K: Tensor, opts: Options
) -> None:
    """Eq. 15-18: drop from the low-priority modality what is unlike the high-priority keys.

    K [n, l, d] holds the KV heads that share this selection (all G in layer mode, else one).
    """
    hi, lo = (VIDEO, AUDIO) if head.video_weight >= 1 - head.video_weight else (AUDIO, VIDEO)
    keys, anchors = (with_merged(head.top[m], merged.get(m, []), K) for m in (lo, hi))
    names: list[int | str] = [*sorted(head.top[lo]), *(["merged"] if lo in merged else [])]
    head.similarity = dict(zip(names, mean_similarity(keys, anchors), strict=True))
    head.threshold = threshold(list(head.similarity.values()), opts)
    for x, similarity in head.similarity.items():
        if similarity < head.threshold and x == "merged":
            del merged[lo]
        elif similarity < head.threshold:
            head.rejected.add(x)
    head.kept -= head.rejected


def select_shared(
    s: Tensor, K: Tensor, V: Tensor, modality: list[int], opts: Options
) -> list[HeadSelection]:
    """Selection before alignment for KV heads that share one score vector.

    s [l] column sums; K, V [n, l, d] the KV heads concerned. Returns n selections that differ
    in their merged tokens only.
    """
    video, audio = members(modality, VIDEO), members(modality, AUDIO)
    present = {m: p for m, p in ((VIDEO, video), (AUDIO, audio)) if p}
    w_v = video_weight(s, video, audio)
    weight = {VIDEO: w_v, AUDIO: 1 - w_v}
    focus = opts.focusing and len(present) == 2
    scores = {
        j: float(s[j]) * (weight[m] if focus else 1.0)  # eq. 5-6
        for m, positions in present.items()
        for j in positions
    }
    t0 = first_trailing_text(modality)
    text = {j for j in members(modality, TEXT) if opts.keep_prefix or j >= t0}
    head = HeadSelection(w_v, text, {}, scores, {}, {})
    select_top(head, present, opts)
    merged = merge_rest(head, K, V)
    if opts.calibration and len(present) == 2:
        filter_low(head, merged, K, opts)
    n = K.shape[0]
    return [replace(head, merged={m: merged[m][g] for m in merged}) for g in range(n)]


def filler_order(head: HeadSelection, modality: list[int]) -> list[int]:
    """Dropped tokens, next best first: merged-away AV, AV rejected by tau, then latest text."""
    dropped_av = [j for j in head.scores if j not in head.kept]
    dropped_av.sort(key=lambda j: (j in head.rejected, -head.scores[j], j))
    dropped_text = [j for j in members(modality, TEXT) if j not in head.kept]
    return dropped_av + sorted(dropped_text, reverse=True)


def align(heads: list[HeadSelection], modality: list[int], block_size: int) -> LayerSelection:
    """Round the longest head up so that whole blocks are freed, and fill every head to it."""
    prompt = set(range(len(modality)))
    unaligned = [len(h.kept) + len(h.merged) for h in heads]
    f = (len(prompt) - max(unaligned)) // block_size
    length = len(prompt) - f * block_size
    if f == 0:  # untouched: everything stays, nothing is merged
        fillers: list[list[int]] = [[] for _ in heads]
        kept = [prompt for _ in heads]
    else:
        fillers = [
            filler_order(h, modality)[: length - n] for h, n in zip(heads, unaligned, strict=True)
        ]
        kept = [h.kept | set(fill) for h, fill in zip(heads, fillers, strict=True)]
    return LayerSelection(
        f=f,
        length=length,
        W_v=[h.video_weight for h in heads],
        kept=[sorted(own) for own in kept],
        merged=[h.merged if f else {} for h in heads],
        evicted=[sorted(prompt - own) for own in kept],
        fillers=fillers,
        unaligned=unaligned,
        heads=heads,
    )


def closest_call(selection: LayerSelection, opts: Options) -> float:
    """How near the layer came to a different selection: the least relative gap of a decision.

    Under about 1e-5 a float32 implementation may rightly decide otherwise.
    """
    gaps = []
    for head, fill in zip(selection.heads, selection.fillers, strict=True):
        ranked = sorted(head.scores.values(), reverse=True)
        if head.similarity:
            gaps.append(abs(2 * head.video_weight - 1))  # which modality is hi
            reached = [x for x in head.similarity.values() if x >= head.threshold]
            missed = [x for x in head.similarity.values() if x < head.threshold]
            if opts.tau_mode == "absolute":
                gaps += [abs(x - head.threshold) for x in reached + missed]
            elif reached and missed:  # the quantile moves along with the similarities
                gaps.append(min(reached) - max(missed))
        cuts = [(ranked, opts.k)]
        waiting = [j for j in head.scores if j not in head.kept]
        for group in (set(waiting) - head.rejected, set(waiting) & head.rejected):
            order = sorted((head.scores[j] for j in group), reverse=True)
            cuts.append((order, len(group & set(fill))))
        for order, cut in cuts:
            if 0 < cut < len(order) and order[cut - 1] > 0:
                gaps.append((order[cut - 1] - order[cut]) / order[cut - 1])
    return min(gaps, default=math.inf)


def naive_select(
    A: Tensor, K: Tensor, V: Tensor, modality: list[int], opts: Options
) -> LayerSelection:
    """AccKV for one layer.

    A [H, l, l] causal attention after softmax; K, V [G, l, d] after RoPE; modality [l] with
    0 text, 1 video, 2 audio. There must be audio/video tokens and text after them.
    """
    n_queries, n_heads = A.shape[0], K.shape[0]
    t0 = first_trailing_text(modality)
    assert A.shape[1] == A.shape[2] == K.shape[1] == V.shape[1] == len(modality)
    assert 0 < t0 < len(modality), "nothing to compress, or no trailing text to score with"
    s = column_sums(A, t0, opts.redistribution)
    if opts.head_mode == "layer":
        heads = select_shared(s.mean(dim=0), K, V, modality, opts)
    else:
        group_means = s.unflatten(0, (n_heads, n_queries // n_heads)).mean(dim=1)
        heads = []
        for g in range(n_heads):
            heads += select_shared(group_means[g], K[g : g + 1], V[g : g + 1], modality, opts)
    return align(heads, modality, opts.block_size)


def naive_plan(
    modality: list[int],
    budget: float,
    block_size: int,
    calibration: bool = True,
    keep_prefix: bool = True,
    scope: Literal["av", "total"] = "av",
) -> tuple[int, int, bool]:
    """(k, f_bound, active): what is known before any attention score is.

    Every layer of an active request frees at least f_bound >= 1 leading blocks. A request that
    is not active stays uncompressed in all layers, and f_bound is 0.
    """
    size = len(modality)
    present = len({m for m in modality if m != TEXT})
    n_av = sum(m != TEXT for m in modality)
    n_t = size - first_trailing_text(modality)
    text_kept = size - n_av if keep_prefix else n_t
    if scope == "av":
        k = min(int(budget), n_av) if budget > 1 else math.floor(budget * n_av + 0.5)
    else:
        total = int(budget) if budget > 1 else math.floor(budget * size + 0.5)
        k = max(0, min(n_av, total - text_kept - (present if calibration else 0)))
    most_kept = min(max(min(k, n_av) + 1, present), n_av) + present
    av_kept = most_kept if calibration else k
    f_bound = (size - min(text_kept + av_kept, size)) // block_size
    active = k < n_av and n_t >= 1 and f_bound >= 1
    return k, f_bound if active else 0, active
