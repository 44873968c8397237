"""Checkpoints from which a run that was killed at any moment goes on."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class RunCheckpoint(ModelCheckpoint):
    """``checkpoints/last.ckpt`` every few steps, and once more when the run is interrupted.

    Continue with ``--ckpt_path last``. A checkpoint holds what is trained, the optimizer, the place in the
    data and the loops; captions are drawn from (seed, step, rank), so there is no other random state.

    Args:
        every_n_train_steps: optimizer steps between checkpoints, at least 1.
        keep: how many older checkpoints stay beside the last one; -1 keeps all.
        dirpath: set from the run folder.
    """

    def __init__(self, every_n_train_steps: int = 25, keep: int = 1, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_last=True,
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ctrl-C, SIGTERM and errors: save what there is, as far as a fit has begun."""
        if trainer.state.fn != "fit" or trainer.global_step == 0 or self.dirpath is None:
            return
        path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        trainer.save_checkpoint(path, self.save_weights_only)
        rank_zero_info(f"{type(exception).__name__}: saved {path}; continue with --ckpt_path last")
