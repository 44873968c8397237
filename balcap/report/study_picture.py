"""``study.png``: means with intervals and trade-offs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from balcap.report.figures import FAINT, PALETTE
from balcap.report.study import Study, dominated, measure_title
from balcap.report.study_curves import colours, draw_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(study: Study, file: Any) -> None:
    """The picture, a row for each group: means of the first measure with intervals and, where there are any, learning curves
    and the trade-off."""
    from matplotlib.figure import Figure as Picture

    parts = study.shown
    columns = 1 + bool(study.curve) + any(part.trade_off for part in parts)
    heights = [max(1.6 + 0.45 * len(part.arms), 4.5 if columns > 1 else 0) for part in parts]
    picture = Picture(figsize=(7 * columns, sum(heights)), dpi=110, layout="constrained")
    grid = picture.subplots(len(parts), columns, squeeze=False, height_ratios=heights)
    for part, axes in zip(parts, grid, strict=True):
        # Titles would lie on each other where points do.
        numbers = {name: f"{place}" for place, name in enumerate(part.trade_off, start=1)}
        _draw_dots(axes[0], part, f"{part.title}\n" if study.groups else "", numbers)
        if part.curve:
            draw_curves(axes[1], part, part.curve)
        if part.trade_off:
            _draw_trade_off(picture, axes[-1], part, numbers)
        elif columns > 1 + bool(part.curve):  # another group has one
            axes[-1].set_axis_off()
    picture.savefig(file, format="png")


def _draw_dots(axes: Axes, study: Study, title: str, numbers: Mapping[str, str]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if not study.measures:
        axes.text(0.5, 0.5, "no finished run", transform=axes.transAxes, ha="center", color=FAINT)
        return
    measure = study.measures[0]
    for place, (arm, colour) in enumerate(zip(study.arms, colours(study), strict=True)):
        score = arm.mean(measure)
        if not math.isfinite(score.value):
            axes.text(0.01, place, "missing", transform=axes.get_yaxis_transform(), va="center", color=FAINT)
            continue
        values = list(arm.values(measure).values())
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=4)
        half = None if math.isnan(score.low) else score.high - score.value
        axes.errorbar(score.value, place, xerr=half, fmt="o", color=colour, capsize=3, markersize=8)
    titles = [f"{arm.title}  {numbers.get(arm.name, '')}".rstrip() for arm in study.arms]
    axes.set_yticks(range(len(study.arms)), titles)
    axes.set_ylim(len(study.arms) - 0.5, -0.5)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_title(
        f"{title}{measure_title(measure)}: mean, 95 % over seeds, each seed", loc="left", fontsize=10
    )


def _draw_trade_off(picture: Any, axes: Axes, study: Study, numbers: Mapping[str, str]) -> None:
    points, worse = study.trade_off, dominated(study.trade_off)
    third = all(len(point) > 2 for point in points.values())
    xs, ys = [p[0] for p in points.values()], [p[1] for p in points.values()]
    colours = [p[2] for p in points.values()] if third else PALETTE[0]
    shown = axes.scatter(xs, ys, c=colours, s=90, zorder=3)
    if third:
        picture.colorbar(shown, ax=axes, label=measure_title(study.axes[2]))
    for name, x, y in zip(points, xs, ys, strict=True):
        if name in worse:
            axes.scatter([x], [y], s=22, c="white", zorder=4)
        axes.annotate(numbers[name], (x, y), (6, 6), textcoords="offset points", fontsize=9)
    axes.set_xlabel(measure_title(study.axes[0]))
    axes.set_ylabel(measure_title(study.axes[1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(
        "Trade-off, by the numbers on the left; hollow: dominated in every view", loc="left", fontsize=10
    )
