"""The report of runs as one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from balcap.benchmarks.scores import Score
from balcap.report import breakdown, figures
from balcap.report.curves import Setting, curves, settings_of, trade_off
from balcap.report.gallery import Card, add_images, groups, held_out
from balcap.report.html import Charts, rendered
from balcap.report.rollouts import Captions
from balcap.report.run import Outcome, Run, leaves, short_model
from balcap.utils.files import atomic_write

HELD_OUT, GROUPS = 200, 40
"""Cards of a report, over all runs."""
SECTIONS = (
    ("curves", "Curves"),
    ("captions", "Captions"),
    ("rewards", "Rewards"),
    ("judge", "Judge"),
    ("settings", "Settings"),
)


@dataclass(frozen=True)
class _RunPart:
    """What the page says of one run."""

    name: str
    facts: list[tuple[str, str]]
    outcomes: list[Outcome]
    scores: list[tuple[str, Score]]
    command: str | None
    settings_title: str
    settings: list[tuple[str, str]]


def write_report(runs: Sequence[Run], out: str | Path) -> Path:
    """Write the report of one run, or of several that are compared.

    Args:
        runs: at least one.
        out: the HTML file; written whole or not at all.

    Returns:
        `out`.
    """
    page = render(runs)
    with atomic_write(out) as file:
        file.write(page)
    return Path(out)


def render(runs: Sequence[Run]) -> str:
    """The HTML text."""
    content, charts = _content(runs)
    return rendered("report.html.jinja", content, charts)


def _content(runs: Sequence[Run]) -> tuple[dict[str, Any], Charts]:
    page = Charts()
    settings = settings_of(runs)
    cards = _cards(runs)
    before, after = runs[0].rollouts.ends
    charts = _breakdown(runs[0], settings, before, after)
    judged = [part for run in runs for part in _captions_of(run)]
    found = breakdown.contradictions(judged)
    judge_charts = figures.latencies(_merged(run.calls.latencies for run in runs if run.calls))
    several = len(runs) > 1
    content: dict[str, Any] = {
        "title": _title(runs),
        "headline": None if several else runs[0].headline,
        "attention": [line for run in runs for line in _attention(run, several)],
        "sections": SECTIONS,
        "runs": [_run_part(run) for run in runs],
        "table": _table(settings) if several else None,
        "curves": [page.add(figure) for figure in curves(settings)],
        "curves_lead": _curves_lead(settings),
        "cards": cards,
        "kinds": [
            (kind, name, n)
            for kind, name in (("held-out", "held-out images"), ("group", "groups of training"))
            if (n := sum(card.kind == kind for card in cards))
        ],
        "captions_lead": _captions_lead(runs, cards),
        "breakdown": [page.add(figure) for figure in charts],
        "breakdown_lead": _breakdown_lead(runs),
        "mask_lead": _mask_lead(runs[0]),
        "folders": breakdown.by_folder(runs[0]),
        "judges": [_judge(run) for run in runs if run.calls is not None],
        "judge_figures": [page.add(judge_charts)] if judge_charts else [],
        "contradictions": found,
        "consistent": "None: every statement about an image that was judged more than once got the same answer."
        if any(part.judged for part in judged)
        else "No verdicts were logged.",
    }
    return content, page


def _cards(runs: Sequence[Run]) -> list[Card]:
    cards = held_out(runs, HELD_OUT)
    for run in runs:
        cards += groups(run, max(8, GROUPS // len(runs)), f"{run.name}, " if len(runs) > 1 else "")
    add_images(cards, runs)
    return cards


def _captions_of(run: Run) -> Iterator[Captions]:
    if run.rollouts.train is not None:
        yield run.rollouts.train
    yield from run.rollouts.validations.values()


def _title(runs: Sequence[Run]) -> str:
    models = dict.fromkeys(short_model(run.setting("model.policy.model", "a policy")) for run in runs)
    data = dict.fromkeys(
        short_model(run.setting("data.name") or run.setting("data.data", "its data")) for run in runs
    )
    what = f"{', '.join(models)} on {', '.join(data)}"
    return what if len(runs) == 1 else f"{what}: {len(runs)} runs"


def _run_part(run: Run) -> _RunPart:
    changed = run.changed if run.changed is not None else run.settings
    title = "Settings that differ from the defaults" if run.changed is not None else "All settings"
    return _RunPart(
        name=run.name,
        facts=facts(run),
        outcomes=run.outcomes,
        scores=run.scores,
        command=run.command,
        settings_title=f"{title}: {run.name}",
        settings=[(name, _setting(value)) for name, value in leaves(changed)],
    )


def _setting(value: Any) -> str:
    """A value for a person: what is nested as YAML."""
    return yaml.safe_dump(value, sort_keys=False).strip() if isinstance(value, list | dict) else str(value)


def facts(run: Run) -> list[tuple[str, str]]:
    """What a run is: names and values for a person, without those that are not known."""
    lora, four_bit = run.setting("model.policy.lora"), run.setting("model.policy.load_in_4bit")
    weights = run.setting("model.weights", {})
    advantage = run.setting("model.advantage", {"class_path": "CGDPO"})
    supervised = run.setting("model.supervised", False)
    memory = [value for value in run.metrics.get("time/peak_memory_gb", ([], []))[1] if math.isfinite(value)]
    known = {
        "policy": run.setting("model.policy.model"),
        "trained": f"{'QLoRA' if four_bit else 'LoRA'}, r {run.setting('model.policy.lora.r', 'as default')}"
        if lora
        else "all weights but the vision tower"
        if run.setting("model.policy.freeze_vision")
        else "all weights",
        "data": run.setting("data.name") or run.setting("data.data"),
        "judge": run.setting("model.judge.model") if run.judged else None,
        "rewards": None
        if supervised
        else ", ".join(f"{name} × {value:g}" for name, value in weights.items()),
        "algorithm": "supervised, on the references" if supervised else _class(advantage),
        "optimizer steps": f"{run.steps:,}"
        + (f" of {total:,}" if (total := run.setting("trainer.max_steps", 0)) > 0 else ""),
        "images × captions a step": f"{run.setting('data.batch_size')} × "
        f"{1 if supervised else run.setting('model.num_captions')} per rank",
        "KL coefficient": None if supervised else run.setting("model.kl_coef"),
        "time in training steps": _duration(run.hours) if run.hours else None,
        "judge, dollars": None if run.usd is None else f"{run.usd:,.2f}",
        "judgments missing": None if run.missing_judgments is None else f"{run.missing_judgments:,.0f}",
        "memory, at most": f"{max(memory):.1f} GB" if memory else None,
        "seed": run.setting("seed_everything"),
    }
    if run.config is None:
        known = {
            name: known[name] for name in ("optimizer steps", "time in training steps", "judge, dollars")
        }
    elif not run.fits:  # of another command: nothing was trained with these settings
        of_training = (
            "trained",
            "algorithm",
            "optimizer steps",
            "images × captions a step",
            "KL coefficient",
        )
        known = {name: value for name, value in known.items() if name not in of_training}
        known = {"checkpoint": run.setting("ckpt_path"), **known}
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def method(run: Run) -> str:
    """How the captioner was trained, to follow "trained"."""
    if run.setting("model.supervised", False):
        return "on reference captions, supervised"
    weights = run.setting("model.weights", {})
    algorithm = _class(run.setting("model.advantage", {"class_path": "CGDPO"}))
    of_paper = set(weights) == {"precision", "recall", "linguistic"} and algorithm == "c-GDPO"
    source = " (BalCapRL, arXiv 2605.07394)" if of_paper else ""
    return f"by reinforcement learning on {', '.join(weights)} with {algorithm}{source}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _class(setting: Any) -> str:
    path = setting.get("class_path", "") if isinstance(setting, Mapping) else str(setting)
    name = path.split(".")[-1]
    return {"CGDPO": "c-GDPO"}.get(name, name)


def _attention(run: Run, several: bool) -> Iterator[str]:
    """What a reader must know before the numbers."""
    before = f"{run.name}: " if several else ""
    total, steps = run.setting("trainer.max_steps"), run.steps
    if run.fits and isinstance(total, int) and 0 < steps < total:
        yield f"{before}the run has made {steps:,} of {total:,} steps."
    for line in [*run.problems, *(f"rollouts/{line}" for line in run.rollouts.unreadable)]:
        yield f"{before}{line}"
    train = run.rollouts.train
    columns = () if train is None else (column for column in train.table.column_names if "reward/" in column)
    missing = [train.table[column].null_count / max(1, len(train)) for column in columns if train is not None]
    if missing and max(missing) > 0.01:
        yield f"{before}up to {max(missing):.0%} of a reward of the logged training captions are missing: the judge failed."
    if short := max((outcome.missing for outcome in run.outcomes), default=0):
        yield (
            f"{before}up to {short} of the held-out images lack a score before or after, because judgments failed: before, "
            "after and change are over those that have both."
        )
    if run.fits and len(run.rollouts.validations) < 2:
        found = "there is one validation" if run.rollouts.validations else "no held-out captions were logged"
        yield f"{before}{found}, so nothing is compared with what was before."


def _table(settings: Sequence[Setting]) -> list[list[str]] | None:
    """Before → after of every run, and the mean change of each setting of several runs with its standard deviation."""
    runs = [run for setting in settings for run in setting.runs]
    names = list(dict.fromkeys(outcome.name for run in runs for outcome in run.outcomes))
    if not names:
        return None
    rows = [["", *(next(o.title for r in runs for o in r.outcomes if o.name == name) for name in names)]]
    for setting in settings:
        of_runs = [{outcome.name: outcome for outcome in run.outcomes} for run in setting.runs]
        for run, of in zip(setting.runs, of_runs, strict=True):
            ends = [of.get(name) for name in names]
            rows.append(
                [
                    run.name,
                    *("–" if o is None else f"{o.before.value:.3f} → {o.after.value:.3f}" for o in ends),
                ]
            )
        if len(setting.runs) > 1:
            changes = [[of[name].change.value for of in of_runs if name in of] for name in names]
            cells = [
                f"{mean(of):+.3f} ± {stdev(of):.3f} ({len(of)} runs)" if len(of) > 1 else "–"
                for of in changes
            ]
            what = "mean change ± standard deviation"
            rows.append([what if len(settings) == 1 else f"{what}: {setting.label}", *cells])
    return rows


def _curves_lead(settings: Sequence[Setting]) -> str:
    lines = "Lines are training, smoothed over a twentieth of the run; dots are held-out images."
    if any(len(setting.runs) > 1 for setting in settings):
        lines += " Of runs that differ in their seed alone the mean is drawn, with a band of one standard deviation."
    return lines


def _captions_lead(runs: Sequence[Run], cards: Sequence[Card]) -> str:
    ends = [step for run in runs for step in run.rollouts.validations]
    shown = sum(card.kind == "held-out" for card in cards)
    lead = (
        f"{shown} held-out images, captions of step {min(ends)} and step {max(ends)}. "
        if len(ends) > 1
        else ""
    )
    score = runs[0].headline.title if runs[0].headline else "b-CapScore, or first reward"
    return f"{lead}The score above a caption is its {score}; σ of a group is the standard deviation of its scores."


def _breakdown(
    run: Run, settings: Sequence[Setting], before: Captions | None, after: Captions | None
) -> list[figures.Figure]:
    """The charts of the first run, and the trade-off of all."""
    charts: list[figures.Figure | None] = [trade_off(settings)]
    for title, column, flags in (
        ("Assertions that are true and pointable, by kind", "assertions", ("true", "pointable")),
        ("Reference units that are covered, by kind", "reference_units", ("covered",)),
    ):
        ends = [[] if of is None else breakdown.by_kind(of, column, flags) for of in (before, after)]
        charts.append(figures.shares(title, *ends))
    names = run.reward_names
    bins = [[] if of is None else breakdown.by_length(of, names) for of in (before, after)]
    charts.append(figures.lengths(bins[0], bins[1], run.bounds if run.has_mask else None))
    train = run.rollouts.train
    if train is not None and run.has_mask and "shaped/linguistic" in train.table.column_names:
        charts.append(figures.struck(train.length_ratio, _masked(train), run.bounds))
    charts.append(figures.benchmarks([run for setting in settings for run in setting.runs]))
    return [chart for chart in charts if chart is not None]


def _masked(train: Captions) -> Any:
    """``[N]`` whether a transform changed the linguistic reward."""
    return (train.column("reward/linguistic") != train.column("shaped/linguistic")) & ~_missing(train)


def _missing(train: Captions) -> Any:
    values = train.column("reward/linguistic")
    return values != values


def _breakdown_lead(runs: Sequence[Run]) -> str:
    of = "" if len(runs) == 1 else f" All but the trade-off and the benchmarks are of {runs[0].name}."
    return (
        "Numbers on bars count statements per caption. Statements are sorted by their words: coarsely, and before and "
        f"after alike.{of}"
    )


def _mask_lead(run: Run) -> str | None:
    train = run.rollouts.train
    if (
        train is None
        or not run.has_mask
        or "shaped/linguistic" not in train.table.column_names
        or not len(train)
    ):
        return None
    masked, ratio = _masked(train), train.length_ratio
    if not masked.any():
        return f"The length mask struck none of {len(train):,} logged training captions."
    short = float((ratio[masked] < 1).mean())
    linguistic = train.column("reward/linguistic")
    return (
        f"The length mask struck the linguistic reward of {masked.mean():.1%} of {len(train):,} logged training captions: "
        f"{short:.0%} of them too short, the others too long. It was {linguistic[masked].mean():.2f} on average, and "
        f"{_mean(linguistic[~masked]):.2f} where it counted."
    )


def _judge(run: Run) -> dict[str, Any]:
    calls = run.calls
    assert calls is not None
    hits = sum(v for v in run.metrics.get("judge/cache_hits", ([], []))[1] if math.isfinite(v))
    share = f", {calls.failed / calls.calls:.1%} of them failed" if calls.calls else ""
    cached = f" {hits:,.0f} answers came from the cache and cost nothing." if hits else ""
    return {
        "run": run.name,
        "lead": f"{calls.calls:,} calls{share}; {calls.usd:,.4f} US dollars.{cached}",
        "tasks": calls.tasks,
        "failures": calls.failures,
    }


def _merged(parts: Any) -> dict[str, list[float]]:
    merged: dict[str, list[float]] = {}
    for part in parts:
        for task, seconds in part.items():
            merged.setdefault(task, []).extend(seconds)
    return merged


def _mean(values: Any) -> float:
    values = values[values == values]
    return float(values.mean()) if len(values) else math.nan
