"""Weights of the rewards that follow which of them lags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from balcap.trainer.distributed import sums


def balanced_weights(
    weights: Mapping[str, float], levels: Mapping[str, float], strength: float
) -> dict[str, float]:
    """Weights moved towards the rewards whose level is below the others'.

    With s_k the level of reward k, w_k its weight, and s = Σ w_k s_k / Σ w_k over the rewards with a level::

        w_k <- w_k (1 + strength (s - s_k))

    Levels are in [0, 1], so each factor is in [1 - strength, 1 + strength]; and Σ w_k (s - s_k) = 0, so the sum of the
    weights stays. The simplest rule that does both: it needs no clipping and no rescaling. The rule is ours; the paper
    (arXiv 2605.07394) keeps the weights constant.

    Args:
        weights: reward name -> weight, at least 0; a weight of 0 stays 0.
        levels: reward name -> mean reward in [0, 1]; a reward without one keeps its weight.
        strength: in [0, 1]; 0 changes nothing.

    Degenerate case: where no reward of non-zero weight has a level, or all have the same, the weights stay.
    """
    there = {name: weight for name, weight in weights.items() if weight and name in levels}
    total = sum(there.values())
    mean = sum(weight * levels[name] for name, weight in there.items()) / total if total else 0.0
    moved = {name: weight * (1 + strength * (mean - levels[name])) for name, weight in there.items()}
    return {**weights, **moved}


class BalanceWeights(Callback):
    """Moves the module's weights towards the reward that lags: `balanced_weights` of running means.

    A level is the exponential moving average over steps of the mean reward over the captions of all ranks, as
    ``train/<name>`` logs it: before the reward transforms, because the length mask makes rewards constant, and weight on
    what is constant teaches nothing. A missing reward (NaN) is left out, and a step that misses all of one
    reward leaves its level where it is. Levels are means, so a reward that can never be high (recall of long references)
    always counts as lagging; choose `strength` with that in mind.

    Logged as ``train/weight_<name>``. The levels are in the checkpoint, so that a resumed run goes on as it would have.

    Args:
        strength: a weight stays within ``1 ± strength`` of the configured one, in (0, 1].
        smoothing: weight of the past in the moving averages, in [0, 1).

    Raises:
        ValueError: every setting that is out of range, each with its key.
    """

    def __init__(self, strength: float = 0.5, smoothing: float = 0.9) -> None:
        rules = [
            ("strength", strength, 0 < strength <= 1, "is outside (0, 1]"),
            ("smoothing", smoothing, 0 <= smoothing < 1, "is outside [0, 1)"),
        ]
        problems = [
            f"BalanceWeights.{name}: {value} {rule}" for name, value, holds, rule in rules if not holds
        ]
        if problems:
            raise ValueError("\n".join(problems))
        self.strength, self.smoothing = strength, smoothing
        self.levels: dict[str, float] = {}
        self._configured: dict[str, float] = {}

    def observe(self, means: Mapping[str, float]) -> None:
        """Move the levels by the mean rewards of one step, in [0, 1]."""
        for name, mean in means.items():
            self.levels[name] = self.smoothing * self.levels.get(name, mean) + (1 - self.smoothing) * mean

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self._configured = dict(module.weights)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        module.weights = balanced_weights(self._configured, self.levels, self.strength)
        for name, weight in module.weights.items():
            module.log(f"train/weight_{name}", weight, on_step=True, on_epoch=False, batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for record in outputs["records"]:
            rewards = record.rewards.flatten(0, 1).double()  # [B * G, K]
            there = ~rewards.isnan()
            local = [*rewards.nansum(0).tolist(), *there.sum(0).tolist()]
            totals = sums(trainer, local)  # [2 K]
            names = list(record.reward_names)
            pairs = zip(names, totals[: len(names)], totals[len(names) :], strict=True)
            self.observe({name: total / count for name, total, count in pairs if count})

    def state_dict(self) -> dict[str, Any]:
        """The levels."""
        return {"levels": self.levels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.levels = state_dict["levels"]
