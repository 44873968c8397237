"""What a trainer with Lightning's ``ModelParallelStrategy`` means here: the policy is cut over all ranks (FSDP2)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

if TYPE_CHECKING:
    from balcap.module import BalCapModule
    from balcap.policy.sharding import Sharding


def sharding_of(trainer: Trainer | None) -> Sharding | None:
    """Of the policy of this trainer, whose processes have met; None where each rank holds all of it."""
    from balcap.policy.sharding import Sharding

    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy):
        return None
    compute_dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
    return Sharding(trainer.strategy.device_mesh["data_parallel"], compute_dtype)


def sharding_problems(trainer: Trainer, model: BalCapModule) -> list[str]:
    """What of a config does not go together with a policy that is cut over all ranks, each with the key to change."""
    from balcap.rollout import HFGenerate, VLLMServer

    strategy: Any = trainer.strategy
    ranks, key, problems = trainer.num_nodes * trainer.num_devices, "trainer.strategy.init_args", []
    if strategy._tensor_parallel_size != 1:
        problems.append(
            f"{key}.tensor_parallel_size: {strategy._tensor_parallel_size}: weights are cut over ranks, layers are not; "
            "set it to 1"
        )
    if strategy._data_parallel_size != ranks:
        problems.append(
            f"{key}.data_parallel_size: {strategy._data_parallel_size}: all ranks share one policy; set it to their number, "
            f"{ranks} (trainer.num_nodes x trainer.devices)"
        )
    if trainer.precision not in ("32-true", "bf16-mixed"):
        problems.append(
            f"trainer.precision: {trainer.precision} is not supported with a sharded policy; use bf16-mixed, or 32-true"
        )
    with suppress(ValueError, TypeError, ZeroDivisionError):  # settings that it refuses are named elsewhere
        optimizer = model.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
        if type(optimizer).__module__.startswith("bitsandbytes."):
            problems.append(
                f"model.optimizer: {type(optimizer).__name__} of bitsandbytes cannot step on weights in parts; use "
                "torch.optim.AdamW, of whose state each rank holds its part, or trainer.strategy: ddp"
            )
    if model.policy_config.load_in_4bit:
        problems.append(
            "model.policy.load_in_4bit: 4-bit weights cannot be cut over ranks; set it to false, or trainer.strategy: ddp"
        )
    engine, unsampled = model.pipeline.engine, model.supervised and trainer.limit_val_batches == 0
    if isinstance(engine, HFGenerate) and not unsampled:
        problems.append(
            "model.engine: no rank holds the policy's weights, so the policy cannot sample itself; sample with vLLM "
            "(--config configs/engine/vllm.yaml, or vllm_server.yaml for GPUs of its own)"
        )
    if isinstance(engine, VLLMServer) and engine.transfer_backend == "nccl":
        problems.append(
            "model.engine.init_args.transfer_backend: nccl sends weights that one rank holds, and here none does; use auto "
            "or folder"
        )
    return problems
