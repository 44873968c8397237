"""Scores with 95 % intervals: bootstrap over images, the unit that a benchmark has drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A number with its interval.

    Attributes:
        value: in the benchmark's own unit; NaN where there is nothing to score.
        low, high: ends of the 95 % interval; NaN with fewer than two images.
        n: images behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def interval(self) -> dict[str, float | None]:
        """``low`` and ``high`` for JSON."""
        return {"low": known(self.low), "high": known(self.high)}


def known(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Statistic:
    """A score as a function of the images: the mean over groups of Σ totals / Σ weights.

    One group whose weights are 1 is a mean over images; weights that count questions make a mean over questions;
    groups (domains, baselines) make a mean of means.

    Attributes:
        images: ``[n]`` ids, each once.
        totals: ``[n]``.
        weights: ``[n]``, each at least 0.
        groups: ``[n]`` numbers from 0; None for one group.
        divisor: groups that the mean is over; None for those that have any weight.
    """

    images: Sequence[str]
    totals: np.ndarray
    weights: np.ndarray
    groups: np.ndarray | None = None
    divisor: int | None = None

    @classmethod
    def of(
        cls,
        images: Sequence[str],
        totals: Sequence[float] | np.ndarray,
        weights: Sequence[float] | np.ndarray | None = None,
        groups: Sequence[str] | None = None,
        divisor: int | None = None,
    ) -> Statistic:
        """From lists; `weights` default to 1, `groups` are names."""
        numbers = None if groups is None else np.unique(list(groups), return_inverse=True)[1].reshape(-1)
        own = np.ones(len(images)) if weights is None else np.asarray(weights, float)
        return cls(list(images), np.asarray(totals, float), own, numbers, divisor)

    def __call__(self, index: Any, axis: int = -1) -> Any:
        """The score of each sample of images: `index` is ``[..., n]`` places in `images`, the result ``[...]``."""
        index = np.asarray(index).astype(int)
        groups = np.zeros(len(self.images), int) if self.groups is None else self.groups
        means = []
        for group in range(groups.max(initial=0) + 1):
            inside = groups == group
            total = (self.totals * inside)[index].sum(axis)
            weight = (self.weights * inside)[index].sum(axis)
            means.append(np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan))
        stacked = np.stack(means)
        there = (~np.isnan(stacked)).sum(0) if self.divisor is None else self.divisor
        return np.nansum(stacked, 0) / np.where(there == 0, np.nan, there)

    def score(self, seed: int = 0) -> Score:
        """The score of all images, with its interval; the same for the same images and seed."""
        return _bootstrap(self, len(self.images), seed)

    def select(self, images: Sequence[str]) -> Statistic:
        """Of these images alone, in this order."""
        place = {image: number for number, image in enumerate(self.images)}
        rows = np.array([place[image] for image in images], int)
        groups = None if self.groups is None else self.groups[rows]
        return Statistic(list(images), self.totals[rows], self.weights[rows], groups, self.divisor)


def difference(one: Statistic, other: Statistic, seed: int = 0) -> Score:
    """`one` minus `other` on the images that both have: a paired bootstrap, in which every draw takes the same images of
    both. Its interval is narrower than the two scores suggest, since an easy image is easy for both."""
    theirs_too = set(other.images)
    common = [image for image in one.images if image in theirs_too]
    ours, theirs = one.select(common), other.select(common)
    return _bootstrap(lambda index, axis=-1: ours(index, axis) - theirs(index, axis), len(common), seed)


def _bootstrap(statistic: Any, n: int, seed: int) -> Score:
    if n == 0:
        return Score(math.nan, math.nan, math.nan, 0)
    everything = np.arange(n)
    value = float(statistic(everything))
    if n == 1:
        return Score(value, math.nan, math.nan, 1)
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (everything,),
        statistic,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = drawn.confidence_interval
    return Score(value, float(low), float(high), n)
