"""What ranks tell each other. Every function here is a collective: all ranks call it, or they wait for each other."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from balcap.utils.errors import RunStopped


def gather(trainer: Trainer, tensor: Tensor) -> Tensor:
    """All ranks' tensors, with a leading rank dimension where there is more than one; on the tensor's device."""
    gathered = trainer.strategy.all_gather(tensor.to(trainer.strategy.root_device))
    return gathered.to(tensor.device)


def sums(trainer: Trainer, values: list[float]) -> list[float]:
    """Each value summed over the ranks."""
    local = torch.tensor(values, dtype=torch.float64)
    return gather(trainer, local).reshape(-1, len(values)).sum(0).tolist()


def gather_objects(trainer: Trainer, mine: Any) -> list[Any]:
    """``[ranks]`` what each rank gives."""
    if trainer.world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def stop_together(trainer: Trainer, why: RunStopped | None) -> None:
    """Raise on all ranks what stopped the first of them: they save a checkpoint together, and end alike."""
    if gather(trainer, torch.tensor([float(why is not None)])).sum() > 0:
        raise next(reason for reason in gather_objects(trainer, why) if reason is not None)
