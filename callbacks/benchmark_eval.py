"""Benchmarks of the policy while it trains, and of any captioners with ``python main.py test``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from balcap.benchmarks.base import Benchmark
from balcap.benchmarks.runner import BenchmarkRun, Result
from balcap.benchmarks.scores import difference, known
from balcap.trainer.pipeline import TEST
from balcap.utils.errors import UserError
from balcap.utils.files import atomic_write

POLICY = "policy"
"""Name of the config's own captioner in tables."""


class BenchmarkEval(Callback):
    """Runs benchmarks on the weights as they are: every few updates of a fit, at its ends, and in ``test``.

    Scores are logged as ``bench/<name>``, with ``bench/<name>_low`` and ``_high``, so that ``checkpoint.monitor`` can watch
    one. In ``test`` they are in ``benchmarks.json`` of the run folder. Files are in ``benchmarks/`` there.

    Args:
        benchmarks: which; null for none.
        every_n_updates: optimizer steps between two evaluations of a fit, at least 0; 0 for none within it.
        at_ends: also before the first update and after the last one, where `every_n_updates` is not 0.
        limit: images of each benchmark in a fit, at least 1: the first ones, always the same; null for all.
        batch_size: images that are captioned together, at least 1.
        models: name -> folder or hub id of further captioners that ``test`` compares with the policy; null for none.
        dirpath: set from the run folder.
    """

    def __init__(
        self,
        benchmarks: list[Benchmark] | None = None,
        every_n_updates: int = 0,
        at_ends: bool = True,
        limit: int | None = 64,
        batch_size: int = 32,
        models: dict[str, str] | None = None,
        dirpath: str | None = None,
    ) -> None:
        self.benchmarks, self.every_n_updates, self.at_ends = benchmarks or [], every_n_updates, at_ends
        self.limit, self.batch_size, self.models, self.dirpath = limit, batch_size, models or {}, dirpath
        self._done_step: int | None = None
        self._logged: list[str] = []

    def problems(self, needed: bool = False) -> list[str]:
        """What is wrong, each with the key to change; with `needed`, also that there is nothing to run."""
        problems = [
            f"benchmark_eval.{name}: {value} must be at least {least}"
            for name, value, least in (
                ("every_n_updates", self.every_n_updates, 0),
                ("limit", 1 if self.limit is None else self.limit, 1),
                ("batch_size", self.batch_size, 1),
            )
            if value < least
        ]
        if needed and not self.benchmarks:
            problems.append(
                "benchmark_eval.benchmarks: there is none to run; docs/benchmarks.md shows how to name them"
            )
        for name in self.models:
            if name == POLICY or not re.fullmatch(r"\w[\w.-]*", name):
                problems.append(
                    f"benchmark_eval.models: {name!r} cannot be a name: letters, digits, dots and dashes, and not {POLICY}"
                )
        names = [benchmark.name for benchmark in self.benchmarks]
        problems += [
            f"benchmark_eval.benchmarks: there are two of the name {name}"
            for name in sorted(set(names))
            if names.count(name) > 1
        ]
        if needed or self.every_n_updates:
            for number, benchmark in enumerate(self.benchmarks):
                problems += benchmark.problems(f"benchmark_eval.benchmarks[{number}].init_args")
        return problems

    def monitor_problems(self, monitor: str) -> list[str]:
        """Why a checkpoint's ``monitor`` would never be known."""
        if not monitor.startswith("bench/"):
            return []
        if not self.every_n_updates:
            return [f"checkpoint.monitor: {monitor} is never known; set benchmark_eval.every_n_updates"]
        names = [benchmark.name for benchmark in self.benchmarks]
        if monitor.split("/")[1] not in names:
            return [
                f"checkpoint.monitor: no benchmark gives {monitor}; there are {', '.join(names) or 'none'}"
            ]
        return []

    def evaluations(self, steps: int) -> int:
        """How often a fit of so many optimizer steps evaluates."""
        every = self.every_n_updates
        if not every:
            return 0
        return steps // every + self.at_ends * (1 + (steps % every > 0))

    # ---- while training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and self._done_step is None and self.at_ends and self.every_n_updates:
            self._evaluate(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for name in self._logged:  # of weights that are no more
            trainer.callback_metrics.pop(name, None)
        self._logged = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every, before = self.every_n_updates, self._done_step or 0
        if every and trainer.global_step // every > before // every:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_updates and self.at_ends and trainer.global_step != self._done_step:
            self._evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"done_step": self._done_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done_step = state_dict["done_step"]

    def _evaluate(self, trainer: Trainer, module: Any) -> None:
        """All benchmarks on the weights as they are; random numbers of training are the same without it."""
        step = self._done_step = trainer.global_step
        logged: dict[str, float] = {}
        with isolate_rng():
            for benchmark in self.benchmarks:
                where = self._folder / f"step-{step:08d}" / benchmark.name
                run = self._run(benchmark, module, where, {"step": step}, fresh=True, limit=self.limit)
                result = run.run(trainer, module.pipeline, TEST)
                for name, entry in result.entries.items():
                    named = {f"bench/{name}": entry["score"]}
                    if name == benchmark.name:
                        named |= {f"bench/{name}_{end}": entry[end] for end in ("low", "high")}
                    logged |= {key: math.nan if value is None else value for key, value in named.items()}
                logged[f"bench/{benchmark.name}/failed"] = float(result.failed)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(logged | {"epoch": trainer.current_epoch}, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logged.items()})
        self._logged = list(logged)

    # ---- test

    def runs(self, module: Any, name: str, identity: Mapping[str, Any]) -> list[BenchmarkRun]:
        """What ``test`` runs for one captioner."""
        return [self._run(one, module, self._folder / name / one.name, identity) for one in self.benchmarks]

    def _run(
        self, benchmark: Benchmark, module: Any, folder: Path, identity: Mapping[str, Any], **options: Any
    ) -> BenchmarkRun:
        seed = module.pipeline.seed
        return BenchmarkRun(benchmark, folder, identity, module.judge, self.batch_size, seed, **options)

    @property
    def _folder(self) -> Path:
        return Path(self.dirpath or "benchmarks")

    def write(self, results: Mapping[str, list[Result]]) -> None:
        """``benchmarks.json`` of the first captioner; of several, also ``benchmarks/comparison.json``.

        Args:
            results: captioner -> its results.
        """
        entries = _entries(results)
        first = next(iter(entries))
        with atomic_write(self._folder.parent / "benchmarks.json") as file:
            json.dump(entries[first], file, indent=2)
        differences = list(_differences(results))
        with atomic_write(self._folder / "comparison.json") as file:
            json.dump({"models": entries, "differences": differences}, file, indent=2)

    def show(self, results: Mapping[str, list[Result]]) -> None:
        """Prints the table.

        Raises:
            UserError: a benchmark has no score at all.
        """
        entries = _entries(results)
        print_table(results, entries, list(_differences(results)))
        for name, own in results.items():
            for result in own:
                if not entries[name][result.name]["n"]:
                    raise UserError(
                        f"{result.name} of {name} has no score: {result.failed} judgments are missing; left out: "
                        f"{dict(result.left_out) or 'nothing'}. The log above says why"
                    )


