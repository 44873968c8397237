"""Where metrics go: a CSV file that a resumed run continues, and the count they are logged under."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from balcap.utils.files import atomic_write, whole_rows

log = logging.getLogger(__name__)


def log_metrics(
    module: LightningModule, metrics: dict[str, float], step: int, last: bool = True, **options: Any
) -> None:
    """Hand metrics to Lightning, and through it to the loggers.

    Args:
        module: that logs.
        metrics: by name.
        step: optimizer steps behind the weights, which is what the loggers count. (Lightning's own count is of batches,
            from 0.)
        last: whether these are the last metrics of the training step: Lightning takes one set, the others go to the
            loggers directly.
        options: of `LightningModule.log_dict`.
    """
    if last:
        counts = {"step": float(step), "epoch": float(module.current_epoch)}
        module.log_dict(metrics | counts, **options)
    elif step % max(1, getattr(module.trainer, "log_every_n_steps", 1)) == 0:
        for logger in module.loggers:
            logger.log_metrics(metrics | {"epoch": module.current_epoch}, step=step)


@rank_zero_only
def warn_of_missing(failures: Mapping[str, int], reasons: Iterable[str], captions: int, where: str) -> None:
    """Say on the console which judgments are missing, and why.

    Args:
        failures: task name -> how many are missing.
        reasons: a few, worded for a person.
        captions: that were judged, by this rank.
        where: such as ``step 3``.
    """
    if failures:
        counts = ", ".join(f"{number} {task}" for task, number in failures.items())
        reasons = "; ".join(dict.fromkeys(reasons))
        log.warning("%s: judgments missing: %s, of %d captions; %s", where, counts, captions, reasons)


class _ContinuedWriter(ExperimentWriter):
    """Keeps the rows of an earlier run: up to the step from which it is continued, or all of them."""

    def __init__(self, log_dir: str, keep: float | None, logged: Mapping[str, float] | None) -> None:
        self._keep, self._logged = keep, logged
        self._joined = keep in (None, math.inf)
        super().__init__(log_dir=log_dir)
        if keep is not None and Path(self.metrics_file_path).is_file():
            self.metrics_keys, rows = whole_rows(Path(self.metrics_file_path))
            self._write(rows)

    def _check_log_dir_exists(self) -> None:
        """A run folder holds more than this file; only the file itself is replaced."""
        path = Path(self.metrics_file_path)
        if self._keep is None and path.is_file():
            path.unlink()

    def save(self) -> None:
        if self.metrics and not self._joined:
            self._join()
            self._joined = True
        super().save()

    def _join(self) -> None:
        """Forget what the killed run wrote beyond its checkpoint, and a validation that is made again."""
        assert self._keep is not None
        first = min(int(row["step"]) for row in self.metrics)
        again = {name for row in self.metrics for name in row if name.startswith(("train/", "val/"))}
        path = Path(self.metrics_file_path)
        if path.is_file():
            rows = [row for row in whole_rows(path)[1] if int(row["step"]) <= self._keep]
            rows = [row for row in rows if int(row["step"]) != first or not _has(row, again)]
            if self._logged and not any(
                _has(row, self._logged) for row in rows if row["step"] == self._last_step
            ):
                self.metrics_keys = sorted({*self.metrics_keys, *self._logged})  # Lightning sorts them, too
                rows.append(
                    {name: str(value) for name, value in self._logged.items()} | {"step": self._last_step}
                )
            self._write(rows)

    @property
    def _last_step(self) -> str:
        """Of the checkpoint, as it stands in the file."""
        return str(int((self._logged or {}).get("step", -1)))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(whole_rows(Path(self.metrics_file_path))[1])

    def _write(self, rows: list[dict[str, str]]) -> None:
        with atomic_write(self.metrics_file_path, newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _has(row: Mapping[str, str], names: Iterable[str]) -> bool:
    return any(row.get(name) for name in names if name.startswith(("train/", "val/")))


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` right in the run folder, on disk after every step.

    Args:
        save_dir: the run folder.
        keep: the last step whose rows stay in the file that is there: that of a resumed run's checkpoint; infinity
            for all of them; None starts anew.
        logged: metrics of the checkpoint's step, with ``step``: Lightning logs after it has saved, and the run may have
            been killed in between.
    """

    def __init__(
        self, save_dir: str, keep: float | None = None, logged: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(save_dir=save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._keep, self._logged = keep, logged

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
            self._experiment = _ContinuedWriter(self.save_dir, self._keep, self._logged)
        return self._experiment  # type: ignore[return-value]
