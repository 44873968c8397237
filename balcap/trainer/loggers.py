"""Where metrics go: a CSV file that a resumed run continues, and the count they are logged under."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_only

from balcap.judge import Judgments
from balcap.utils.files import atomic_write

log = logging.getLogger(__name__)


def log_metrics(
    module: LightningModule,
    metrics: dict[str, float],
    own_count: int | None,
    last: bool = True,
    **options: Any,
) -> None:
    """Hand metrics to Lightning, and to the loggers under Lightning's count of steps or another one.

    Args:
        module: that logs.
        metrics: by name.
        own_count: step that the loggers see; None for Lightning's.
        last: whether these are the last metrics of the step: Lightning takes one set.
        options: of `LightningModule.log_dict`.
    """
    if last:
        module.log_dict(metrics, logger=own_count is None, **options)
    trainer = module.trainer
    training = trainer.state.stage == RunningStage.TRAINING
    every = max(1, getattr(trainer, "log_every_n_steps", 1)) if training else 1
    if own_count is not None and own_count % every == 0 and not trainer.sanity_checking:
        for logger in module.loggers:
            logger.log_metrics(metrics | {"epoch": module.current_epoch}, step=own_count)


@rank_zero_only
def warn_of_missing(judgments: Judgments, step: int) -> None:
    """Say on the console which judgments a step lacks, and why."""
    if not judgments.failures:
        return
    counts = ", ".join(f"{number} {task}" for task, number in judgments.failures.items())
    log.warning("step %d: judgments missing: %s; %s", step, counts, "; ".join(judgments.reasons))


class _ContinuedWriter(ExperimentWriter):
    """Keeps the rows of an earlier run: up to the step from which it is continued, or all of them."""

    def __init__(self, log_dir: str, keep: bool, append: bool) -> None:
        self._keep = keep or append
        self._joined = not keep
        super().__init__(log_dir=log_dir)
        if self._keep and Path(self.metrics_file_path).is_file():
            self.metrics_keys, rows = _whole_rows(Path(self.metrics_file_path))
            self._write(rows)

    def _check_log_dir_exists(self) -> None:
        """A run folder holds more than this file; only the file itself is replaced."""
        path = Path(self.metrics_file_path)
        if not self._keep and path.is_file():
            path.unlink()

    def save(self) -> None:
        if self.metrics and not self._joined:
            self._join()
            self._joined = True
        super().save()

    def _join(self) -> None:
        """Forget what the killed run wrote beyond its checkpoint: those steps are run again, and logged again."""
        step = min(int(row["step"]) for row in self.metrics)
        again = {name for row in self.metrics for name in row if name.startswith(("train/", "val/"))}
        path = Path(self.metrics_file_path)
        if path.is_file():
            rows = _whole_rows(path)[1]
            self._write(
                [r for r in rows if (here := int(r["step"])) < step or (here == step and not _has(r, again))]
            )

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(_whole_rows(Path(self.metrics_file_path))[1])

    def _write(self, rows: list[dict[str, str]]) -> None:
        with atomic_write(self.metrics_file_path, newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _has(row: dict[str, str], names: set[str]) -> bool:
    return any(row.get(name) for name in names)


def _whole_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a file of metrics, without rows that a kill or a full disk has cut short."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n") and "\0" not in line)
    columns = list(reader.fieldnames or [])
    # DictReader fills up what a row lacks with None, and collects what it has too many under None.
    rows = [row for row in reader if None not in row and None not in row.values()]
    return columns, [row for row in rows if row.get("step", "").isdigit()]


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` right in the run folder, on disk after every step.

    Args:
        save_dir: the run folder.
        keep: continue the file that is there (a resumed run) instead of starting anew: rows of steps that are
            logged again are replaced.
        append: add to the file that is there, and replace nothing.
    """

    def __init__(self, save_dir: str, keep: bool = False, append: bool = False) -> None:
        super().__init__(save_dir=save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._keep, self._append = keep, append

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @property
    def experiment(self) -> Any:
        """The writer; a stand-in on other ranks."""
        return self._writer()

    @rank_zero_only
    def _writer(self) -> _ContinuedWriter:
        if self._experiment is None:
            os.makedirs(self.save_dir, exist_ok=True)
            self._experiment = _ContinuedWriter(self.save_dir, self._keep, self._append)
        return self._experiment  # type: ignore[return-value]
