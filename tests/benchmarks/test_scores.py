"""Scores and their intervals: means of means, paired differences, against formulas worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcap.benchmarks.scores import Statistic, difference


def test_a_mean_over_questions_and_a_mean_over_groups() -> None:
    images, totals, weights = ["a", "b", "c"], [3.0, 1.0, 8.0], [4.0, 1.0, 10.0]
    # (3 + 1 + 8) / (4 + 1 + 10); and ((3 + 1) / 5 + 8 / 10) / 2
    assert Statistic.of(images, totals, weights).score().value == pytest.approx(12 / 15)
    grouped = Statistic.of(images, totals, weights, ["x", "x", "y"])
    assert grouped.score().value == pytest.approx((4 / 5 + 8 / 10) / 2)
    # of three groups, one of which is empty
    assert Statistic.of(images, totals, weights, ["x", "x", "y"], 3).score().value == pytest.approx(1.6 / 3)


def test_a_resample_counts_images_as_often_as_they_are_drawn() -> None:
    statistic = Statistic.of(["a", "b", "c"], [3.0, 1.0, 8.0], [4.0, 1.0, 10.0], ["x", "x", "y"])
    drawn = statistic(np.array([[0, 0, 2], [1, 1, 1]]))
    # the second draw has no image of group y, which then is not in the mean
    assert drawn == pytest.approx([(6 / 8 + 8 / 10) / 2, 3 / 3])


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(50, 10, 400)
    score = Statistic.of([str(i) for i in range(400)], values.tolist()).score()
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert score.n == 400
    assert score.value == pytest.approx(values.mean())
    assert score.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert score.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_nothing_and_one_image() -> None:
    assert math.isnan(Statistic.of([], []).score().value)
    one = Statistic.of(["a"], [3.0]).score()
    assert (one.value, one.n) == (3.0, 1)
    assert math.isnan(one.low)


def test_a_paired_difference_is_sharper_than_two_scores() -> None:
    draw = np.random.default_rng(1)
    hard = draw.normal(50, 20, 300)
    names = [str(i) for i in range(300)]
    ours = Statistic.of(names, (hard + 2 + draw.normal(0, 1, 300)).tolist())
    theirs = Statistic.of(list(reversed(names)), hard[::-1].tolist())
    gap = difference(ours, theirs)
    assert gap.value == pytest.approx(2, abs=0.3)
    assert gap.low > 1.5
    assert ours.score().low < theirs.score().high, "the two intervals overlap all the same"
    half = difference(ours, Statistic.of(names[:100], hard[:100].tolist()))
    assert half.n == 100


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(-50, 50))
def test_shifting_all_shifts_the_interval(values: list[float], shift: float) -> None:
    names = [str(i) for i in range(len(values))]
    before = Statistic.of(names, values).score()
    after = Statistic.of(names, [value + shift for value in values]).score()
    for name in ("value", "low", "high"):
        assert getattr(after, name) == pytest.approx(getattr(before, name) + shift, abs=1e-6)
    assert before.low - 1e-9 <= before.value <= before.high + 1e-9 or len(set(values)) > 1
