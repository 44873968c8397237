"""Checkpoints from which a run that was killed at any moment goes on."""

from __future__ import annotations

import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.api import CheckpointException

from balcap.trainer.checkpoint import AtomicCheckpointIO, CheckpointError
from balcap.trainer.sharded_checkpoint import replaced
from balcap.utils.errors import RunStopped


class RunCheckpoint(ModelCheckpoint):
    """``checkpoints/last.ckpt`` every few steps, and once more when the run is interrupted.

    Continue with ``--ckpt_path last``. A checkpoint holds what is trained, the optimizer, the place in the
    data and the loops; captions are drawn from (seed, step, rank), so there is no other random state.

    Args:
        every_n_train_steps: optimizer steps between checkpoints, at least 1.
        keep: how many checkpoints stay beside the last one, the newest or, with `monitor`, the best; -1 keeps all.
        monitor: a metric that says which are best, such as ``bench/dcscore`` or ``val/b_capscore``, where it is known at a
            checkpoint's step; null for the newest.
        mode: whether more of it is better (``max``) or less.
        dirpath: set from the run folder.
    """

    def __init__(
        self,
        every_n_train_steps: int = 25,
        keep: int = 1,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            monitor=monitor or "step",
            mode=mode if monitor else "max",
            save_last=True,
            save_top_k=max(-1, keep),
            every_n_train_steps=max(1, every_n_train_steps),
            enable_version_counter=False,
        )
        self._given = {"every_n_train_steps": (every_n_train_steps, 1), "keep": (keep, -1)}
        self._interrupted = self._terminated = self._monitor_seen = False
        self._ending: type[BaseException] | None = None  # what all ranks have agreed to raise
        self._handlers_before: dict[int, Any] = {}

    def problems(self) -> list[str]:
        """What is out of range, each with the key to change."""
        return [
            f"checkpoint.{name}: {value} must be at least {least}"
            for name, (value, least) in self._given.items()
            if value < least
        ]

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Any]:
        """A checkpoint of a step at which the metric is not known is worse than any other."""
        candidates = super()._monitor_candidates(trainer)
        assert self.monitor is not None
        self._monitor_seen = self._monitor_seen or self.monitor in candidates
        candidates.setdefault(self.monitor, torch.tensor(-torch.inf if self.mode == "max" else torch.inf))
        return candidates

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user has chosen no other
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            self._handlers_before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
            if trainer.world_size > 1:
                handler = partial(self._on_terminate, trainer)
                self._handlers_before[signal.SIGTERM] = signal.signal(signal.SIGTERM, handler)

    def _on_interrupt(self, *_: Any) -> None:
        """The first Ctrl-C waits for the step's end, where a checkpoint is exact; the second does not."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        rank_zero_info("Ctrl-C: stopping when this step has ended; once more stops at once")

    def _on_terminate(self, trainer: Trainer, number: int, *_: Any) -> None:
        """SIGTERM to one of several ranks. Lightning's handler talks to the other ranks from wherever this one is, which may
        be in the middle of talking to them."""
        launcher: Any = trainer.strategy.launcher
        if not self._terminated and hasattr(launcher, "procs"):
            launcher.kill(number)  # of which this process started
        self._terminated = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # All ranks stop at the same step: one that stopped alone would leave the others waiting for it.
        decide = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if decide(self._interrupted or self._terminated):
            self._ending = SIGTERMException if decide(self._terminated) else KeyboardInterrupt
            self._save_last(trainer)  # now, where Lightning's loops expect it; the step is logged after this
        elif trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
            self._save_end(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """One file, which is whole or not there; or a folder of which each rank writes its part, the same."""
        if not getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            super()._save_checkpoint(trainer, filepath)
            return
        try:
            with replaced(filepath, trainer) as part:
                super()._save_checkpoint(trainer, str(part))
        except (CheckpointException, OSError, RuntimeError) as error:
            failures = error.failures.values() if isinstance(error, CheckpointException) else ()
            why = next((failure for failure, _ in failures), error)  # of the first rank that failed
            raise CheckpointError(
                f"{filepath} cannot be written: {why}. The checkpoints before it are whole"
            ) from error
        self._last_checkpoint_saved = filepath

    def _save_end(self, trainer: Trainer) -> None:
        """A fit that comes to its end leaves a checkpoint of its last step, whatever `every_n_train_steps` is."""
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of a fit that ends with an epoch; where the last step is known, it was saved before the epoch was counted.
        self._save_end(trainer)
        if not self._monitor_seen and self.best_model_path:
            rank_zero_info(
                f"checkpoint.monitor: {self.monitor} was known at no checkpoint, so none is the best; metrics.csv has "
                "the names"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ending is not None:
            raise self._ending

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ctrl-C, SIGTERM, a judge that stops the run, and errors: save what there is, as far as a fit has begun.

        An error of one rank among several saves nothing: the others would not join. Their last checkpoint stands.
        """
        if trainer.state.fn != "fit" or trainer.global_step == 0 or self._ending:
            return
        # Of several ranks all stop for the judge's sake, or none does.
        if trainer.world_size == 1 or isinstance(exception, RunStopped):
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if self.dirpath is None:
            return
        path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        self._save_checkpoint(trainer, str(path))
        rank_zero_info(f"saved {path}; continue with --ckpt_path last")
