"""Checks of a whole config before anything is loaded or paid.

Every group of settings checks itself (``problems()``); what concerns several groups at once is here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from balcap.module import BalCapModule


class ConfigError(SystemExit):
    """A config that cannot work; the message lists every problem and the key that fixes each."""

    def __init__(self, problems: list[str]) -> None:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"This config cannot run. Nothing was loaded or paid; change:\n{lines}")
        self.problems = problems


def model_problems(model: BalCapModule) -> list[str]:
    """Everything in the model's settings that contradicts itself, each with the key to change. Loads nothing."""
    problems = [*model.policy_config.problems(), *model.pipeline.sampling.problems()]
    problems += [] if model.judge is None else model.judge.problems()
    problems += model.update_settings.problems() + _reward_problems(model)
    if model.num_captions < 2:
        problems.append(
            f"model.num_captions: a group of {model.num_captions} has no spread to normalise; use 2 or more"
        )
    if model.val_captions < 1:
        problems.append(f"model.val_captions: {model.val_captions} must be at least 1")
    return problems


def _reward_problems(model: BalCapModule) -> list[str]:
    """Rewards against weights, judge, and transforms."""
    problems, names = [], model.rewards.names
    there = ", ".join(names)
    for name, weight in model.weights.items():
        if name not in names:
            problems.append(f"model.weights.{name}: no such reward; there are {there}")
        if not 0 <= weight < math.inf:
            problems.append(f"model.weights.{name}: {weight} must be at least 0")
    if not any(model.weights.values()):
        problems.append(
            f"model.weights: all weights are 0, nothing would be trained; give one of {there} a weight"
        )
    needing = [reward.name for reward in model.rewards.rewards if reward.needs]
    if model.judge is None and needing:
        problems.append(f"model.judge: {', '.join(map(str, needing))} need judgments; name a judge")
    for transform in model.reward_transforms:
        problems += transform.problems(names)
    return problems


def trainer_problems(trainer: Trainer, subcommand: str) -> list[str]:
    """What the trainer's own settings leave impossible."""
    problems = []
    endless = trainer.max_steps == -1 and trainer.max_epochs in (-1, None)
    if subcommand in ("fit", "estimate") and endless:
        problems.append("trainer.max_steps: the run would never end; set it, or trainer.max_epochs")
    if any(word in type(trainer.strategy).__name__ for word in ("FSDP", "DeepSpeed", "ModelParallel")):
        problems.append(
            f"trainer.strategy: {type(trainer.strategy).__name__} is not supported yet; use ddp, with "
            "model.policy.lora where the weights do not fit twice"
        )
    return problems
