"""A CSV logger that a resumed run continues instead of deleting."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class _ContinuedWriter(ExperimentWriter):
    """Keeps the rows of an earlier run, up to the step from which it is continued."""

    def __init__(self, log_dir: str, keep: bool) -> None:
        self._keep = keep
        self._joined = not keep
        super().__init__(log_dir=log_dir)
        if keep and Path(self.metrics_file_path).is_file():
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def _check_log_dir_exists(self) -> None:
        """A run folder holds more than this file; only the file itself is replaced."""
        path = Path(self.metrics_file_path)
        if not self._keep and path.is_file():
            path.unlink()

    def save(self) -> None:
        if self.metrics and not self._joined:
            self._drop_from(min(int(row["step"]) for row in self.metrics))
            self._joined = True
        super().save()

    def _drop_from(self, step: int) -> None:
        """Forget what the killed run wrote beyond its checkpoint: those steps are run again."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        kept = [r for r in rows if int(r["step"]) < step or (int(r["step"]) == step and not _trains(r))]
        partial = path.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, path)


def _trains(row: dict[str, Any]) -> bool:
    return any(value for key, value in row.items() if key.startswith("train/"))


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` right in the run folder, on disk after every step.

    Args:
        save_dir: the run folder.
        keep: continue the file that is there (a resumed run) instead of starting anew.
    """

    def __init__(self, save_dir: str, keep: bool = False) -> None:
        super().__init__(save_dir=save_dir, name="", version="", flush_logs_every_n_steps=1)
        self._keep = keep

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
            self._experiment = _ContinuedWriter(self.save_dir, self._keep)
        return self._experiment  # type: ignore[return-value]
