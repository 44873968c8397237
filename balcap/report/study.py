"""The figures of a study, runs x seeds: means, paired differences, verdicts on claims. Pure functions of run folders.

The unit is the seed. Intervals are Student's t over seeds, 95 %; a difference is taken within each seed, which draws the
same images in the same order for every run, and then averaged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from balcap.benchmarks.scores import Score
from balcap.report.run import TITLES, Run, Series
from balcap.utils.settings_tree import nearest

VALIDATED = ("b_capscore", "precision", "recall", "linguistic", "length_ratio", "caption_tokens")
"""Validation metrics that a study reads unless it names its measures."""


@dataclass(frozen=True)
class Claim:
    """What somebody says about two runs, to be held against the figures.

    Args:
        claim: in words.
        run: name of a run.
        measure: a benchmark's score, such as ``dcscore``, or a metric, such as ``val/recall``.
        against: name of the run that it is compared with; null for the study's reference.
        expect: what the measure of `run` is, compared with that of `against`.
        within: of ``equal``: the largest difference that counts as none, in the measure's unit.
        source: where it is claimed, such as ``arXiv 2605.07394, Table 3``.
    """

    claim: str
    run: str
    measure: str
    against: str | None = None
    expect: Literal["higher", "lower", "equal"] = "higher"
    within: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Arm:
    """All seeds of one setting.

    Attributes:
        name: in the study.
        title: for people.
        runs: seed -> its run; None where it is not finished, so that none of its figures count.
    """

    name: str
    title: str
    runs: Mapping[int, Run | None]

    def values(self, measure: str) -> dict[int, float]:
        """Seed -> its figure, without those that are missing."""
        figures = {seed: figure(run, measure) for seed, run in self.runs.items() if run is not None}
        return {seed: value for seed, value in figures.items() if math.isfinite(value)}

    def mean(self, measure: str) -> Score:
        """Over the seeds, with its interval."""
        return t_interval(list(self.values(measure).values()))

    def images(self, measure: str) -> list[int]:
        """Images behind the figure of each seed, as far as the runs say: of the benchmark, or of the last validation."""
        if measure.startswith("val/"):
            return self._held_out
        runs = [run for run in self.runs.values() if run is not None]
        return [run.benchmarks[measure]["n"] for run in runs if measure in run.benchmarks]

    @cached_property
    def _held_out(self) -> list[int]:
        counts = [held_out_images(run) for run in self.runs.values() if run is not None]
        return [count for count in counts if count]


@dataclass(frozen=True)
class Group:
    """Settings that stand in a table of their own.

    Attributes:
        title: of the table.
        arms: names of its settings, in order.
        reference: name of the one that the others are compared with; None for the first.
    """

    title: str
    arms: Sequence[str]
    reference: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the figures say of a claim.

    Attributes:
        claim: that was made.
        word: ``holds``, ``does not show`` or ``contradicted``; ``not run`` where no seed has both figures.
        difference: of the two runs, paired by seed.
    """

    claim: Claim
    word: str
    difference: Score


@dataclass(frozen=True)
class Study:
    """Runs x seeds of one question.

    Attributes:
        title: of it.
        arms: the settings, in order.
        reference: name of the one that the others are compared with.
        claims: to be judged.
        given_measures: what is read; None for what the runs have of benchmarks and validation.
        curve: the metric whose learning curves are drawn; None for none.
        axes: of the trade-off: two measures, and a third that colours the points.
        unfinished: name of a run -> why its figures do not count.
        groups: of the settings; without any, all stand in one table.
    """

    title: str
    arms: Sequence[Arm]
    reference: str
    claims: Sequence[Claim] = ()
    given_measures: Sequence[str] | None = None
    curve: str | None = None
    axes: Sequence[str] = ()
    unfinished: Mapping[str, str] | None = None
    groups: Sequence[Group] = ()

    @cached_property
    def parts(self) -> list[Study]:
        """A study of its own for the table of each group, without claims; itself where there are no groups."""
        if not self.groups:
            return [self]
        measures = self.measures
        return [
            Study(
                title=group.title,
                arms=[self.arm(name) for name in group.arms],
                reference=group.reference or group.arms[0],
                given_measures=measures,
                curve=self.curve,
                axes=self.axes,
            )
            for group in self.groups
        ]

    @property
    def shown(self) -> list[Study]:
        """`parts` without groups of whose own settings, which no other group has, none has a finished run; all, where that
        is so of all."""
        counts = Counter(name for group in self.groups for name in group.arms)

        def begun(part: Study) -> bool:
            own = [arm for arm in part.arms if counts[arm.name] < 2] or part.arms
            return any(run is not None for arm in own for run in arm.runs.values())

        return [*filter(begun, self.parts)] or self.parts

    @cached_property
    def measures(self) -> list[str]:
        """Given, or found in any finished run: benchmarks' own scores first."""
        if self.given_measures is not None:
            return list(self.given_measures)
        runs = [run for arm in self.arms for run in arm.runs.values() if run is not None]
        scores = [name for run in runs for name in run.benchmarks if "/" not in name]
        names = (f"val/{name}" for name in VALIDATED)
        return list(
            dict.fromkeys([*scores, *(name for name in names if any(name in r.metrics for r in runs))])
        )

    @cached_property
    def unknown(self) -> dict[str, str | None]:
        """Measures that the study names and no finished run has -> what may be meant; empty while none is finished."""
        runs = [run for arm in self.arms for run in arm.runs.values() if run is not None]
        known = {name for run in runs for name in (*run.benchmarks, *run.metrics)}
        named = [*(self.given_measures or ()), *self.axes, *(claim.measure for claim in self.claims)]
        names = dict.fromkeys(measure.partition("@")[0] for measure in named) if known else {}
        return {name: nearest(name, known) for name in names if name not in known}

    @property
    def seeds(self) -> list[int]:
        return list(self.arms[0].runs)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def difference(self, run: str, measure: str, against: str | None = None) -> Score:
        """Of a run and another, over the seeds that have both; by default against the reference."""
        ours, theirs = self.arm(run).values(measure), self.arm(against or self.reference).values(measure)
        return t_interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    @cached_property
    def verdicts(self) -> list[Verdict]:
        found = []
        for claim in self.claims:
            gap = self.difference(claim.run, claim.measure, claim.against)
            word = verdict(claim.expect, gap, claim.within or 0.0) if gap.n else "not run"
            found.append(Verdict(claim, word, gap))
        return found

    def missing(self, measure: str) -> dict[str, int]:
        """Title of a setting -> its finished runs without this figure, where there are any."""
        gaps = {
            arm.title: sum(run is not None for run in arm.runs.values()) - len(arm.values(measure))
            for arm in self.arms
        }
        return {title: gap for title, gap in gaps.items() if gap}

    @cached_property
    def trade_off(self) -> dict[str, tuple[float, ...]]:
        """Name of a setting -> its means on the axes; without the third where nobody has it, empty without the others."""
        axes = [axis for axis in self.axes if any(arm.values(axis) for arm in self.arms)]
        if len(self.axes) < 2 or tuple(axes[:2]) != tuple(self.axes[:2]):
            return {}
        points = {arm.name: tuple(arm.mean(axis).value for axis in axes) for arm in self.arms}
        return {name: point for name, point in points.items() if all(map(math.isfinite, point))}


