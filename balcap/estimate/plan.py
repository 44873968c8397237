"""How many images a run judges, and when: arithmetic on the settings of trainer and data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from balcap.data.stream import even_chunks

if TYPE_CHECKING:
    import numpy as np
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
        sanity_images: images of Lightning's own check before training, over all ranks.
    """

    batches: int
    images_per_batch: int
    train_rows: int
    validations: tuple[int, ...]
    val_images: int
    sanity_images: int = 0

    @property
    def images(self) -> int:
        """Groups of captions that training judges."""
        return self.batches * self.images_per_batch

    def visits(self) -> list[int]:
        """How many images training sees at least once, at least twice, …; their sum is `images`."""
        return visits(self.images, self.train_rows)


def visits(images: int, rows: int) -> list[int]:
    """`images` drawn round after round from `rows`: how many are seen for the first, the second, … time."""
    if not images or not rows:
        return []
    rounds, rest = divmod(images, rows)
    return [rows] * rounds + ([rest] if rest else [])


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
    found = [0]
    if interval is not None and batches:
        period = interval if isinstance(interval, int) else max(1, int(batches_per_epoch * interval))
        for done in range(1, batches + 1):
            epoch, within = divmod(done - 1, batches_per_epoch)
            if every_n_epochs is None:
                due = done % period == 0
            else:
                due = (epoch + 1) % every_n_epochs == 0 and (within + 1) % period == 0
            if due:
                found.append(done)
    return tuple(dict.fromkeys([*found, batches]))


def val_images(rows: Sequence[int] | np.ndarray, ranks: int, batch_size: int, limit: int | float) -> int:
    """Images of one validation over all ranks, as `CaptionDataModule.val_dataloader` deals them out.

    Args:
        rows: that are held out.
        ranks: processes.
        batch_size: images per batch and rank.
        limit: batches on each rank, or a share of them.
    """
    import numpy as np

    rows = np.asarray(rows)
    shares = [even_chunks(rows, rank, ranks, batch_size) for rank in range(ranks)]
    if len({len(share) for share in shares}) > 1:
        rows = rows[: len(rows) // ranks * ranks]
        shares = [even_chunks(rows, rank, ranks, batch_size) for rank in range(ranks)]
    return sum(len(chunk) for share in shares for chunk in share[: _limited(len(share), limit)])


def ranks_of(
    devices: int | str | Sequence[int], nodes: int, accelerator: str, visible: int
) -> tuple[int, bool]:
    """Processes that ``trainer.devices`` and ``num_nodes`` start, and whether that is certain.

    Args:
        devices: as in the config: a number, a list, ``"0,1"``, ``"auto"`` or -1.
        nodes: machines.
        accelerator: as in the config.
        visible: GPUs of this machine.
    """
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]  # type: ignore[misc]
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, (list, tuple)):
        return len(devices) * nodes, True
    if isinstance(devices, int) and devices > 0:
        return devices * nodes, True
    if accelerator == "cpu":
        return nodes, True
    return max(1, visible) * nodes, False


def plan_of(trainer: Trainer, data: CaptionDataModule, ranks: int, updates_per_rollout: int) -> Plan:
    """The plan of a run with this trainer and data on `ranks` processes. Reads the table of rows.

    Raises:
        DataError: if the rows cannot be used.
    """
    from balcap.data.sharegpt4v import column

    split = data.split
    causes = column(data.table, "problem")
    per_epoch = max(1, len(split.train) // (data.settings.batch_size * ranks))
    per_epoch = _limited(per_epoch, trainer.limit_train_batches)
    batches = training_batches(per_epoch, trainer.max_steps, trainer.max_epochs, updates_per_rollout)
    validated = sanity = 0
    if data.settings.val_size and trainer.limit_val_batches:
        size = data.settings.eval_batch_size
        validated = val_images(split.val, ranks, size, trainer.limit_val_batches)
        checks = trainer.num_sanity_val_steps
        sanity = validated if checks == math.inf else val_images(split.val, ranks, size, int(checks))
    timed = getattr(trainer, "_val_check_time_interval", None) is not None
    every = trainer.check_val_every_n_epoch
    due = validations(batches, per_epoch, None if timed else trainer.val_check_interval, every)
    return Plan(
        batches=batches,
        images_per_batch=data.settings.batch_size * ranks,
        train_rows=sum(not causes[int(row)] for row in split.train),
        validations=due if validated else (),
        val_images=validated,
        sanity_images=min(sanity, validated),
    )


def _limited(batches: int, limit: int | float) -> int:
    """``limit_train_batches`` and the like: a number of batches, or a share of them."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * min(limit, 1.0))
