"""The progress bar: what the captions are worth, not only how many batches are done."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

SHOWN = {"precision": "prec", "recall": "rec", "linguistic": "ling", "b_capscore": "b-cap"}
SHOWN |= {"length_ratio": "len", "nll": "nll"}
COSTS = {"judge/cost_usd": "$", "judge/usd_per_1k_rollouts": "$/1k"}


class CaptionProgressBar(RichProgressBar):
    """Rewards, b-CapScore and length ratio of the latest batch (or its NLL) beside the bar, and what the judge has cost.

    Counts optimizer steps where the run ends at ``max_steps``, which is known even when the length of the
    data is not; otherwise batches of the epoch. Where stdout is not a terminal (nohup, CI, a file) a bar
    cannot move: a plain line is printed instead for the first batch, every `plain_every_s` seconds, and
    after every validation.

    Args:
        refresh_rate: refreshes of the bar per second; 0 switches bar and lines off.
        plain_every_s: seconds between two plain lines.
        leave: leave a finished bar on the screen at the end of an epoch.
    """

    def __init__(self, refresh_rate: int = 10, plain_every_s: float = 15.0, leave: bool = False) -> None:
        super().__init__(refresh_rate=max(0, refresh_rate), leave=leave)
        self.plain_every_s = plain_every_s
        self._given = {"refresh_rate": refresh_rate, "plain_every_s": plain_every_s}
        self._plain, self._last_line = False, -math.inf
        self._start: tuple[float, int] | None = None  # time and progress when training began

    def problems(self) -> list[str]:
        """What is out of range, each with the key to change."""
        return [
            f"progress.{name}: {value} must be at least 0"
            for name, value in self._given.items()
            if not value >= 0  # NaN too
        ]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._plain = not sys.stdout.isatty() and "ipykernel" not in sys.modules

    @property
    def is_enabled(self) -> bool:
        """Whether the moving bar is drawn; the plain lines take its place where it cannot be."""
        return super().is_enabled and not self._plain

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return self._shown(trainer, "train")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_line, self._start = -math.inf, None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counts_steps and self.train_progress_bar_id is not None:
            return  # one bar for the run: epochs of a stream mean nothing
        super().on_train_epoch_start(trainer, pl_module)
        if self.is_enabled and self.progress is not None and self.train_progress_bar_id is not None:
            # reset, not update: steps of an earlier run that is resumed must not count as speed.
            self.progress.reset(self.train_progress_bar_id, completed=self._completed(0))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._start is None:
            self._start = (time.monotonic(), self._completed(batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        completed = self._completed(batch_idx + 1)
        if self.is_enabled and self.progress is not None:
            if self.train_progress_bar_id is None:  # resumed in the middle of an epoch
                self._initialize_train_progress_bar_id()
            self._update(self.train_progress_bar_id, completed)
            self._update_metrics(trainer, pl_module)
            self.refresh()
        total = self.total_train_batches
        if self._line_is_due(final=completed == total):
            name = "step" if self._counts_steps else f"epoch {trainer.current_epoch} batch"
            of = f"/{int(total)}" if math.isfinite(total) else ""
            self._line(f"{name} {completed}{of}", self._shown(trainer, "train"), self._pace(completed, total))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if batch_idx and self._line_is_due():
            self._line(f"validation batch {batch_idx + 1}", {})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._line_is_due(final=True) and not trainer.sanity_checking:
            step = getattr(pl_module, "weights_step", trainer.global_step)
            self._line(f"validation at step {step}", self._shown(trainer, "val"))

    @property
    def _counts_steps(self) -> bool:
        return self.trainer.max_steps > 0

    @property
    def total_train_batches(self) -> int | float:
        """What the bar counts to: optimizer steps of the run, or batches of the epoch; may be ``inf``."""
        return self.trainer.max_steps if self._counts_steps else self.trainer.num_training_batches

    def _completed(self, batches: int) -> int:
        return self.trainer.global_step if self._counts_steps else batches

    def _get_train_description(self, current_epoch: int) -> str:
        name = "Training" if self._counts_steps else f"Epoch {current_epoch}"
        return f"{name:{len(self.validation_description)}}"  # padded as Lightning does, against flicker

    def _shown(self, trainer: Trainer, stage: str) -> dict[str, Any]:
        """The metrics of a stage by their short names; those not logged are left out."""
        names = {f"{stage}/{name}": short for name, short in SHOWN.items()}
        metrics = trainer.callback_metrics
        shown = {short: float(metrics[name]) for name, short in names.items() if name in metrics}
        if stage == "train":
            costs = {short: float(metrics.get(name, 0.0)) for name, short in COSTS.items()}
            shown |= {short: cost for short, cost in costs.items() if cost > 0}  # free judges need no column
        return shown

    def _line_is_due(self, final: bool = False) -> bool:
        if not (self._plain and super().is_enabled):
            return False
        return final or time.monotonic() - self._last_line >= self.plain_every_s

    def _line(self, head: str, metrics: dict[str, Any], tail: str = "") -> None:
        self._last_line = time.monotonic()
        parts = [head, *(f"{name} {value:.3f}" for name, value in metrics.items()), tail]
        print("  ".join(part for part in parts if part), flush=True)

    def _pace(self, completed: int, total: float) -> str:
        """Seconds per step since training began, and how long the rest takes at that pace."""
        if self._start is None or completed <= self._start[1]:
            return ""
        seconds = (time.monotonic() - self._start[0]) / (completed - self._start[1])
        if not math.isfinite(total):
            return f"{seconds:.1f} s/step"
        return f"{seconds:.1f} s/step, {timedelta(seconds=round(seconds * max(0, total - completed)))} left"
