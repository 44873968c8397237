"""A run as its folder describes it: settings, metrics, results, benchmarks, what the judge has cost.

Everything is read from files, none of which has to be there: a run that was killed, one that only ran benchmarks
and one of an older version have a report, too.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from balcap.benchmarks.scores import Score, Statistic, difference
from balcap.report.calls import Calls
from balcap.report.rollouts import PARTS, Rollouts
from balcap.utils.errors import UserError

Series = tuple[list[float], list[float]]  # steps, values

B_CAPSCORE = "b_capscore"
TITLES = {B_CAPSCORE: "b-CapScore", "length_ratio": "length ratio", "caption_tokens": "caption tokens"}
"""Names of metrics as people write them; of the others the metric's own."""


@dataclass(frozen=True)
class Outcome:
    """One score of the held-out captions before the first update and after the last one.

    Attributes:
        name: of the metric, such as ``b_capscore``.
        before, after: means with 95 % intervals (bootstrap over images).
        change: after minus before on the images that both have (paired bootstrap).
    """

    name: str
    before: Score
    after: Score
    change: Score

    @property
    def title(self) -> str:
        """The name as people write it."""
        return TITLES.get(self.name, self.name)


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        folder: of the run.
        settings: the resolved config of the fit, or of the command that ran last; empty where none is there.
        changed: its settings that differ from the defaults, nested; None where the run did not write them.
        metrics: name -> (steps, values), NaN where a value was logged and missing.
        benchmarks: of ``benchmarks.json``: name -> score, low, high, n, …; empty where there are none.
        captioners: name -> the same of each captioner that ``test`` compared, the policy among them; empty without others.
        problems: what could not be read, for a person.
        label: its name among several runs; empty for that of its folder.
    """

    folder: Path
    settings: Mapping[str, Any]
    changed: Mapping[str, Any] | None
    metrics: Mapping[str, Series]
    benchmarks: Mapping[str, Any]
    captioners: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    label: str = ""

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            UserError: there is no run: neither settings nor metrics nor benchmarks.
        """
        folder, problems = Path(folder), []
        configs = [folder / "config.yaml", *sorted(folder.glob("config.[a-z]*.yaml"))]
        configs = [path for path in configs if path.name != "config.changed.yaml" and path.is_file()]
        found = [*configs, folder / "metrics.csv", folder / "benchmarks.json"]
        if not any(path.is_file() for path in found):
            raise UserError(
                f"{folder}: there is no run in it (no config.yaml, metrics.csv or benchmarks.json); a run's folder is "
                "what --run_dir named, and else run_dir of its config"
            )

        def read(path: Path, parse: Any, otherwise: Any) -> Any:
            try:
                return parse(path) if path.is_file() else otherwise
            except (OSError, ValueError, yaml.YAMLError) as error:
                problems.append(f"{path.name} cannot be read: {error}")
                return otherwise

        changed = read(folder / "config.changed.yaml", _yaml, None)
        metrics = read(folder / "metrics.csv", read_metrics, {})
        benchmarks = read(folder / "benchmarks.json", _json, {})
        captioners = read(folder / "benchmarks/comparison.json", _json, {}).get("models", {})
        settings = read(configs[0], _yaml, {}) if configs else {}
        return cls(folder, settings, changed, metrics, benchmarks, captioners, problems)

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return self.label or self.folder.resolve().name

    @cached_property
    def rollouts(self) -> Rollouts:
        """The captions that the run has logged."""
        return Rollouts.read(self.folder / "rollouts")

    @cached_property
    def calls(self) -> Calls | None:
        """What the ledger holds; None without one."""
        return Calls.read(self.folder / "judge_ledger.sqlite")

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its full name, such as ``model.policy.model``; classes are looked through."""
        value: Any = self.settings
        for key in name.split("."):
            if (
                isinstance(value, Mapping)
                and key not in value
                and isinstance(value.get("init_args"), Mapping)
            ):
                value = value["init_args"]
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return default if value is None else value

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Those that were logged, the paper's three first."""
        logged = [name.split("/", 2)[2] for name in self.metrics if name.startswith("train/reward_std/")]
        named = [*logged, *self.rollouts.reward_names]
        return tuple(dict.fromkeys([*(part for part in PARTS if part in named), *named]))

    @property
    def steps(self) -> int:
        """Optimizer steps that the run has made."""
        return int(max((steps[-1] for steps, _ in self.metrics.values() if steps), default=0))

    @property
    def hours(self) -> float:
        """Of training steps, as the first process has counted them; validation and loading are not in it."""
        values = self.metrics.get("time/step_s", ([], []))[1]
        return sum(value for value in values if not math.isnan(value)) / 3600

    @property
    def usd(self) -> float | None:
        """What the judge has cost; None where it is not known."""
        if self.calls is not None:
            return self.calls.usd
        values = self.metrics.get("judge/cost_usd", ([], []))[1]
        return values[-1] if values else None

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """Before and after on the held-out images: b-CapScore, each reward, length ratio. Empty with fewer than two
        validations."""
        before, after = self.rollouts.ends
        if before is None or after is None:
            return []
        names = [B_CAPSCORE, *self.reward_names, "length_ratio"]
        outcomes = []
        for name in names:
            one, other = before.scores(name), after.scores(name)
            if one and other:
                first, last = _statistic(one), _statistic(other)
                outcomes.append(Outcome(name, first.score(), last.score(), difference(last, first)))
        return outcomes

    @property
    def headline(self) -> Outcome | None:
        """b-CapScore where there is one, else the first reward."""
        return self.outcomes[0] if self.outcomes else None

    @property
    def bounds(self) -> tuple[float, float]:
        """``[τ_low, τ_high]`` of the length mask at the end of the run: the paper's where the run has no mask."""
        from balcap.algorithms import LengthMask

        logged = [self.metrics.get(f"train/{name}", ([], []))[1] for name in ("tau_low", "tau_high")]
        if all(logged):
            return logged[0][-1], logged[1][-1]
        default = LengthMask()
        for transform in self.setting("model.reward_transforms", []):
            given = transform.get("init_args") or {} if isinstance(transform, Mapping) else {}
            if "tau_low" in given and "tau_high" in given:
                return float(given["tau_low"]), float(given["tau_high"])
        return default.tau_low, default.tau_high

    @property
    def has_mask(self) -> bool:
        """Whether the run masks by length: by default it does."""
        given = self.setting("model.reward_transforms")
        return given is None or any("LengthMask" in str(transform) for transform in given)

    @property
    def command(self) -> str:
        """That repeats the run."""
        anew = "".join(f" --{name} null" for name in ("ckpt_path", "resume") if self.setting(name))
        return f"python main.py fit --config {self.folder}/config.yaml --run_dir runs/again{anew}"


