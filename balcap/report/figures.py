"""The report's charts: Plotly figures as plain data, drawn by the page itself.

Colours of text and grid are the page's, which knows whether it is light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from balcap.report.breakdown import Bin, Share
from balcap.report.run import TITLES, Run

Figure = dict[str, Any]

BLUE, ORANGE, GREEN, VIOLET = "#3f7fd0", "#e08a2e", "#3a9d6b", "#9467bd"
PALETTE = (BLUE, ORANGE, GREEN, VIOLET, "#d0507a", "#4bb1c4", "#a3883f", "#8a8f98")
REWARDS = {"precision": BLUE, "recall": ORANGE, "linguistic": GREEN, "b_capscore": VIOLET}
GOOD, BAD, FAINT = "#3a9d6b", "#d1495b", "#8a8f98"
COUNTS = ("share", "seconds", "per step", "US dollars", "standard deviation")
"""Units whose axes begin at 0."""


def shares(title: str, before: Sequence[Share], after: Sequence[Share]) -> Figure | None:
    """Which share of statements of each kind is right, before and after; bars carry how many a caption has of them."""
    kinds = [share.kind for share in after] + [
        s.kind for s in before if s.kind not in {a.kind for a in after}
    ]
    data = []
    for label, of, colour in (("before", before, "#a9b3c1"), ("after", after, BLUE)):
        there = {share.kind: share for share in of}
        shown = [there[kind] for kind in kinds if kind in there]
        if shown:
            data.append(
                {
                    "type": "bar",
                    "name": label,
                    "x": [share.kind for share in shown],
                    "y": [share.right for share in shown],
                    "text": [f"{share.per_caption:.1f}" for share in shown],
                    "textposition": "outside",
                    "textangle": 0,
                    "hovertemplate": "%{x}: %{y:.1%} right, %{text} per caption",
                    "marker": {"color": colour},
                }
            )
    if not data:
        return None
    chart = figure(title, "", "share that is right", data)
    chart["layout"] |= {"barmode": "group"}
    chart["layout"]["yaxis"] |= {"range": [0, 1.12], "tickformat": ".0%"}
    return chart


def lengths(before: Sequence[Bin], after: Sequence[Bin], bounds: tuple[float, float] | None) -> Figure | None:
    """Mean rewards of captions by their length ratio after training, with the number of captions as bars."""
    if not after:
        return None
    label = [_range(one.low, one.high) for one in after]
    names = [name for name in after[0].means if not all(math.isnan(one.means[name]) for one in after)]
    data: list[Figure] = []
    for which, bins, colour in (("before", before, "#c9ced6"), ("after", after, "#9db7da")):
        there = {_range(one.low, one.high): one.n for one in bins}
        at = [name for name in (_range(a, b) for a, b in _edges(before, after)) if name in there]
        if at:
            data.append(
                {
                    "type": "bar", "name": which, "x": at, "y": [there[name] for name in at], "yaxis": "y2",
                    "marker": {"color": colour}, "opacity": 0.45,
                }
            )  # fmt: skip
    for place, name in enumerate(names):
        colour = REWARDS.get(name, PALETTE[place % len(PALETTE)])
        values = [number(one.means[name]) for one in after]
        data.append(
            scatter(label, values, mode="lines+markers", name=TITLES.get(name, name), line={"color": colour})
        )
    chart = figure("Rewards by length", "caption / reference tokens", "mean score after", data)
    order = [_range(a, b) for a, b in _edges(before, after)]
    chart["layout"]["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": order}
    chart["layout"]["yaxis"] |= {"range": [0, 1.05]}
    chart["layout"] |= {
        "barmode": "group",
        "yaxis2": {"overlaying": "y", "side": "right", "showgrid": False, "title": {"text": "captions"}},
    }
    if bounds is not None:
        chart["note"] = f"The length mask counts the linguistic reward from {bounds[0]:g} to {bounds[1]:g}."
    return chart


def struck(ratio: np.ndarray, masked: np.ndarray, bounds: tuple[float, float]) -> Figure | None:
    """Training captions by length ratio: those whose linguistic reward counted and those that the mask struck."""
    known = ~np.isnan(ratio)
    if not known.any():
        return None
    edges = np.linspace(0, max(2.5, min(5.0, float(ratio[known].max()))), 51)
    middles = ((edges[1:] + edges[:-1]) / 2).round(3).tolist()
    data = []
    for label, which, colour in (("counted", ~masked, GOOD), ("struck", masked, BAD)):
        counts = np.histogram(np.clip(ratio[known & which], 0, edges[-1]), edges)[0].tolist()
        data.append({"type": "bar", "name": label, "x": middles, "y": counts, "marker": {"color": colour}})
    chart = figure("What the length mask struck", "caption / reference tokens", "training captions", data)
    chart["layout"] |= {"barmode": "stack", "bargap": 0.02, "shapes": [_vertical(x) for x in bounds]}
    return chart


def latencies(calls: Mapping[str, Sequence[float]]) -> Figure | None:
    """Seconds of calls to the judge, by kind of judgment."""
    data = [
        {
            "type": "box",
            "name": task,
            "x": [rounded(s) for s in seconds],
            "marker": {"color": colour},
            "boxpoints": False,
        }
        for (task, seconds), colour in zip(sorted(calls.items()), PALETTE * (1 + len(calls)), strict=False)
    ]
    if not data:
        return None
    chart = figure("Latency of judge calls", "seconds, logarithmic", "", data)
    chart["layout"]["xaxis"] |= {"type": "log"}
    chart["layout"] |= {"showlegend": False}
    return chart


def benchmarks(runs: Sequence[Run]) -> Figure | None:
    """Scores of ``test`` with their 95 % intervals: of each run's policy, and of the captioners it was compared with."""
    shown = {run.name if len(runs) > 1 else "policy": run.benchmarks for run in runs}
    others = {name: scores for run in runs for name, scores in run.captioners.items() if name != "policy"}
    data = []
    for (name, scores), colour in zip(
        (others | shown).items(), ("#a9b3c1",) * len(others) + PALETTE * 9, strict=False
    ):
        rows = {benchmark: row for benchmark, row in scores.items() if "/" not in benchmark and _scored(row)}
        if rows:
            low, high = (
                [sign * (row[end] - row["score"]) if row.get(end) is not None else 0 for row in rows.values()]
                for end, sign in (("low", -1), ("high", 1))
            )
            data.append(
                {
                    "type": "bar",
                    "name": name,
                    "x": list(rows),
                    "y": [row["score"] for row in rows.values()],
                    "error_y": {
                        "type": "data", "symmetric": False, "array": high, "arrayminus": low, "color": FAINT,
                    },
                    "marker": {"color": colour},
                }
            )  # fmt: skip
    if not data:
        return None
    chart = figure("Benchmarks", "", "score", data)
    chart["layout"] |= {"barmode": "group"}
    return chart


