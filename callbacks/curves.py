"""The curves of a run as one picture, from the ``metrics.csv`` that every run writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from balcap.report.curves import smoothed
from balcap.report.run import Series, read_metrics
from balcap.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, GRID = "#2b2b2b", "#8a8a8a", "#e4e4e4"
BLUE, ORANGE, GREEN = "#3566a8", "#d9772b", "#3c9467"
REWARDS = {"precision": BLUE, "recall": ORANGE, "linguistic": GREEN, "b_capscore": INK}
STAGES = {"rollout": "#7a9cc6", "judge_wait": "#e3a35c", "update": "#7fb89a", "sync": "#b9a6c9"}


class RunCurves(Callback):
    """Writes ``curves.png`` beside the run's ``metrics.csv`` when training ends, also by an exception.

    Needs Lightning's `CSVLogger` among the trainer's loggers and does nothing without it. A picture that
    cannot be drawn is a warning, never the end of a run.

    Args:
        filename: name of the picture, in the folder of ``metrics.csv``.
    """

    def __init__(self, filename: str = "curves.png") -> None:
        self.filename = filename

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plot(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._plot(trainer)

    def _plot(self, trainer: Trainer) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        for logger in loggers if trainer.is_global_zero else ():
            metrics = Path(logger.log_dir) / "metrics.csv"
            try:
                logger.save()
                if metrics.is_file():
                    plot_curves(metrics, metrics.with_name(self.filename))
            except (OSError, ValueError) as error:
                rank_zero_warn(f"could not draw {metrics.with_name(self.filename)}: {error}")


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Draws rewards, lengths, KL, entropy and the time of a step over training steps.

    Args:
        metrics_csv: as Lightning's `CSVLogger` writes it: a ``step`` column, sparse columns of metrics.
        out: the PNG; written whole or not at all.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a column has values that are not numbers.

    A metric that was not logged is left out, a panel without any says so. The legend tells which share of the values
    of a metric is missing (NaN).
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    series = read_metrics(metrics_csv)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14)
    # A figure of its own instead of pyplot: no global state, and never a display.
    figure = Figure(figsize=(15, 8.4), dpi=110, facecolor="white", layout=layout)
    grid = figure.add_gridspec(2, 3)
    _plot_rewards(figure.add_subplot(grid[0, :2]), series)
    _plot_length_ratio(figure.add_subplot(grid[0, 2]), series)
    _plot_tokens(figure.add_subplot(grid[1, 0]), series)
    _plot_policy(figure.add_subplot(grid[1, 1]), series)
    _plot_time(figure.add_subplot(grid[1, 2]), series)

    with atomic_write(out, "wb") as file:
        figure.savefig(file, format="png")


def _plot_rewards(axes: Axes, series: dict[str, Series]) -> None:
    for name, colour in REWARDS.items():
        _line(axes, series.get(f"train/{name}"), colour, "b-CapScore" if name == "b_capscore" else name)
        _dots(axes, series.get(f"val/{name}"), colour)
    if any(f"val/{name}" in series for name in REWARDS):
        _dots(axes, ([], []), FAINT, "validation")
    _finish(axes, "Rewards (before the length mask)", "score", limits=(0, 1.02))


def _plot_length_ratio(axes: Axes, series: dict[str, Series]) -> None:
    low, high = series.get("train/tau_low"), series.get("train/tau_high")
    if low and high and len(low[0]) == len(high[0]):
        axes.fill_between(low[0], low[1], high[1], color="#eef2f7", zorder=0, label="linguistic counts: τ")
        for _, bound in (low, high):
            axes.plot(low[0], bound, color="#b8c6d8", linewidth=1, zorder=1)
    _line(axes, series.get("train/length_ratio"), BLUE, "caption / reference")
    _finish(axes, "Length ratio ρ", "tokens / tokens")


def _plot_tokens(axes: Axes, series: dict[str, Series]) -> None:
    _line(axes, series.get("train/caption_tokens"), GREEN, "training")
    _dots(axes, series.get("val/caption_tokens"), FAINT, "validation")
    _finish(axes, "Caption length", "tokens")


def _plot_policy(axes: Axes, series: dict[str, Series]) -> None:
    _line(axes, series.get("train/kl"), BLUE, "KL to the reference")
    entropy = series.get("train/entropy")
    if not entropy or "train/kl" not in series:
        _line(axes, entropy, ORANGE, "entropy")
        _finish(axes, "Policy", "nats per token")
        return
    right = axes.twinx()
    _line(right, entropy, ORANGE, "entropy")
    # One legend for both axes; the axes carry the colours of their curves.
    axes.plot([], [], color=ORANGE, linewidth=2, label="entropy")
    _finish(axes, "Policy", "KL, nats per token")
    right.set_ylabel("entropy, nats per token", color=ORANGE)
    right.tick_params(axis="y", colors=ORANGE, length=0)
    right.spines[["top", "left", "bottom", "right"]].set_visible(False)
    axes.yaxis.label.set_color(BLUE)
    axes.tick_params(axis="y", colors=BLUE)


def _plot_time(axes: Axes, series: dict[str, Series]) -> None:
    parts = {name: series[f"time/{name}_s"] for name in STAGES if f"time/{name}_s" in series}
    steps = sorted({step for part_steps, _ in parts.values() for step in part_steps})
    base = [0.0] * len(steps)
    for name, (part_steps, values) in parts.items():
        at = dict(zip(part_steps, smoothed(values), strict=True))
        top = [bottom + at.get(step, 0.0) for bottom, step in zip(base, steps, strict=True)]
        style: dict[str, Any] = {
            "color": STAGES[name],
            "label": name.replace("judge_wait", "waiting for the judge"),
        }
        if len(steps) == 1:  # an area needs two points
            axes.bar(steps, values, bottom=base, width=0.5, **style)
        else:
            axes.fill_between(steps, base, top, linewidth=0, **style)
        base = top
    if whole := series.get("time/step_s"):
        marker = "o" if len(whole[0]) == 1 else None
        axes.plot(whole[0], smoothed(whole[1]), color=INK, linewidth=1.5, marker=marker, label="whole step")
    _finish(axes, "Time of a step", "seconds", limits=(0, None))


def _dots(axes: Axes, points: Series | None, colour: str, label: str | None = None) -> None:
    """What was measured now and then."""
    if points is not None:
        edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 1.2}
        axes.plot(*points, "o", color=colour, markersize=8, zorder=5, label=label, **edge)  # none at NaN


def _line(axes: Axes, points: Series | None, colour: str, label: str) -> None:
    """A smoothed curve over its raw values."""
    if points is None:
        return
    known = [(step, value) for step, value in zip(*points, strict=True) if not math.isnan(value)]
    steps, values = [step for step, _ in known], [value for _, value in known]
    if missing := 1 - len(known) / len(points[0]):
        label += f" ({missing:.0%} missing)"
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1, zorder=2)
    axes.plot(steps, smoothed(values), color=colour, linewidth=2, marker=marker, zorder=3, label=label)


def _finish(axes: Axes, title: str, label: str, limits: tuple[float, float | None] | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel("training step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_ylabel(label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        axes.set_yticks([])
        return
    if limits is not None:
        axes.set_ylim(*limits)
    # Below the axes, where no curve can run into it.
    columns = min(5 if sum(map(len, labels)) < 47 else 3, len(handles))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False, fontsize=9.5)
