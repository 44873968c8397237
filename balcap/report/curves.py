"""What is logged over training steps as charts, of one run, of several seeds, or of several settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from balcap.report.breakdown import pareto_front
from balcap.report.figures import FAINT, PALETTE, REWARDS, Figure, figure, scatter
from balcap.report.run import TITLES, Run, Series, leaves

POINTS = 600
"""Of one line; a longer one is averaged."""

SEEDS = ("seed_everything", "run_dir", "resume", "ckpt_path", "model.judge.cache", "model.judge.concurrency")
"""Settings that do not make another setting of a run."""


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: what sets it apart from the others, or the names of its runs.
        runs: of it.
        colour: of its lines.
    """

    label: str
    runs: list[Run]
    colour: str


def settings_of(runs: Sequence[Run]) -> list[Setting]:
    """Runs by setting, in the order in which they were named."""
    own = [{name: value for name, value in leaves(run.settings) if name not in SEEDS} for run in runs]
    keys = [json.dumps(sorted(one.items()), default=str) for one in own]
    grouped = {key: [i for i, other in enumerate(keys) if other == key] for key in keys}
    varying = sorted({name for one in own for name in one if any(o.get(name) != one[name] for o in own)})
    labels = []
    for members in grouped.values():
        differing = [f"{name.split('.')[-1]} {own[members[0]].get(name)}" for name in varying][:3]
        names = ", ".join(runs[i].name for i in members)
        labels.append(names if not differing or len(members) == 1 else f"{', '.join(differing)} ({names})")
    return [
        Setting(label, [runs[i] for i in members], PALETTE[n % len(PALETTE)])
        for n, (label, members) in enumerate(zip(labels, grouped.values(), strict=True))
    ]


def curves(settings: Sequence[Setting]) -> list[Figure]:
    """Everything that is logged over training steps; what no run has logged is left out."""
    names = tuple(
        dict.fromkeys(name for setting in settings for run in setting.runs for name in run.reward_names)
    )
    rewards = {f"train/{name}": TITLES.get(name, name) for name in (*names, "b_capscore")}
    panels: list[tuple[str, str, Mapping[str, str]]] = [
        ("Rewards, before the length mask", "score", rewards),
        ("Supervised: negative log-likelihood", "nats per token", {"train/nll": "NLL"}),
        ("Length ratio ρ", "caption / reference tokens", {"train/length_ratio": "length ratio"}),
        ("Caption length", "tokens", {"train/caption_tokens": "caption tokens"}),
        ("KL to the reference", "nats per token", {"train/kl": "KL"}),
        ("Entropy of the policy", "nats per token", {"train/entropy": "entropy"}),
        ("Spread within groups", "standard deviation", {f"train/reward_std/{name}": name for name in names}),
        ("Groups without spread", "share", {f"train/zero_variance/{name}": name for name in names}),
        ("Captions outside the length mask's bounds", "share", {"train/length_masked": "outside"}),
        ("Judgments missing", "per step", {"judge/failed": "missing"}),
        ("Judge, dollars so far", "US dollars", {"judge/cost_usd": "dollars"}),
        (
            "Seconds of a step",
            "seconds",
            {
                "time/step_s": "whole step",
                "time/rollout_s": "rollout",
                "time/judge_wait_s": "waiting for the judge",
                "time/update_s": "update",
                "time/sync_s": "sync",
            },
        ),
        ("Gradient norm", "before clipping", {"train/grad_norm": "gradient norm"}),
        (
            "Habits of held-out captions",
            "share",
            {"val/repeated_4grams": "repeated 4-grams", "val/meta_commentary": "meta commentary"},
        ),
    ]
    panels += [
        (f"Benchmark: {name}", "score", {f"bench/{name}": name})
        for name in sorted(
            {n.split("/", 1)[1] for s in settings for r in s.runs for n in r.metrics if _is_score(n)}
        )
    ]
    figures = []
    for title, unit, metrics in panels:
        there = {
            m: label for m, label in metrics.items() if any(m in r.metrics for s in settings for r in s.runs)
        }
        if len(settings) == 1 and there:
            figures.append(_one_setting(title, unit, there, settings[0]))
        elif there:
            figures += [
                _several_settings(title if len(there) == 1 else f"{title}: {label}", unit, metric, settings)
                for metric, label in there.items()
            ]
    return figures