def _entries(results: Mapping[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """Captioner -> score name -> its entry."""
    return {
        name: {score: entry for result in own for score, entry in result.entries.items()}
        for name, own in results.items()
    }


def _differences(results: Mapping[str, list[Result]]) -> Iterator[dict[str, Any]]:
    """Each captioner against the last named, on the same images."""
    *others, base = results
    for name in others:
        for mine, theirs in zip(results[name], results[base], strict=True):
            gap = difference(mine.statistics[mine.name], theirs.statistics[mine.name])
            named = {"score": mine.name, "model": name, "base": base, "difference": known(gap.value)}
            yield {**named, **gap.interval(), "n": gap.n}


def print_table(
    results: Mapping[str, list[Result]],
    entries: Mapping[str, Mapping[str, Any]],
    differences: list[dict[str, Any]],
) -> None:
    """Captioners x benchmarks: score with the 95 % interval, n, missing judgments; then paired differences."""
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table("benchmark", *results, title="Benchmarks (95 % intervals: bootstrap over images)")
    first = next(iter(results.values()))
    for result in first:
        for score in result.statistics:
            cells = [_cell(entries[name].get(score)) for name in results]
            table.add_row(score, *cells, style="bold" if score == result.name else "dim")
    words = [f"{own[0].caption_words:.0f} words" for own in results.values()]
    table.add_section()
    table.add_row("length of captions", *words)
    console.print(table)
    for gap in differences:
        if gap["low"] is None:
            continue
        line = f"{gap['model']} - {gap['base']}, {gap['score']}: {gap['difference']:+.1f}"
        console.print(
            f"{line} [{gap['low']:+.1f}, {gap['high']:+.1f}] on the same {gap['n']} images", markup=False
        )
    for result in first:
        notes = "; ".join(result.notes)
        console.print(
            f"{result.name}: judged by {result.judge}" + (f" ({notes})" if notes else ""), markup=False
        )


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    missing = f", {entry['failed']} missing" if entry["failed"] else ""
    if entry["low"] is None:
        value = "-" if entry["score"] is None else f"{entry['score']:.1f}"
        return f"{value} (n {entry['n']}{missing})"
    return f"{entry['score']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}] (n {entry['n']}{missing})"
