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
StrictBudget = Literal["off", "tokens", "entries"]
MergedToken = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Options:
    """What the policy lets a user choose; `k` counts audio/video tokens.

    `strict_budget` here only decides who gives way to a lifted token; see :func:`naive_budget`
    for what it makes of k. `position_prior` puts 1 / (l - j) in place of attention, or a constant
    unless eq. 1 is as printed.
    """

    k: int = 0
    tau: float = 0.9
    redistribution: Redistribution = "paper"
    focusing: bool = True
    calibration: bool = True
    head_mode: Literal["layer", "head"] = "layer"
    tau_mode: str = "absolute"  # or "quantile"
    keep_prefix: bool = True
    block_size: int = 16
    min_per_modality: bool = True
    strict_budget: StrictBudget = "off"
    filter_merged: bool = True
    min_keep_low: int = 0
    position_prior: bool = False


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
    rejected: set[int] = field(default_factory=set)  # tokens under it that were dropped


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
    counts = {m: len(joint & set(positions)) for m, positions in present.items()}
    if opts.calibration and opts.min_per_modality:
        counts = at_least_one(counts, strict=opts.strict_budget != "off")
    for m, positions in present.items():
        head.top[m] = best(head.scores, positions, counts[m])
        if opts.calibration:
            head.merge_sources[m] = set(positions) - head.top[m]
        head.kept |= head.top[m]


def at_least_one(counts: dict[int, int], strict: bool) -> dict[int, int]:
    """Eq. 8-9, N_m from the counts in the joint top; a strict budget takes the token that one
    modality gains from the other, unless that has no other left."""
    lifted = {m: max(count, 1) for m, count in counts.items()}
    if strict and 0 in counts.values():
        return {m: n - 1 if counts[m] > 1 else n for m, n in lifted.items()}
    return lifted


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
    candidate = merged.get(lo, []) if opts.filter_merged else []
    keys = with_merged(head.top[lo], candidate, K)
    anchors = with_merged(head.top[hi], merged.get(hi, []), K)
    names: list[int | str] = [*sorted(head.top[lo]), *(["merged"] if candidate else [])]
    if not names:
        return
    head.similarity = dict(zip(names, mean_similarity(keys, anchors), strict=True))
    head.threshold = threshold(list(head.similarity.values()), opts)
    safe = best(head.scores, sorted(head.top[lo]), opts.min_keep_low)
    for x, similarity in head.similarity.items():
        if similarity >= head.threshold or x in safe:
            continue
        if isinstance(x, int):
            head.rejected.add(x)
        else:
            del merged[lo]
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
    """Round the longest head up so that whole blocks are freed, and fill every head to it.

    A layer that frees no block is left alone. With blocks of one token nothing is rounded, and
    every layer is compressed.
    """
    prompt = set(range(len(modality)))
    unaligned = [len(h.kept) + len(h.merged) for h in heads]
    f = (len(prompt) - max(unaligned)) // block_size
    length = len(prompt) - f * block_size
    untouched = f == 0 and block_size > 1
    if untouched:  # everything stays, nothing is merged
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
        merged=[{} if untouched else h.merged for h in heads],
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
        cuts = [(set(head.scores), opts.k)]
        for m, sources in head.merge_sources.items():  # tokens lifted and given away
            cuts.append((head.top[m] | sources, len(head.top[m])))
        if head.similarity:
            gaps.append(abs(2 * head.video_weight - 1))  # which modality is hi
            reached = [x for x in head.similarity.values() if x >= head.threshold]
            missed = [x for x in head.similarity.values() if x < head.threshold]
            if opts.tau_mode == "absolute":
                gaps += [abs(x - head.threshold) for x in reached + missed]
            elif reached and missed:  # the quantile moves along with the similarities
                gaps.append(min(reached) - max(missed))
            cuts.append(({x for x in head.similarity if isinstance(x, int)}, opts.min_keep_low))
        waiting = {j for j in head.scores if j not in head.kept}
        for group in (waiting - head.rejected, waiting & head.rejected):
            cuts.append((group, len(group & set(fill))))
        for group, cut in cuts:
            order = sorted((head.scores[j] for j in group), reverse=True)
            if 0 < cut < len(order) and order[cut - 1] > 0:
                gaps.append((order[cut - 1] - order[cut]) / order[cut - 1])
    return min(gaps, default=math.inf)


