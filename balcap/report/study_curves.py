"""Learning curves of a study: a validation metric over the steps of training, means over seeds with intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from balcap.benchmarks.scores import Score
from balcap.report.figures import PALETTE, Figure, figure, scatter
from balcap.report.study import Arm, Study, measure_title, t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def colours(study: Study) -> list[str]:
    """Of its settings, in order, the same in all figures."""
    return [PALETTE[place % len(PALETTE)] for place in range(len(study.arms))]


def learning_curve(arm: Arm, measure: str) -> dict[float, Score]:
    """Step -> mean over seeds with its interval, for the steps that any finished run has a value of."""
    values: dict[float, list[float]] = {}
    for run in arm.runs.values():
        steps, found = ([], []) if run is None else run.metrics.get(measure, ([], []))
        for step, value in zip(steps, found, strict=True):
            if math.isfinite(value):
                values.setdefault(step, []).append(value)
    return {step: t_interval(values[step]) for step in sorted(values)}


def curves_chart(study: Study, measure: str) -> Figure:
    """All settings, for the page; the intervals are in what a point says."""
    data = []
    for arm, colour in zip(study.arms, colours(study), strict=True):
        curve = learning_curve(arm, measure)
        halves = [0.0 if math.isnan(one.low) else one.high - one.value for one in curve.values()]
        bars = {"type": "data", "array": halves, "thickness": 1, "width": 3, "visible": any(halves)}
        line = {"color": colour}
        means = [one.value for one in curve.values()]
        style = {"mode": "lines+markers", "name": arm.title, "line": line, "error_y": bars}
        data.append(scatter(list(curve), means, **style))
    return figure(f"{measure_title(measure)} while training", "step", "", data)


def draw_curves(axes: Axes, study: Study, measure: str) -> None:
    """The same for the picture, with intervals as bands."""
    for arm, colour in zip(study.arms, colours(study), strict=True):
        curve = learning_curve(arm, measure)
        steps = list(curve)
        axes.plot(
            steps, [one.value for one in curve.values()], "o-", color=colour, label=arm.title, markersize=3
        )
        low, high = [one.low for one in curve.values()], [one.high for one in curve.values()]
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("step")
    axes.set_title(f"{measure_title(measure)} while training: mean, 95 % over seeds", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)


def curve_table(study: Study, measure: str) -> list[list[str]]:
    """Rows of text, a head first: the reference's mean at each step after the first, and what the others differ from it,
    within each seed and then averaged, with the interval's half."""
    reference = study.arm(study.reference)
    steps = [step for step in learning_curve(reference, measure) if step]
    means = [f"{learning_curve(reference, measure)[step].value:.3f}" for step in steps]
    rows = [["", *(f"{step:g}" for step in steps)], [reference.title, *means]]
    of_reference = _by_seed(reference, measure)
    for arm in study.arms:
        if arm.name != study.reference:
            own = _by_seed(arm, measure)
            gaps = (
                [own[key] - of_reference[key] for key in own if key in of_reference and key[1] == s]
                for s in steps
            )
            rows.append([arm.title, *(_plus_minus(t_interval(gap)) for gap in gaps)])
    return rows


def _by_seed(arm: Arm, measure: str) -> dict[tuple[int, float], float]:
    """Seed and step -> the metric."""
    series = {seed: run.metrics.get(measure, ([], [])) for seed, run in arm.runs.items() if run is not None}
    return {
        (seed, step): value
        for seed, of_run in series.items()
        for step, value in zip(*of_run, strict=True)
        if math.isfinite(value)
    }


def _plus_minus(gap: Score) -> str:
    if not gap.n:
        return "–"
    return f"{gap.value:+.3f}" + ("" if math.isnan(gap.low) else f" ± {gap.high - gap.value:.3f}")