def labelled(runs: Sequence[Run]) -> list[Run]:
    """The runs, with as much of their paths in their names as tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = next((n for n in range(1, 20) if len({part[-n:] for part in parts}) == len(parts)), 20)
    return [replace(run, label="/".join(part[-depth:])) for run, part in zip(runs, parts, strict=True)]


def read_metrics(metrics_csv: Path) -> dict[str, Series]:
    """Every metric as (steps, values) in order of steps; NaN where it was logged and missing. Empty cells are left out.

    Args:
        metrics_csv: as Lightning's `CSVLogger` writes it: a ``step`` column, sparse columns of metrics.

    Raises:
        OSError: it cannot be read.
        ValueError: a column has values that are not numbers.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    with metrics_csv.open(newline="") as file:
        for row in csv.DictReader(file):
            step = float(row.pop("step"))
            for name, cell in row.items():
                if cell not in ("", None):
                    points.setdefault(name, []).append((step, float(cell)))
    for pairs in points.values():
        pairs.sort(key=lambda pair: pair[0])
    return {name: ([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in points.items()}


def leaves(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names; a list is one setting, and ``init_args`` are left out of the names."""
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            below = name if key == "init_args" else f"{name}.{key}".lstrip(".")
            yield from leaves(value, below)
    else:
        yield name, settings


def short_model(model: str) -> str:
    """A model without its owner or folder."""
    return Path(str(model)).name


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) or {}


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _statistic(scores: Mapping[str, float]) -> Statistic:
    return Statistic.of(list(scores), list(scores.values()))
