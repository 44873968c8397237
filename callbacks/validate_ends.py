"""Before and after: a validation pass at both ends of training."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


class ValidateAtEnds(Callback):
    """Validates before the first update and after the last one, inside ``fit``.

    Both passes run the trainer's own validation loop, so their ``val/*`` metrics land in the run's loggers
    like any other.

    The first pass is left out when a run is resumed, the last one where validation has just run on the same
    weights. A run that is killed, or that ends in an exception, gets no last pass. Random numbers of
    training are the same with and without this callback.
    """

    def __init__(self) -> None:
        self._validated_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated_step = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not `on_train_start`: callbacks hear of that before the module and the strategy do, and a module
        # may start what validation needs there.
        if trainer.global_step == 0 and self._validated_step is None:
            self._validate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._validated_step:
            self._validate(trainer, pl_module)

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What Lightning's training loop does when validation is due."""
        if not trainer.enable_validation:
            return
        connector = trainer._logger_connector
        first_loop_iter = connector._first_loop_iter
        pl_module.on_validation_model_zero_grad()
        trainer.validating = True
        try:
            with isolate_rng():
                trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
            connector._first_loop_iter = first_loop_iter
