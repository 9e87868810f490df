# SPDX-License-Identifier: Apache-2.0
"""Scores of answers, against values by hand and an implementation of their own, and intervals."""

from __future__ import annotations

import itertools
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_acckv.evaluation import metrics
from vllm_acckv.evaluation.samples import Sample

# ROUGE


@pytest.mark.parametrize(
    ("answer", "references", "rouge_l", "rouge_1"),
    [
        ("The red circle.", ["the red circle"], 1, 1),
        ("", ["the red circle"], 0, 0),
        ("the red circle", ["..."], 0, 0),
        # Words "a b c d" and "a c b": subsequence of 2, F1 = 2 * 2 / (4 + 3); 3 words in common.
        ("a b c d", ["a c b"], 4 / 7, 6 / 7),
        # Words that come twice count as often as in both: 1 of 3 and 1 of 1.
        ("red red red", ["red"], 2 / 4, 2 / 4),
        # The best of the references, for each score by itself.
        ("a b c d", ["d c b a", "a b x y z w"], 4 / 10, 1),
        # Nothing is stemmed, and marks part words.
        ("can't runs", ["can t run"], 4 / 6, 4 / 6),
    ],
)
def test_rouge_by_hand(answer: str, references: list[str], rouge_l: float, rouge_1: float) -> None:
    assert metrics.rouge_l(answer, references) == pytest.approx(rouge_l)
    assert metrics.rouge_1(answer, references) == pytest.approx(rouge_1)


def longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by trying all of the shorter list's."""
    first, second = sorted((first, second), key=len)
    for length in range(len(first), 0, -1):
        for words in itertools.combinations(first, length):
            rest = iter(second)
            if all(word in rest for word in words):
                return length
    return 0


texts = st.lists(st.sampled_from(["a", "b", "C", "d4", "a.", "it's"]), max_size=9).map(" ".join)


@given(texts, st.lists(texts, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_rouge_l_against_an_oracle(answer: str, references: list[str]) -> None:
    best = 0.0
    for reference in references:
        said, right = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, reference))
        if said and right:
            best = max(best, 2 * longest_common(said, right) / (len(said) + len(right)))
    assert metrics.rouge_l(answer, references) == pytest.approx(best)
    assert metrics.rouge_1(answer, references) >= best - 1e-9


def test_without_rouge_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    metrics._rouge.cache_clear()
    with pytest.raises(ModuleNotFoundError) as error:
        metrics.rouge_l("yes", ["yes"])
    assert str(error.value) == (
        "ROUGE needs the package rouge-score: pip install 'vllm-acckv[eval]'."
    )
    assert metrics.exact("yes", ["yes"]) == 1


# Exact text and choices


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("it is a red circle", True),
        ("  It is\na RED  circle . ", True),
        ("it is a red circle..", False),
        ("it is a red circle!", False),
        ("a red circle", False),
        ("", False),
    ],
)
def test_exact(answer: str, right: bool) -> None:
    assert metrics.exact(answer, ["nothing", "It is a red circle."]) == right


MEALS = ("Ate the medicine.", "Tidied up the blanket.", "Put down the cup/glass/bottle.", "Ate.")


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("Tidied up the blanket.", 1),
        ("tidied up  the blanket", 1),
        ("B", 1),
        ("b.", 1),
        ("(B)", 1),
        ("(B) Tidied up the blanket.", 1),
        ("B) something else", 1),
        ("B: tidied", 1),
        ("The best option is (B).", 1),
        ("Answer: B", 1),
        ("Option B", 1),
        ("The person tidied up the blanket, then left.", 1),
        ("He put down the cup, glass, bottle", 2),
        ("He ate the medicine.", 0),  # "ate" lies within it
        ("He ate it.", 3),
        ("ate, and tidied up the blanket", None),
        ("(B) or (C)", None),
        ("(B) Ate the medicine.", None),
        ("E", None),
        ("A person tidied it up.", None),  # an article, no letter
        ("The blankets.", None),
        ("None of them", None),
        ("", None),
    ],
)
def test_choose(answer: str, chosen: int | None) -> None:
    assert metrics.choose(answer, MEALS) == chosen
    assert metrics.accuracy(answer, ["Tidied up the blanket."], MEALS) == (chosen == 1)


