"""The settings of a study: runs x seeds in a YAML, checked before anything starts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balcap.report.study import Claim

OURS = ("run_dir", "seed_everything", "resume", "ckpt_path", "config")
"""Settings of a run that the study gives itself."""


@dataclass
class RunSettings:
    """One setting of a study.

    Args:
        configs: further configs, such as ``configs/methods/grpo.yaml``, put behind the study's `base`.
        settings: by their full names, such as ``model.kl_coef: 0.0``.
        title: for tables and figures; null for the run's name.
    """

    configs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    title: str | None = None


@dataclass
class GroupSettings:
    """Runs that stand in a table and a figure of their own.

    Args:
        runs: their names, in order; a run may stand in several groups.
        title: for people; null for the group's name.
        reference: name of the run that the others are compared with; null for the first.
    """

    runs: list[str] = field(default_factory=list)
    title: str | None = None
    reference: str | None = None


@dataclass
class StudySettings:
    """Runs x seeds of one question. Each run is an ordinary one, in ``<out>/<run>-<seed>``.

    Args:
        out: folder of the runs and of ``study.md``, ``study.csv``, ``study.png`` and ``study.html``.
        base: configs of all runs, as repeated ``--config``.
        runs: name -> what sets the run apart; null for a run that is `base` alone.
        seeds: of each run: ``seed_everything``.
        settings: of all runs, by their full names.
        reference: name of the run that the others are compared with; null for the first.
        groups: name -> runs that share a table; without any, all do.
        measures: what is read, the main one first: benchmarks' scores (``dcscore``, ``caparena/careful``) and metrics, of
            which the last value counts (``val/recall``), or the step at which they first reach a level
            (``val/recall@0.7``), on the line between two validations; null for the benchmarks and the usual ``val/*``.
        curve: a metric whose learning curves are drawn, such as ``val/b_capscore``; null for none.
        trade_off: two measures that are drawn against each other, and one that colours the points.
        claims: what the figures are held against.
        evaluate: whether each run's policy is measured by ``main.py test``, with the benchmarks of its config.
        title: of the page; null for the name of `out`.
    """

    out: str | None = None
    base: list[str] = field(default_factory=list)
    runs: dict[str, RunSettings | None] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    settings: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    groups: dict[str, GroupSettings] = field(default_factory=dict)
    measures: list[str] | None = None
    curve: str | None = None
    trade_off: list[str] = field(default_factory=lambda: ["dcscore", "captionqa", "caparena"])
    claims: list[Claim] = field(default_factory=list)
    evaluate: bool = True
    title: str | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> StudySettings:
        """From what was parsed; jsonargparse would make the objects that settings of runs name."""
        there = {
            key: value for key, value in given.items() if value is not None
        }  # an empty key is as if it were not there
        runs = {name: RunSettings(**(own or {})) for name, own in there.get("runs", {}).items()}
        groups = {name: GroupSettings(**own) for name, own in there.get("groups", {}).items()}
        claims = [Claim(**claim) for claim in there.get("claims", [])]
        return cls(**there | {"runs": runs, "groups": groups, "claims": claims})

    def problems(self) -> list[str]:
        """What is wrong, each message beginning with the key to change. Reads no config of a run."""
        problems = []
        if not self.out:
            problems.append("out: name the folder for the runs, such as runs/my-study")
        if not self.runs:
            problems.append("runs: there is none; name at least one, such as `grpo: {configs: [...]}`")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            problems.append(f"seeds: {self.seeds} must be different numbers from 0 on, and at least one")
        if len(self.trade_off) not in (0, 2, 3):
            problems.append(f"trade_off: {self.trade_off} must be two or three measures, or [] for no figure")
        for key, measure in self._measures():
            name, at, level = measure.partition("@")
            if at and not (name.startswith(("val/", "train/")) and _is_number(level)):
                problems.append(
                    f"{key}: {measure!r} must be a metric and the level to reach, such as val/recall@0.7"
                )
        for name, run in self.runs.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                problems.append(
                    f"runs: {name!r} cannot be a name: letters, digits, dots, dashes and underscores"
                )
            problems += _of_ours(f"runs.{name}.settings", run.settings if run else {})
        problems += _of_ours("settings", self.settings)
        problems += self._of_groups()
        there = ", ".join(self.runs)
        for key, named in self._named():
            if named is not None and named not in self.runs:
                problems.append(f"{key}: there is no run {named}; there are {there}")
        for number, claim in enumerate(self.claims):
            key = f"claims[{number}].within"
            if (claim.expect == "equal") != (claim.within is not None):
                problems.append(
                    f"{key}: `expect: equal` needs it, and nothing else takes it: the largest difference that counts as none"
                )
            elif claim.within is not None and claim.within <= 0:
                problems.append(f"{key}: {claim.within} must be above 0")
        return problems

    def _of_groups(self) -> Iterator[str]:
        """What is wrong with the groups."""
        for name, group in self.groups.items():
            if name in self.runs:
                yield f"groups.{name}: a run has this name too; choose another"
            if not group.runs:
                yield f"groups.{name}.runs: name at least one run"
            if group.reference and group.reference not in group.runs:
                yield f"groups.{name}.reference: {group.reference} is none of its runs: {', '.join(group.runs)}"
        shown = {name for group in self.groups.values() for name in group.runs}
        if self.groups and (hidden := [name for name in self.runs if name not in shown]):
            yield f"groups: no table shows {', '.join(hidden)}; name them in a group"

    def chosen(self, words: str) -> tuple[list[str], list[str]]:
        """Names of runs that are meant by names of runs and groups with commas between, and names that are neither."""
        named = [word for word in map(str.strip, words.split(",")) if word]
        wanted: set[str] = set()
        for word in named:
            wanted |= set(self.groups[word].runs) if word in self.groups else {word}
        unknown = [word for word in named if word not in self.runs and word not in self.groups]
        return [name for name in self.runs if name in wanted], unknown

    def _measures(self) -> Iterator[tuple[str, str]]:
        """Keys that name a measure, and which."""
        yield from (("measures", measure) for measure in self.measures or ())
        yield from (("trade_off", measure) for measure in self.trade_off)
        yield from ((f"claims[{number}].measure", claim.measure) for number, claim in enumerate(self.claims))

    def _named(self) -> Iterator[tuple[str, str | None]]:
        """Keys that name a run, and which."""
        yield "reference", self.reference
        for name, group in self.groups.items():
            for number, run in enumerate(group.runs):
                yield f"groups.{name}.runs[{number}]", run
        for number, claim in enumerate(self.claims):
            yield f"claims[{number}].run", claim.run
            yield f"claims[{number}].against", claim.against

    def arguments(self, name: str) -> list[str]:
        """Of ``main.py fit`` and ``test``, but for folder and seed."""
        own = self.runs[name] or RunSettings()
        configs = [word for path in (*self.base, *own.configs) for word in ("--config", path)]
        return [*configs, *_flags(self.settings | own.settings)]

    @property
    def folder(self) -> Path:
        return Path(self.out or "")


def _of_ours(key: str, settings: dict[str, Any]) -> Iterator[str]:
    for name in settings:
        if name in OURS:
            yield f"{key}: {name} is the study's own; each run has its folder and one of `seeds`"


def _flags(settings: dict[str, Any]) -> Sequence[str]:
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
