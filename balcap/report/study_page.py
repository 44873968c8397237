"""What a study ends in: ``study.md``, ``study.csv``, ``study.png`` and ``study.html``."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from balcap.benchmarks.scores import Score
from balcap.report.figures import Figure, figure, scatter
from balcap.report.html import Charts, rendered
from balcap.report.markdown import table
from balcap.report.study import Study, Verdict, digits, dominated, measure_title
from balcap.report.study_curves import colours, curve_table, curves_chart
from balcap.report.study_picture import draw
from balcap.utils.files import atomic_write

INTERVALS = (
    "Figures are means over seeds with Student's 95 % interval; differences are taken within each seed and then averaged. "
    "Intervals are of the seeds alone, and not corrected for how many are looked at."
)


NAMED = 6
"""Runs that are named where many are not finished."""


def write_study(study: Study, out: Path) -> list[Path]:
    """Write the four files into a folder; each is replaced whole or not at all.

    Returns:
        Their paths.
    """
    paths = [out / f"study.{kind}" for kind in ("md", "csv", "png", "html")]
    with atomic_write(paths[0]) as file:
        file.write(markdown(study))
    with atomic_write(paths[1], newline="") as file:
        csv.writer(file).writerows(rows(study))
    with atomic_write(paths[2], "wb") as file:
        draw(study, file)
    with atomic_write(paths[3]) as file:
        file.write(html(study, out))
    return paths


def attention(study: Study) -> Iterator[str]:
    """What a reader must know before the numbers."""
    if len(study.seeds) == 1:
        yield "One seed: there is no interval over seeds, and no claim can hold or be contradicted."
    yield from _unfinished(study)
    for measure, meant in study.unknown.items():
        yield f"{measure}: no finished run has this measure." + (f" Is it {meant}?" if meant else "")
    for measure in study.measures:
        if measure.partition("@")[0] in study.unknown:
            continue
        if gaps := study.missing(measure):
            of = ", ".join(f"{title} {gap}" for title, gap in gaps.items())
            what = ": never reached in" if "@" in measure else " is missing for"
            yield f"{measure_title(measure)}{what} finished runs: {of}."
    if not study.measures:
        yield "No finished run has a figure yet."


def _unfinished(study: Study) -> Iterator[str]:
    """A line for each reason why figures are missing, with the first runs that have it."""
    names: dict[str, list[str]] = {}
    for name, why in (study.unfinished or {}).items():
        names.setdefault(why, []).append(name)
    for why, of in names.items():
        more = f" and {len(of) - NAMED} more" if len(of) > NAMED else ""
        yield f"{', '.join(of[:NAMED])}{more}: {why}; {'its' if len(of) == 1 else 'their'} figures are missing."


def rows(study: Study) -> Iterator[list[Any]]:
    """Of the CSV: a head, then a row for each group, run and measure; what is missing is an empty cell."""
    yield [
        "group", "run", "measure", "mean", "low", "high", "seeds", "missing_seeds",
        "difference", "difference_low", "difference_high", "difference_seeds", "images",
        *(f"seed_{seed}" for seed in study.seeds),
    ]  # fmt: skip
    for part in study.parts:
        yield from _rows(part, part.title if study.groups else "", study.seeds)


def _rows(study: Study, title: str, seeds: Sequence[int]) -> Iterator[list[Any]]:
    for arm in study.arms:
        for measure in study.measures:
            values, mean = arm.values(measure), arm.mean(measure)
            gap: list[Any] = [""] * 4
            if arm.name != study.reference:
                one = study.difference(arm.name, measure)
                gap = [_cell(one.value), _cell(one.low), _cell(one.high), one.n]
            yield [
                title, arm.name, measure, _cell(mean.value), _cell(mean.low), _cell(mean.high), mean.n,
                len(arm.runs) - mean.n, *gap, _span(arm.images(measure)),
                *(_cell(values.get(seed, math.nan)) for seed in seeds),
            ]  # fmt: skip


def markdown(study: Study) -> str:
    """The page as text."""
    parts = [f"# {study.title}", *(f"> {line}" for line in attention(study))]
    if study.measures:
        parts += ["![Means with intervals](study.png)", INTERVALS]
        for part in study.shown:
            parts += _tables_as_text(part, titled=bool(study.groups))
    if study.verdicts:
        head = ["claim", "verdict", "difference", "source"]
        lines = [
            [v.claim.claim, f"**{v.word}**", said(study, v), v.claim.source or ""] for v in study.verdicts
        ]
        parts += ["## Claims", table(head, lines)]
    return "\n\n".join(parts) + "\n"


def _tables_as_text(study: Study, titled: bool) -> Iterator[str]:
    """Of one group, or of all there is."""
    means, differences = tables(study)
    if titled:
        yield f"## {study.title}"
    yield table(means[0], means[1:])
    if study.curve:
        yield f"{'###' if titled else '##'} {measure_title(study.curve)} by step, and differences with half their interval"
        rows = curve_table(study, study.curve)
        yield table(rows[0], rows[1:])
    if len(differences) > 1:
        yield f"{'###' if titled else '##'} Difference to {study.arm(study.reference).title}"
        yield table(differences[0], differences[1:])


def tables(study: Study) -> tuple[list[list[str]], list[list[str]]]:
    """Means, and differences to the reference, each with a head: settings x measures."""
    columns = [f"{measure_title(m)}{_of_images(study, m)}" for m in study.measures]
    places = {m: digits([arm.mean(m) for arm in study.arms]) for m in study.measures}
    means, gaps = [["", *columns]], [["", *columns]]
    for arm in study.arms:
        scores = [arm.mean(m) for m in study.measures]
        means.append(
            [
                arm.title,
                *(
                    f"{score_text(one, places[m])}{_missing(one, len(arm.runs))}"
                    for m, one in zip(study.measures, scores, strict=True)
                ),
            ]
        )
        if arm.name != study.reference:
            found = [study.difference(arm.name, m) for m in study.measures]
            cells = [score_text(g, places[m], "+") for m, g in zip(study.measures, found, strict=True)]
            gaps.append([arm.title, *cells])
    return means, gaps


def score_text(score: Score, places: int, sign: str = "") -> str:
    """Such as ``0.812 [0.790, 0.834]``; a dash where it is missing, no brackets where there is no interval."""
    if not math.isfinite(score.value):
        return "–"
    value, low, high = (f"{x:{sign}.{places}f}" for x in (score.value, score.low, score.high))
    return value if math.isnan(score.low) else f"{value} [{low}, {high}]"


def said(study: Study, judged: Verdict) -> str:
    """The numbers behind a verdict."""
    claim, gap = judged.claim, judged.difference
    against = study.arm(claim.against or study.reference)
    places = digits([study.arm(claim.run).mean(claim.measure), against.mean(claim.measure)])
    what = f"{measure_title(claim.measure)}, {study.arm(claim.run).title} − {against.title}"
    within = f", within ±{claim.within:g}" if claim.expect == "equal" else ""
    seeds = f"{gap.n} seed{'' if gap.n == 1 else 's'}"
    return f"{what}: {score_text(gap, places, '+')} (expected {claim.expect}{within}; {seeds})"


def html(study: Study, out: Path) -> str:
    """The page, which needs no network; it links to the reports in the run folders, as seen from `out`."""
    charts = Charts()
    content = {
        "title": study.title,
        "sections": [("charts", "Figures"), ("claims", "Claims"), ("runs", "Runs")],
        "attention": list(attention(study)),
        "note": INTERVALS,
        "parts": [_part(part, charts, bool(study.groups)) for part in study.shown],
        "claims": [(v, said(study, v)) for v in study.verdicts],
        "runs": _runs(study, out),
    }
    return rendered("study.html.jinja", content, charts)


def _part(study: Study, charts: Charts, titled: bool) -> dict[str, Any]:
    """Tables and charts of one group, or of all there is; a group has no charts of further measures."""
    means, differences = tables(study)
    measures = study.measures[:1] if titled else study.measures
    drawn = [
        *([curves_chart(study, study.curve)] if study.curve else []),
        *([_trade_off(study)] if study.trade_off else []),
        *(_dots(study, m) for m in measures),
    ]
    return {
        "title": study.title if titled else None,
        "means": means,
        "differences": differences,
        "reference": study.arm(study.reference).title,
        "charts": [charts.add(one) for one in drawn],
    }


def _runs(study: Study, out: Path) -> list[dict[str, Any]]:
    found = []
    for arm in study.arms:
        for seed, run in arm.runs.items():
            name = f"{arm.name}-{seed}"
            usd = None if run is None else run.usd
            report = None if run is None else run.folder / "report.html"
            found.append(
                {
                    "name": name,
                    "title": arm.title,
                    "seed": seed,
                    "state": (study.unfinished or {}).get(name, "finished"),
                    "steps": "–" if run is None else f"{run.steps:,}",
                    "usd": "–" if usd is None else f"{usd:,.2f}",
                    "report": Path(os.path.relpath(report, out)).as_posix()
                    if report and report.is_file()
                    else None,
                }
            )
    return found


def _dots(study: Study, measure: str) -> Figure:
    """Means of all settings on one measure, with intervals."""
    data = []
    for arm, colour in zip(study.arms, colours(study), strict=True):
        score = arm.mean(measure)
        half = 0.0 if math.isnan(score.low) else score.high - score.value
        style = {"color": colour, "size": 10}
        bar = {"type": "data", "array": [half], "color": colour, "visible": half > 0}
        data.append(scatter([score.value], [0], mode="markers", name=arm.title, marker=style, error_x=bar))
        data[-1]["y"] = [arm.title]
    chart = figure(measure_title(measure), "", "", data)
    chart["layout"] |= {"showlegend": False}
    chart["layout"]["yaxis"] |= {"autorange": "reversed", "type": "category"}
    return chart


def _trade_off(study: Study) -> Figure:
    """Two measures against each other, a third as colour; settings that another dominates are hollow."""
    points, worse = study.trade_off, dominated(study.trade_off)
    third = all(len(point) > 2 for point in points.values())
    marker: Figure = {"size": 13, "symbol": ["circle-open" if n in worse else "circle" for n in points]}
    if third:
        bar = {"title": {"text": measure_title(study.axes[2])}}
        marker |= {"color": [point[2] for point in points.values()], "colorscale": "Viridis", "colorbar": bar}
    xs, ys = [p[0] for p in points.values()], [p[1] for p in points.values()]
    titles = [study.arm(name).title for name in points]
    data = [
        scatter(
            xs,
            ys,
            mode="markers+text",
            text=[str(place) for place in range(1, len(titles) + 1)],  # titles would lie on each other
            hovertext=titles,
            textposition="top center",
            marker=marker,
            name="",
        )
    ]
    chart = figure("Trade-off", measure_title(study.axes[0]), measure_title(study.axes[1]), data)
    chart["note"] = _trade_off_note(study, worse)
    return chart


def _trade_off_note(study: Study, worse: set[str]) -> str:
    views = [measure_title(axis) for axis in study.axes[: len(next(iter(study.trade_off.values())))]]
    names = ", ".join(study.arm(name).title for name in study.trade_off if name in worse)
    numbered = "; ".join(
        f"{place} {study.arm(name).title}" for place, name in enumerate(study.trade_off, start=1)
    )
    hollow = f"another mean is at least as good in {', '.join(views)}, and better in one ({names or 'none'})"
    return f"{numbered}. Hollow: {hollow}."


def _of_images(study: Study, measure: str) -> str:
    span = _span([count for arm in study.arms for count in arm.images(measure)])
    return f", {span} images" if span else ""


def _span(counts: Sequence[int]) -> str:
    """Such as ``200``, or ``198–200``; empty without any."""
    if not counts:
        return ""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"


def _missing(score: Score, seeds: int) -> str:
    return f" ({score.n} of {seeds} seeds)" if score.n < seeds else ""


def _cell(value: float) -> float | str:
    return value if math.isfinite(value) else ""