def test_numbers_and_letters_as_choices() -> None:
    assert metrics.choose("It happened 10 times.", ["1", "10", "0"]) == 1
    assert metrics.choose("2 or 3 times", ["2", "3"]) is None
    assert metrics.choose("a", ["b", "a"]) == 1
    assert metrics.choose("(a)", ["b", "c"]) == 0


def test_a_choice_that_comes_twice() -> None:
    assert metrics.choose("it is left", ["left", "right", "left"]) == 0
    assert metrics.accuracy("C", ["left"], ["left", "right", "left"]) == 1


def test_scores() -> None:
    sample = Sample("1", "t", None, None, None, None, "?", ("left",))
    assert metrics.scores("Left.", sample) == {"rouge_l": 1, "rouge_1": 1, "exact": 1}
    sample = Sample("1", "t", None, None, None, None, "?", ("left",), ("left", "right"))
    assert metrics.scores("(A)", sample) == {
        "rouge_l": 0,
        "rouge_1": 0,
        "exact": 0,
        "accuracy": 1,
    }


# Intervals


def test_interval() -> None:
    values = [0.0, 1.0, 1.0, 1.0]
    found = metrics.interval(values)
    assert found.mean == 0.75
    assert 0 <= found.low < 0.75 < found.high == 1
    assert found == metrics.interval(np.array(values)) == metrics.interval(values, seed=0)
    many = np.random.default_rng(0).normal(size=50)
    assert metrics.interval(many, seed=0) != metrics.interval(many, seed=1)
    narrow, wide = metrics.interval(many, level=0.5), metrics.interval(many, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert metrics.interval([0.5]) == (0.5, 0.5, 0.5)


def test_width_of_an_interval() -> None:
    """Near the normal approximation, 1.96 standard errors to each side."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    _, low, high = metrics.interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_questions_about_the_same_clip_are_not_independent() -> None:
    """Ten questions with one answer are as one question."""
    clips = np.random.default_rng(0).normal(3, 2, 100)
    values, about = np.repeat(clips, 10), [f"clip {number // 10}" for number in range(1000)]
    alone, found = metrics.interval(clips), metrics.interval(values, clusters=about)
    assert found == pytest.approx(alone)
    wrong = metrics.interval(values)
    assert wrong.high - wrong.low < 0.5 * (found.high - found.low)
    assert metrics.difference(values, values - 1, clusters=about) == pytest.approx((1, 1, 1))
    # Clusters may be of any size, and each value weighs the same.
    sizes = metrics.interval([0.0, 1, 1, 1], clusters=["one", "two", "two", "two"])
    assert sizes == (0.75, 0, 1)


@pytest.mark.parametrize("kind", ["normal", "right or wrong"])
def test_an_interval_holds_the_mean_as_often_as_it_says(kind: str) -> None:
    rng = np.random.default_rng(0)
    truth, rounds = 0.3, 400
    held = 0
    for seed in range(rounds):
        values = rng.normal(truth, 1, 100) if kind == "normal" else rng.random(100) < truth
        _, low, high = metrics.interval(values, seed=seed, resamples=400)
        held += low <= truth <= high
    assert 0.92 <= held / rounds <= 0.98  # the standard error of the share is 0.011


def test_difference_is_paired() -> None:
    """Hard questions are hard for both policies."""
    rng = np.random.default_rng(0)
    hardness = rng.normal(0, 1, 100)
    first, second = hardness + rng.normal(0.1, 0.1, 100), hardness + rng.normal(0, 0.1, 100)
    found = metrics.difference(first, second)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert 0 < found.low < found.high < 0.2
    alone = metrics.interval(first)
    assert alone.high - alone.low > 5 * (found.high - found.low)
    assert metrics.difference(first, first) == (0, 0, 0)


def test_values_without_an_interval() -> None:
    with pytest.raises(ValueError, match=r"^Values are \[\]; expected at least one, all finite\.$"):
        metrics.interval([])
    with pytest.raises(ValueError, match=r"expected at least one, all finite\.$"):
        metrics.interval([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"^The level is 95; expected a number between 0 and 1\.$"):
        metrics.interval([1.0], level=95)
    with pytest.raises(ValueError, match=r"^There are 2 and 1 values; expected as many\.$"):
        metrics.difference([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match=r"^There are 1 values and 2 clusters\.$"):
        metrics.interval([1.0], clusters=["one", "two"])
