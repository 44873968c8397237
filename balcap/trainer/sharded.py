"""What a trainer with Lightning's ``ModelParallelStrategy`` means here: the policy is cut over all ranks (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

if TYPE_CHECKING:
    from balcap.policy.sharding import Sharding


def sharding_of(trainer: Trainer | None) -> Sharding | None:
    """Of the policy of this trainer, whose processes have met; None where each rank holds all of it."""
    from balcap.policy.sharding import Sharding

    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy):
        return None
    compute_dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
    return Sharding(trainer.strategy.device_mesh["data_parallel"], compute_dtype)
