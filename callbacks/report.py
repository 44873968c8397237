"""What a run leaves for people at its end: the report, the README of its folder, the model card of its export."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from balcap.report.model_card import write_model_card
from balcap.report.page import write_report
from balcap.report.readme import write_readme
from balcap.report.run import Run


class RunReport(Callback):
    """Writes ``report.html`` and ``README.md`` into the run folder, and ``export/README.md`` where there is an export, when
    a fit ends, and after ``test``. After an exception the command line writes them, once the checkpoint is on disk:
    callbacks that save checkpoints come last.

    What cannot be written is a warning, never the end of a run. ``python main.py report`` writes the report anew.

    Args:
        enabled: whether to write them.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write them from what is in the trainer's ``default_root_dir`` by now."""
        if not self.enabled or not trainer.is_global_zero:
            return
        began, folder = time.monotonic(), Path(trainer.default_root_dir)
        for logger in trainer.loggers:
            logger.save()
        report, export = folder / "report.html", folder / "export"
        parts: dict[Path, Callable[[], Path]] = {
            report: lambda: write_report([Run.read(folder)], report),
            folder / "README.md": lambda: write_readme(folder),
        }
        if export.is_dir():
            parts[export / "README.md"] = lambda: write_model_card(folder, export)
        for path, write in parts.items():
            try:
                write()
            except Exception as error:  # what was trained is worth more than what is said of it
                rank_zero_warn(f"{path} could not be written: {type(error).__name__}: {error}")
        rank_zero_info(f"report: {report}, written in {time.monotonic() - began:.0f} s")