def naive_select(
    A: Tensor, K: Tensor, V: Tensor, modality: list[int], opts: Options
) -> LayerSelection:
    """AccKV for one layer.

    A [H, l, l] causal attention after softmax; K, V [G, l, d] after RoPE; modality [l] with
    0 text, 1 video, 2 audio. There must be audio/video tokens and, unless the scores are a
    position prior, text after them.
    """
    n_queries, n_heads, size = A.shape[0], K.shape[0], len(modality)
    t0 = first_trailing_text(modality)
    assert A.shape[1] == A.shape[2] == K.shape[1] == V.shape[1] == size
    assert t0 > 0, "nothing to compress"
    if opts.position_prior:
        s = torch.ones(n_queries, size, dtype=torch.float64)
        if opts.redistribution == "paper":
            s = s / torch.arange(size, 0, -1)
    else:
        assert t0 < size, "no trailing text to score with"
        s = column_sums(A, t0, opts.redistribution)
    if opts.head_mode == "layer":
        heads = select_shared(s.mean(dim=0), K, V, modality, opts)
    else:
        group_means = s.unflatten(0, (n_heads, n_queries // n_heads)).mean(dim=1)
        heads = []
        for g in range(n_heads):
            heads += select_shared(group_means[g], K[g : g + 1], V[g : g + 1], modality, opts)
    return align(heads, modality, opts.block_size)


def naive_budget(
    modality: list[int],
    budget: float,
    calibration: bool = True,
    keep_prefix: bool = True,
    scope: Literal["av", "total"] = "av",
    min_per_modality: bool = True,
    strict_budget: StrictBudget = "off",
) -> tuple[int, int]:
    """(k, most entries of a layer): what is known before any attention score is.

    The second is the bound of the specification: k, one lifted token, one merged entry per
    modality, and the text. Nothing is dropped, text included, when k covers all audio and video.
    """
    size = len(modality)
    present = len({m for m in modality if m != TEXT})
    n_av = sum(m != TEXT for m in modality)
    text = size - n_av if keep_prefix else size - first_trailing_text(modality)
    n_merged = present if calibration else 0
    whole = n_av if scope == "av" else size
    entries = min(int(budget) if budget > 1 else math.floor(budget * whole + 0.5), whole)
    if scope == "total":
        entries -= text
    if entries >= n_av:
        return n_av, size
    k = entries if scope == "av" and strict_budget != "entries" else max(0, entries - n_merged)
    most_av = k
    if calibration and min_per_modality:
        counts = [len(members(modality, kind)) for kind in (VIDEO, AUDIO)]
        if strict_budget == "off" and present == 2 and k <= max(counts):
            most_av = k + 1  # one modality may have all of the top k
        most_av = max(most_av, present)
    return k, min(text + most_av + n_merged, size)


def worst_case(
    modality: list[int],
    k: int,
    calibration: bool = True,
    keep_prefix: bool = True,
    min_per_modality: bool = True,
    strict_budget: StrictBudget = "off",
) -> int:
    """Most entries of a layer, found by trying every way the joint top k can fall."""
    numbers = {m: len(members(modality, m)) for m in (VIDEO, AUDIO) if m in modality}
    n_av = sum(numbers.values())
    text = len(modality) - (n_av if keep_prefix else first_trailing_text(modality))
    most = 0
    for n_video in range(min(k, numbers.get(VIDEO, 0)) + 1):
        counts = {m: n_video if m == VIDEO else min(k, n_av) - n_video for m in numbers}
        if sum(counts.values()) < min(k, n_av) or any(counts[m] > numbers[m] for m in numbers):
            continue
        if calibration and min_per_modality:
            counts = at_least_one(counts, strict=strict_budget != "off")
        merged = sum(counts[m] < numbers[m] for m in numbers) if calibration else 0
        most = max(most, text + sum(counts.values()) + merged)
    return most


def naive_plan(
    modality: list[int],
    budget: float,
    block_size: int,
    calibration: bool = True,
    keep_prefix: bool = True,
    scope: Literal["av", "total"] = "av",
    min_per_modality: bool = True,
    strict_budget: StrictBudget = "off",
    position_prior: bool = False,
) -> tuple[int, int, bool]:
    """(k, f_bound, active).

    Every layer of an active request frees at least f_bound >= 1 leading blocks. A request that
    is not active stays uncompressed in all layers, and f_bound is 0.
    """
    size = len(modality)
    k, most = naive_budget(
        modality, budget, calibration, keep_prefix, scope, min_per_modality, strict_budget
    )
    n_av = sum(m != TEXT for m in modality)
    f_bound = (size - most) // block_size
    readable = position_prior or size > first_trailing_text(modality)
    active = k < n_av and readable and f_bound >= 1
    return k, f_bound if active else 0, active