def _scored(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("score"), int | float)


def figure(title: str, x: str, y: str, data: list[Figure], shapes: Sequence[Figure] = ()) -> Figure:
    layout: Figure = {
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {
            "title": {"text": y},
            "automargin": True,
            "rangemode": "tozero" if y in COUNTS else "normal",
        },
        "showlegend": sum(1 for one in data if one.get("showlegend", True)) > 1,
    }
    if shapes:
        layout["shapes"] = list(shapes)
    return {"title": title, "data": data, "layout": layout}


def scatter(x: Iterable[Any], y: Iterable[Any], **style: Any) -> Figure:
    numbers = [number(value) for value in y]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [number(v) if isinstance(v, float) else v for v in x],
        "y": numbers,
    } | style


def number(value: float | None) -> float | None:
    """With five digits; None for what JSON has no word for."""
    return None if value is None or not math.isfinite(value) else rounded(value)


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _vertical(x: float) -> Figure:
    line = {"color": FAINT, "dash": "dot"}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _range(low: float, high: float) -> str:
    return f"{low:g}–{high:g}" if math.isfinite(high) else f"over {low:g}"


def _edges(*bins: Sequence[Bin]) -> list[tuple[float, float]]:
    return sorted({(one.low, one.high) for some in bins for one in some})