def figure(run: Run, measure: str) -> float:
    """A benchmark's score, or the last value of a metric; of ``val/recall@0.7`` the step at which it first reaches 0.7. NaN
    where it is missing."""
    name, _, level = measure.partition("@")
    if level:
        return steps_until(run.metrics.get(name, ([], [])), float(level))
    if measure in run.benchmarks:
        score = run.benchmarks[measure].get("score")
        return math.nan if score is None else float(score)
    values = run.metrics.get(measure, ([], []))[1]
    return values[-1] if values else math.nan


def steps_until(series: Series, level: float) -> float:
    """The step at which a metric first reaches `level`, on the straight line between the values around it.

    Returns:
        NaN where it never does.
    """
    points = [(step, value) for step, value in zip(*series, strict=True) if math.isfinite(value)]
    before = None
    for step, value in points:
        if value >= level:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (level - before[1]) / (value - before[1])
        before = step, value
    return math.nan


def held_out_images(run: Run) -> int:
    """How many images the last validation of a run was of, by its rollout log; 0 where that says nothing."""
    import pyarrow.parquet as pq

    files = sorted((run.folder / "rollouts").glob("val-*.parquet"))  # val-<step>-…
    last = [path for path in files if path.name.split("-")[1] == files[-1].name.split("-")[1]]
    return len(
        {
            image
            for path in last
            for image in pq.read_table(path, columns=["sample_id"])["sample_id"].to_pylist()
        }
    )


def t_interval(values: Sequence[float]) -> Score:
    """Mean with Student's 95 % interval: mean ± t(0.975, n - 1) s / √n, s with ddof 1.

    Returns:
        `n` counts the values. Without any all is NaN; of one, the ends are.
    """
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Score(mean, math.nan, math.nan, n)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Score(mean, mean - half, mean + half, n)


def verdict(expect: str, difference: Score, within: float = 0.0) -> str:
    """``holds`` where the whole interval of the difference is as expected, ``contradicted`` where none of it is, and
    ``does not show`` otherwise, also where there is no interval.

    Args:
        expect: ``higher``, ``lower`` or ``equal``.
        difference: with its interval.
        within: of ``equal``: differences from -within to +within are as expected.
    """
    low, high = difference.low, difference.high
    if expect == "lower":
        low, high = -high, -low
    holds, fails = (low > 0, high < 0) if expect != "equal" else (
        -within <= low and high <= within,
        low > within or high < -within,
    )  # fmt: skip
    return "holds" if holds else "contradicted" if fails else "does not show"


def dominated(points: Mapping[str, Sequence[float]]) -> set[str]:
    """Names of points that another one is at least as good as on every axis, and better on one; more is better."""
    return {
        name
        for name, point in points.items()
        for other in points.values()
        if all(b >= a for a, b in zip(point, other, strict=True)) and tuple(other) != tuple(point)
    }


def measure_title(measure: str) -> str:
    """As people write it."""
    measure, _, level = measure.partition("@")
    if level:
        return f"steps to {measure_title(measure).removesuffix(' (held out)')} {level}"
    names = {"dcscore": "DCScore", "captionqa": "CaptionQA", "caparena": "CapArena", "prism": "Prism"}
    first, _, name = measure.partition("/")
    if first == "val":
        return f"{TITLES.get(name, name)} (held out)"
    title = names.get(first, TITLES.get(first, first))
    return f"{title}, {name}" if name else title


def digits(scores: Sequence[Score]) -> int:
    """Decimals that figures of this size are written with."""
    known = [abs(score.value) for score in scores if math.isfinite(score.value)]
    return 3 if max(known, default=0) < 10 else 1
