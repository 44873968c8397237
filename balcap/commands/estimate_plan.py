"""How many images a run judges, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning.pytorch import Trainer

from balcap.data import CaptionDataModule


@dataclass(frozen=True)
class Plan:
    """What a run judges.

    Attributes:
        batches: training batches on each rank.
        images_per_batch: over all ranks.
        train_rows: different images that are trained on.
        validations: number of training batches before each validation, in order.
        val_images: images of one validation, over all ranks.
    """

    batches: int
    images_per_batch: int
    train_rows: int
    validations: tuple[int, ...]
    val_images: int

    def visits(self) -> tuple[int, int]:
        """Images that training judges for the first time, and again."""
        return _visits(self.batches * self.images_per_batch, self.train_rows)

    def val_visits(self) -> tuple[int, int]:
        """Likewise for validation."""
        return _visits(len(self.validations) * self.val_images, self.val_images)


def _visits(images: int, different: int) -> tuple[int, int]:
    first = min(images, different)
    return first, images - first


def make_plan(trainer: Trainer, data: CaptionDataModule, ranks: int, updates_per_rollout: int) -> Plan:
    """The images that a run on `ranks` processes judges. Reads the table of rows."""
    settings, split = data.settings, data.split
    per_batch, val_per_batch = settings.batch_size * ranks, settings.eval_batch_size * ranks
    per_epoch = limited(max(1, len(split.train) // per_batch), trainer.limit_train_batches)
    batches = training_batches(per_epoch, trainer.max_steps, trainer.max_epochs, updates_per_rollout)
    val_batches = limited(-(-len(split.val) // val_per_batch), trainer.limit_val_batches)
    val_images = min(len(split.val), val_batches * val_per_batch)
    interval = getattr(trainer, "val_check_interval", None)  # Lightning sets none where it is a time
    due = validations(batches, per_epoch, interval, trainer.check_val_every_n_epoch)
    causes = data.table.column("problem")
    good_rows = sum(not causes[int(row)] for row in split.train)
    return Plan(batches, per_batch, good_rows, due if val_images else (), val_images)


def training_batches(
    batches_per_epoch: int, max_steps: int, max_epochs: int | None, updates_per_rollout: int = 1
) -> int:
    """Batches until Lightning stops; -1 and None are no limit, of which one at least must be given.

    ``max_steps`` counts optimizer steps, of which a batch has `updates_per_rollout`; a batch that has begun
    is finished.
    """
    limits = []
    if max_steps >= 0:
        limits.append(math.ceil(max_steps / updates_per_rollout))
    if max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * batches_per_epoch)
    return min(limits) if batches_per_epoch else 0


def validations(
    batches: int, batches_per_epoch: int, interval: int | float | None, every_n_epochs: int | None
) -> tuple[int, ...]:
    """After how many batches there is a validation: before the first, as the settings say, after the last.

    Args:
        batches: of the whole run, on one rank.
        batches_per_epoch: on one rank.
        interval: ``trainer.val_check_interval``: batches, or a share of the epoch; None for neither (it is a
            time).
        every_n_epochs: ``trainer.check_val_every_n_epoch``; None counts `interval` over epochs.
    """
    if interval is None or not batches:
        return tuple(sorted({0, batches}))
    period = interval if isinstance(interval, int) else max(1, int(batches_per_epoch * interval))

    def is_due(done: int) -> bool:
        epoch, within = divmod(done - 1, batches_per_epoch)
        if every_n_epochs is None:
            return done % period == 0
        return (epoch + 1) % every_n_epochs == 0 and (within + 1) % period == 0

    return (0, *(done for done in range(1, batches) if is_due(done)), batches)


def limited(batches: int, limit: int | float) -> int:
    """``limit_train_batches`` and the like: a number of batches, or a share of them."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * min(limit, 1.0))


def ranks_of(devices: int | str | Sequence[int], nodes: int, accelerator: str, visible: int) -> int:
    """Processes that ``trainer.devices`` and ``num_nodes`` start.

    Args:
        devices: as in the config: a number, a list, ``"0,1"``, ``"auto"`` or -1.
        nodes: machines.
        accelerator: as in the config.
        visible: GPUs of this machine, which ``"auto"`` and -1 take for those of the run.
    """
    if str(devices) in ("auto", "-1"):
        return nodes if accelerator == "cpu" else nodes * max(1, visible)
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part.strip()]
    return nodes * (int(devices) if isinstance(devices, int | str) else len(devices))
