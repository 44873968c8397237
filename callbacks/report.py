"""The report of a run at its end."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from balcap.report.page import write_report
from balcap.report.run import Run


class RunReport(Callback):
    """Writes ``report.html`` into the run folder when a fit ends, also by an exception, and after ``test``.

    A report that cannot be written is a warning, never the end of a run. ``python main.py report`` writes it anew.

    Args:
        enabled: whether to write it.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and trainer.global_step > 0:
            self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write the report of what is in the trainer's ``default_root_dir`` by now."""
        if not self.enabled or not trainer.is_global_zero:
            return
        began, folder = time.monotonic(), Path(trainer.default_root_dir)
        try:
            for logger in trainer.loggers:
                logger.save()
            path = write_report([Run.read(folder)], folder / "report.html")
        except (
            Exception
        ) as error:  # what was trained is worth more than its picture, whatever is wrong with that
            rank_zero_warn(
                f"no report was written: {type(error).__name__}: {error}. Try again: python main.py report {folder}"
            )
            return
        rank_zero_info(f"{path}, made in {time.monotonic() - began:.0f} s")
