# SPDX-License-Identifier: Apache-2.0
"""How right an answer is, and how sure a mean over questions is.

The AccKV paper says "ROUGE" and no more; ROUGE-L and ROUGE-1 are both here, as F1 of Google's
``rouge-score``: lower case, everything but a-z and 0-9 parts words, no stemming. The challenges of
AVSD report pycocoevalcap's ROUGE-L instead, an F with beta 1.2 on other tokens; figures differ.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vllm_acckv.evaluation.samples import Sample


def scores(answer: str, sample: Sample) -> dict[str, float]:
    """Every metric that applies to a question, each in [0, 1]."""
    found = {
        "rouge_l": rouge_l(answer, sample.answers),
        "rouge_1": rouge_1(answer, sample.answers),
        "exact": exact(answer, sample.answers),
    }
    if sample.choices:
        found["accuracy"] = accuracy(answer, sample.answers, sample.choices)
    return found


# Text


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, with the reference where it is highest.

    Raises:
        ModuleNotFoundError: without the package ``rouge-score``.
    """
    return float(_rouge().score_multi(references, answer)["rougeL"].fmeasure)


def rouge_1(answer: str, references: Sequence[str]) -> float:
    """F1 of common words, with the reference where it is highest.

    Raises:
        ModuleNotFoundError: without the package ``rouge-score``.
    """
    return float(_rouge().score_multi(references, answer)["rouge1"].fmeasure)


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "ROUGE needs the package rouge-score: pip install 'vllm-acckv[eval]'."
        ) from None
    return RougeScorer(["rouge1", "rougeL"])


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference after :func:`normalise`, else 0."""
    return float(normalise(answer) in map(normalise, references))


def normalise(text: str) -> str:
    """In lower case, white space as single spaces, none at the ends, without a final full stop."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


# Multiple choice

_LEAD = r"(?:(?:the )?(?:(?:best|right|correct) )?(?:answer|option|choice)(?: is)?:? )?"
# A letter alone, in brackets or before a mark; "a" before a word is an article.
_LETTER = re.compile(_LEAD + r"(?:\(([a-z])\)|([a-z])[).:](?= |$)|([a-z])$)")


def accuracy(answer: str, right: Sequence[str], choices: Sequence[str]) -> float:
    """1 if the choice that the answer means is a right one, else 0, also if that cannot be told."""
    chosen = choose(answer, choices)
    return 0.0 if chosen is None else exact(choices[chosen], right)


def choose(answer: str, choices: Sequence[str]) -> int | None:
    """Which choice an answer means, or ``None``. In this order:

    1. it is the text of a choice, after :func:`normalise`;
    2. it is a letter or begins with one, as in "(B)", "B." or "Answer: B", and names neither
       another letter in brackets nor the text of another choice alone;
    3. it contains the words of just one choice, or of one within which all others lie.

    Letters that are choices themselves count as text, by 1.
    """
    said, texts = normalise(answer), [normalise(choice) for choice in choices]
    if said in texts:
        return texts.index(said)
    named = _contained(said, texts)
    if match := _LETTER.match(said):
        letter = string.ascii_lowercase.index(match[1] or match[2] or match[3])
        others = {*re.findall(r"\(([a-z])\)", said)} - {string.ascii_lowercase[letter]}
        agrees = not named or letter in named
        return letter if letter < len(choices) and agrees and not others else None
    return named[0] if len({texts[i] for i in named}) == 1 else None


def _contained(said: str, texts: Sequence[str]) -> list[int]:
    """Choices whose words are in the answer, without those that are part of another such one."""
    words = [_words(text) for text in texts]
    found = [i for i, choice in enumerate(words) if choice.strip() and choice in _words(said)]
    return [
        i for i in found if not any(words[i] != words[j] and words[i] in words[j] for j in found)
    ]


def _words(text: str) -> str:
    """Between spaces, so that one such text holds another only as whole words."""
    return " ".join(["", *re.findall(r"[^\W_]+", text), ""])


# Means over questions


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def interval(
    values: Sequence[float] | np.ndarray,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean of ``[questions]`` and its percentile bootstrap (Efron and Tibshirani 1993, ch. 13).

    It has no width if all values are the same or about one clip, which does not mean that the mean
    is known exactly, and is too narrow for few clips (ten, say).

    Args:
        level: share of such intervals that hold the true mean, in (0, 1).
        clusters: for each value what it is about, such as the clip; whole clusters are drawn,
            because questions about the same clip are not independent. Without, all are.

    Raises:
        ValueError: without values, for one that is not finite, or unless there are as many
            clusters as values.
    """
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
        raise ValueError(f"Values are {values!r}; expected at least one, all finite.")
    if not 0 < level < 1:
        raise ValueError(f"The level is {level}; expected a number between 0 and 1.")
    about = range(len(sample)) if clusters is None else clusters
    if len(about) != len(sample):
        raise ValueError(f"There are {len(sample)} values and {len(about)} clusters.")
    number = {one: place for place, one in enumerate(dict.fromkeys(about))}
    member = [number[one] for one in about]
    sums, counts = np.bincount(member, sample), np.bincount(member)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """``first - second`` of two policies on the same questions, in the same order ``[questions]``.

    Pairing takes out how hard a question is, so that smaller differences show than by comparing two
    intervals.

    Raises:
        ValueError: as :func:`interval`, and if the numbers of questions differ.
    """
    if len(first) != len(second):
        raise ValueError(f"There are {len(first)} and {len(second)} values; expected as many.")
    return interval(np.subtract(first, second), level, seed, resamples, clusters)
