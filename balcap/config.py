"""Checks of a whole config before anything is loaded or paid.

Every group of settings checks itself (``problems()``); what concerns several groups at once is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from balcap.utils.errors import next_line

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from balcap.module import BalCapModule


class ConfigError(SystemExit):
    """A config that cannot work; the message lists every problem and the key that fixes each.

    Args:
        problems: each begins with its key.
        given: the command, if known, with which the message ends as it should be typed next.
    """

    def __init__(self, problems: list[str], given: Sequence[str] = ()) -> None:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        then = next_line(given, problems, "--changed") if given else ""
        super().__init__(f"This config cannot run. Nothing was loaded or paid; change:\n{lines}{then}")
        self.problems = problems


def model_problems(model: BalCapModule, judges: bool = True) -> list[str]:
    """Everything in the model's settings that contradicts itself, each with the key to change. Loads nothing.

    Args:
        model: whose settings.
        judges: whether its judge will be asked.
    """
    problems = [*model.policy_config.problems(), *model.pipeline.sampling.problems()]
    problems += model.judge.problems() if model.judge is not None and judges else []
    problems += model.update_settings.problems() + _reward_problems(model)
    problems += model.advantage.problems() + _optimizer_problems(model) + _engine_problems(model)
    if model.supervised and model.update_settings.kl_coef:
        problems.append(
            "model.kl_coef: the KL term is of sampled captions, and with model.supervised there are none; set it to 0"
        )
    if model.num_captions < 2:
        problems.append(
            f"model.num_captions: a group of {model.num_captions} has no spread to normalise; use 2 or more"
        )
    if not 0 <= model.predict_temperature < math.inf:
        problems.append(f"model.predict_temperature: {model.predict_temperature} must be at least 0")
    if model.val_captions < 1:
        problems.append(f"model.val_captions: {model.val_captions} must be at least 1")
    return problems


def column_problems(model: BalCapModule, columns: Sequence[str] | None) -> list[str]:
    """Columns of the data that rewards read and ``data.columns`` does not name."""
    rewards: Any = model.rewards.rewards
    wanted = {column: reward.name for reward in rewards for column in reward.columns}
    return [
        f"data.columns: the reward {name} reads {column}; write data.columns: [{column}]"
        for column, name in wanted.items()
        if column not in (columns or ())
    ]


def reference_problems(model: BalCapModule, require_captions: bool) -> list[str]:
    """Rewards that need references in a run whose data may have none."""
    rewards: Any = model.rewards.rewards
    if require_captions:
        return []
    if model.supervised:
        return ["data.require_captions: model.supervised learns the captions of the data; keep it true"]
    needing = [reward.name for reward in rewards if reward.needs_reference]
    way_out = "keep it true, or take rewards without (configs/methods/reference_free.yaml)"
    return [f"data.require_captions: the reward {name} needs references; {way_out}" for name in needing]


def _optimizer_problems(model: BalCapModule) -> list[str]:
    """Of optimizer and schedule, which are tried on one number."""
    import torch

    key = "model.optimizer"
    try:
        optimizer = model.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
        groups = [(name, value) for group in optimizer.param_groups for name, value in group.items()]
        key = "model.scheduler"
        if model.scheduler_factory is not None:
            model.scheduler_factory(optimizer)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        return [f"{key}: {error}"]
    problems = []
    for name, value in groups:
        if (isinstance(value, float) and not math.isfinite(value)) or (name == "lr" and not value > 0):
            problems.append(f"model.optimizer.init_args.{name}: {value} must be a number above 0")
    return problems


def _engine_problems(model: BalCapModule) -> list[str]:
    from balcap.rollout import VLLMInProcess
    from balcap.rollout.vllm.start import WHOLE_WEIGHTS

    engine, policy = model.pipeline.engine, model.policy_config
    if not isinstance(engine, VLLMInProcess):
        return []
    if find_spec("vllm") is None:
        return ['model.engine: vLLM is not installed; pip install -e ".[vllm]", or leave model.engine out']
    quantization = (engine.options or {}).get("quantization")
    if quantization and policy.lora is None and policy.adapter is None:
        return [
            f"model.engine.init_args.options.quantization: {quantization}: {WHOLE_WEIGHTS}, or leave it out"
        ]
    return []


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
    trained = [reward for reward in model.rewards.rewards if model.weights.get(str(reward.name))]
    judging = [one for one in trained if one.judges_assertions]
    if not model.advantage.needs_coverage:
        judging = [one for one in judging if not one.needs_for_spans]
    if model.advantage.needs_spans and not judging:
        problems.append(
            f"model.advantage: {type(model.advantage).__name__} gives credit by verdicts on assertions; add "
            "balcap.rewards.Precision to model.rewards, with a weight, or use CGDPO"
        )
    if model.advantage.needs_coverage and not any(one.needs_for_spans for one in trained):
        problems.append(
            "model.advantage.init_args.coverage: no reward with a weight says which assertions earn it, as "
            "balcap.rewards.Recall does; add it, or set coverage to false"
        )
    for transform in model.reward_transforms:
        problems += transform.problems(names)
    for changing in model.advantage_transforms:
        if model.advantage.needs_spans and changing.per_caption:
            problems.append(
                f"model.advantage_transforms: {type(changing).__name__} changes advantages of captions, and "
                f"{type(model.advantage).__name__} gives those of tokens; leave one of them out"
            )
    return problems


def _fit_problems(trainer: Trainer, model: BalCapModule) -> list[str]:
    """Of a fit: when it ends, and what of Lightning's automatic optimization has another place here."""
    problems = []
    if trainer.max_steps == -1 and trainer.max_epochs in (-1, None):
        problems.append("trainer.max_steps: the run would never end; set it, or trainer.max_epochs")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            problems.append(f"trainer.{name}: 0 trains nothing")
    if trainer.val_check_interval == 0:
        problems.append("trainer.val_check_interval: 0 is no interval; data.val_size: 0 validates never")
    if trainer.accumulate_grad_batches != 1:
        problems.append(
            "trainer.accumulate_grad_batches: an update is always on the whole batch; set data.batch_size, and "
            "model.micro_batch_size (images per forward pass) or model.max_tokens_per_forward for its memory"
        )
    if trainer.gradient_clip_val:
        problems.append("trainer.gradient_clip_val: the norm is clipped by model.max_grad_norm; set that one")
    # Small gradients are 0 in float16, unless losses are scaled, and skipped updates would mean two things then.
    # bfloat16 has the range of float32.
    plugin: Any = trainer.precision_plugin
    if getattr(plugin, "scaler", None) is not None or plugin.precision in ("16-true", "16-mixed"):
        problems.append(
            "trainer.precision: gradients underflow in float16; use bf16-mixed, or 32-true on a GPU without bfloat16"
        )
    if model.policy_config.dtype == "float16":
        problems.append(
            "model.policy.dtype: gradients underflow in float16; use bfloat16 or float32 to train"
        )
    return problems


def strategy_problems(trainer: Trainer, model: BalCapModule) -> list[str]:
    """Of how ranks work together."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    from balcap.trainer.sharded import sharding_problems

    if isinstance(trainer.strategy, ModelParallelStrategy):
        return sharding_problems(trainer, model)
    if any(word in type(trainer.strategy).__name__ for word in ("FSDP", "DeepSpeed")):
        return [
            f"trainer.strategy: {type(trainer.strategy).__name__} is not supported; shard the policy with Lightning's "
            "ModelParallelStrategy (configs/qwen7b_full_fsdp2.yaml), or use ddp"
        ]
    return []


def trainer_problems(trainer: Trainer, model: BalCapModule, subcommand: str) -> list[str]:
    """What the trainer's own settings leave impossible."""
    problems = [] if subcommand not in ("fit", "plan", "estimate") else _fit_problems(trainer, model)
    problems += strategy_problems(trainer, model)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        problems += callback.problems() if hasattr(callback, "problems") else []
        if subcommand == "fit" and hasattr(callback, "module_problems"):
            problems += callback.module_problems(trainer, model)
    return problems