def _is_score(name: str) -> bool:
    return name.startswith("bench/") and not name.endswith(("_low", "_high"))


def _one_setting(title: str, unit: str, metrics: Mapping[str, str], setting: Setting) -> Figure:
    """A line per metric."""
    data: list[Figure] = []
    for place, (metric, label) in enumerate(metrics.items()):
        colour = REWARDS.get(metric.split("/")[-1], PALETTE[place % len(PALETTE)])
        data += _lines(label, metric, setting.runs, colour)
    return figure(title, "optimizer steps", unit, data, _band(metrics, setting.runs[0]))


def _several_settings(title: str, unit: str, metric: str, settings: Sequence[Setting]) -> Figure:
    """A line per setting."""
    data = [line for s in settings for line in _lines(s.label, metric, s.runs, s.colour)]
    return figure(title, "optimizer steps", unit, data, _band({metric: ""}, settings[0].runs[0]))


def _lines(label: str, metric: str, runs: Sequence[Run], colour: str) -> list[Figure]:
    """The metric of one setting: mean and standard deviation over its runs, or a smoothed line over the raw one of a single
    run; validations as dots."""
    series = [_known(run.metrics[metric]) for run in runs if metric in run.metrics]
    series = [one for one in series if one[0]]
    if not series:
        return []
    name = metric.split("/", 1)[1]
    held_out = [_known(run.metrics[f"val/{name}"]) for run in runs if f"val/{name}" in run.metrics]
    own = {"line": {"color": colour, "width": 2}, "legendgroup": label, "name": label}
    data: list[Figure] = []
    if len(series) == 1:
        steps, values = _shortened(series[0])
        if len(steps) > 20:
            raw = {**own, "line": {"color": colour, "width": 1}, "opacity": 0.25}
            data.append(scatter(steps, values, **raw, showlegend=False, hoverinfo="skip"))
        data.append(scatter(steps, smoothed(values) if len(steps) > 20 else values, **own, mode=_mode(steps)))
    else:
        steps, mean, std = _mean_and_std([_shortened(one) for one in series])
        edge = {**own, "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        data.append(scatter(steps, [m - s for m, s in zip(mean, std, strict=True)], **edge))
        data.append(
            scatter(steps, [m + s for m, s in zip(mean, std, strict=True)], **edge)
            | {"fill": "tonexty", "fillcolor": _transparent(colour)}
        )
        data.append(scatter(steps, mean, **own, mode=_mode(steps)))
    if not metric.startswith("val/") and held_out:
        dots = {
            "mode": "markers",
            "marker": {"color": colour, "size": 9, "line": {"color": "white", "width": 1.5}},
        }
        steps = [step for one in held_out for step in one[0]]
        values = [value for one in held_out for value in one[1]]
        name = f"{label}, held out"
        data.append(scatter(steps, values, **dots, name=name, legendgroup=label, showlegend=False))
    return data


def trade_off(settings: Sequence[Setting], x: str = "precision", y: str = "recall") -> Figure | None:
    """The way of each run through precision and recall, its validations as diamonds, and the Pareto front of all runs'
    smoothed steps and validations; None without both rewards."""
    data: list[Figure] = []
    points: list[tuple[float, float]] = []
    for setting in settings:
        for place, run in enumerate(setting.runs):
            for stage, style in (("train", {"mode": "lines"}), ("val", {"mode": "markers"})):
                both = _joined(run, f"{stage}/{x}", f"{stage}/{y}", f"{stage}/linguistic")
                if not both:
                    continue
                steps, xs, ys, ls = (list(column) for column in zip(*both, strict=True))
                if stage == "train" and len(xs) > 20:
                    xs, ys = smoothed(xs), smoothed(ys)
                points += list(zip(xs, ys, strict=True))
                marker = {"symbol": "diamond", "size": 11, "color": setting.colour}
                text = [f"step {s:.0f}, linguistic {ll:.3f}" for s, ll in zip(steps, ls, strict=True)]
                data.append(
                    scatter(
                        xs, ys, **style, name=setting.label, legendgroup=setting.label, text=text,
                        line={"color": setting.colour, "width": 1.5}, marker=marker,
                        showlegend=stage == "train" and place == 0, hovertemplate="%{x:.3f}, %{y:.3f}<br>%{text}",
                    )
                )  # fmt: skip
    if len(points) < 3:
        return None
    front = pareto_front([(round(a, 4), round(b, 4)) for a, b in points])
    xs, ys = [a for a, _ in front], [b for _, b in front]
    line = {"dash": "dot", "color": FAINT, "shape": "vh"}
    data.append(scatter(xs, ys, mode="lines", name="Pareto front", line=line, hoverinfo="skip"))
    return figure("Trade-off of precision and recall", x, y, data)


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twentieth of the run, cut off at its ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])
    at = np.arange(len(values))
    low, high = np.maximum(0, at - half), np.minimum(len(values), at + half + 1)
    return [float(value) for value in (sums[high] - sums[low]) / (high - low)]


def _mode(steps: Sequence[float]) -> str:
    return "lines+markers" if len(steps) < 5 else "lines"


def _known(series: Series) -> Series:
    pairs = [(step, value) for step, value in zip(*series, strict=True) if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _shortened(series: Series) -> Series:
    steps, values = series
    if len(steps) <= POINTS:
        return series
    parts = np.array_split(np.arange(len(steps)), POINTS)
    return (
        [float(np.mean(np.asarray(steps)[part])) for part in parts],
        [float(np.mean(np.asarray(values)[part])) for part in parts],
    )


def _mean_and_std(series: Sequence[Series]) -> tuple[list[float], list[float], list[float]]:
    """At every step of the longest run, over the runs that have come so far; each smoothed, between its steps linear."""
    grid = max((steps for steps, _ in series), key=len)
    rows = []
    for steps, values in series:
        line = smoothed(values) if len(values) > 20 else values
        row = np.interp(grid, steps, line)
        row[(np.asarray(grid) < steps[0]) | (np.asarray(grid) > steps[-1])] = np.nan
        rows.append(row)
    stacked = np.stack(rows)
    count = (~np.isnan(stacked)).sum(0)
    mean = np.nansum(stacked, 0) / np.maximum(count, 1)
    std = np.sqrt(np.nansum((stacked - mean) ** 2, 0) / np.maximum(count - 1, 1))
    return list(grid), mean.tolist(), std.tolist()


def _joined(run: Run, *names: str) -> list[tuple[float, ...]]:
    """(step, value of each metric) at the steps where the first two are there; the third is NaN where it is not."""
    columns = [dict(zip(*run.metrics.get(name, ([], [])), strict=True)) for name in names]
    steps = [step for step, value in columns[0].items() if not math.isnan(value)]
    steps = [step for step in steps if not math.isnan(columns[1].get(step, math.nan))]
    return [(step, *(column.get(step, math.nan) for column in columns)) for step in sorted(steps)]


def _band(metrics: Iterable[str], run: Run) -> list[Figure]:
    """The length mask's bounds, behind a length ratio."""
    if "train/length_ratio" not in metrics or not run.has_mask:
        return []
    low, high = run.bounds
    box = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high, "layer": "below"}
    return [
        box | {"fillcolor": "rgba(63,127,208,0.10)", "line": {"color": "rgba(63,127,208,0.45)", "width": 1}}
    ]


def _transparent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
