"""What moves the bounds of the length-conditional mask: a schedule, or the lengths of the captions themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from balcap.algorithms import LengthMask, length_ratio
from balcap.algorithms.length_mask import TAU_HIGH, TAU_LOW
from balcap.trainer.distributed import gather


@dataclass(frozen=True)
class Bounds:
    """The mask's bounds from an optimizer step on.

    Attributes:
        step: optimizer step, ``trainer.global_step``.
        tau_low: smallest ``tokens(caption) / tokens(reference)`` that keeps the linguistic reward.
        tau_high: largest ratio that keeps it.
    """

    step: int
    tau_low: float
    tau_high: float


class LengthMaskSchedule(Callback):
    """Moves ``tau_low`` and ``tau_high`` of the module's length mask piecewise linearly over optimizer steps.

    Between two entries both bounds are interpolated, before the first and after the last they are constant.
    They are computed from the global step alone, so a resumed run needs no state to continue. Logged as
    ``train/tau_low`` and ``train/tau_high``. Validation is not masked and not touched.

    Args:
        schedule: entries ``{step, tau_low, tau_high}``, or triples in that order, by increasing step.

    Raises:
        ValueError: every problem of the schedule, each with its key.
    """

    def __init__(self, schedule: Sequence[Bounds | tuple[int, float, float]]) -> None:
        self.schedule = [entry if isinstance(entry, Bounds) else _parsed(entry) for entry in schedule]
        if problems := _problems(self.schedule):
            raise ValueError("\n".join(problems))
        self._masks: list[LengthMask] = []

    def at(self, step: int) -> tuple[float, float]:
        """``(tau_low, tau_high)`` at an optimizer step."""
        steps, lows, highs = zip(*((e.step, e.tau_low, e.tau_high) for e in self.schedule), strict=True)
        return float(np.interp(step, steps, lows)), float(np.interp(step, steps, highs))

    def module_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What of the config does not go together with it, with the key to change."""
        return _mask_problems(pl_module, "LengthMaskSchedule")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse(self.module_problems(trainer, pl_module))
        self._masks = _masks(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        tau_low, tau_high = self.at(trainer.global_step)
        _set_bounds(self._masks, tau_low, tau_high)
        _log_bounds(pl_module, tau_low, tau_high)


class TargetBand(Callback):
    """Narrows the module's length mask from where the policy's captions are to a target band, as they come nearer.

    Where most captions are far outside ``[tau_low, tau_high]``, the mask makes the linguistic reward 0 in whole groups, and
    a constant reward teaches nothing. Here the mask always strikes the tails of the policy's own distribution, so that
    groups keep a spread. After each step, with q_low and q_high the exponential moving averages over steps of the quantiles
    `quantile` and 1 - `quantile` of ρ = tokens(caption) / tokens(reference) over the captions of all ranks::

        tau_low  <- max(tau_low,  min(tau_low  + rate, q_low,  target_low))
        tau_high <- min(tau_high, max(tau_high - rate, q_high, target_high))

    So a bound moves towards its target alone: were it to follow the policy outwards too, endless captions would take
    the mask along. It waits while the policy stays where it is; a band that has to arrive at a given step is a
    `LengthMaskSchedule`. The first step masks nothing, and its captions give the first band: ``min(q_low, target_low)``
    and ``max(q_high, target_high)``. The rule is ours; the paper (arXiv 2605.07394) keeps the bounds constant.

    Captions without a reference have no ρ and are left out; a step without any moves nothing. Logged as
    ``train/tau_low`` and ``train/tau_high``, from the second step on. Validation is not masked. The state is in the
    checkpoint, so that a resumed run goes on as it would have.

    Args:
        target_low: where ``tau_low`` ends, at least 0.
        target_high: where ``tau_high`` ends.
        quantile: share of the captions beyond each bound that the band follows, in [0, 0.5).
        rate: most that a bound moves in a step, in units of ρ, above 0.
        smoothing: weight of the past in the moving averages, in [0, 1).

    Raises:
        ValueError: every setting that is out of range, each with its key.
    """

    def __init__(
        self,
        target_low: float = TAU_LOW,
        target_high: float = TAU_HIGH,
        quantile: float = 0.1,
        rate: float = 0.02,
        smoothing: float = 0.9,
    ) -> None:
        self.target_low, self.target_high = target_low, target_high
        self.quantile, self.rate, self.smoothing = quantile, rate, smoothing
        if problems := self._problems():
            raise ValueError("\n".join(problems))
        self.bounds: tuple[float, float] | None = None
        self.quantiles: tuple[float, float] | None = None
        self._masks: list[LengthMask] = []

    def _problems(self) -> list[str]:
        rules = [
            (
                "target_low, target_high",
                (self.target_low, self.target_high),
                0 <= self.target_low <= self.target_high < math.inf,
                "must be finite, at least 0, and in this order",
            ),
            ("quantile", self.quantile, 0 <= self.quantile < 0.5, "is outside [0, 0.5)"),
            ("rate", self.rate, self.rate > 0, "must be above 0"),
            ("smoothing", self.smoothing, 0 <= self.smoothing < 1, "is outside [0, 1)"),
        ]
        return [f"TargetBand.{name}: {value} {rule}" for name, value, holds, rule in rules if not holds]

    def observe(self, ratios: Tensor) -> None:
        """Move the bounds by the length ratios of one step, of any shape, over all ranks; NaN is left out."""
        known = ratios[~ratios.isnan()]
        if not len(known):
            return
        levels = known.new_tensor([self.quantile, 1 - self.quantile])
        low, high = torch.quantile(known, levels).tolist()
        if self.quantiles is None or self.bounds is None:
            self.quantiles = low, high
            self.bounds = min(low, self.target_low), max(high, self.target_high)
            return
        past = self.smoothing
        low, high = (
            past * old + (1 - past) * new for old, new in zip(self.quantiles, (low, high), strict=True)
        )
        self.quantiles = low, high
        tau_low, tau_high = self.bounds
        self.bounds = (
            max(tau_low, min(tau_low + self.rate, low, self.target_low)),
            min(tau_high, max(tau_high - self.rate, high, self.target_high)),
        )

    def module_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What of the config does not go together with it, with the key to change."""
        problems = _mask_problems(pl_module, "TargetBand")
        if any(isinstance(other, LengthMaskSchedule) for other in trainer.callbacks):  # type: ignore[attr-defined]
            problems.append(
                "trainer.callbacks: TargetBand and LengthMaskSchedule both set the length mask; keep one"
            )
        return problems

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse(self.module_problems(trainer, pl_module))
        self._masks = _masks(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        _set_bounds(self._masks, *(self.bounds or (0.0, math.inf)))
        if self.bounds is not None:
            _log_bounds(pl_module, *self.bounds)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for record in outputs["records"]:
            rollouts = record.rollouts
            self.observe(gather(trainer, length_ratio(rollouts.lengths, rollouts.reference_lengths)))

    def state_dict(self) -> dict[str, Any]:
        """Bounds and moving averages."""
        return {"bounds": self.bounds, "quantiles": self.quantiles}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.bounds, self.quantiles = state_dict["bounds"], state_dict["quantiles"]


def _masks(pl_module: LightningModule) -> list[LengthMask]:
    """The module's length masks."""
    transforms: Any = getattr(pl_module, "reward_transforms", ())
    return [one for one in transforms if isinstance(one, LengthMask)]


def _mask_problems(pl_module: LightningModule, callback: str) -> list[str]:
    why = "model.reward_transforms holds no balcap.algorithms.LengthMask to move; add it, or leave the callback out"
    return [] if _masks(pl_module) else [f"trainer.callbacks: {callback}: {why}"]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _set_bounds(masks: Sequence[LengthMask], tau_low: float, tau_high: float) -> None:
    for mask in masks:
        mask.tau_low, mask.tau_high = tau_low, tau_high


def _log_bounds(pl_module: LightningModule, tau_low: float, tau_high: float) -> None:
    for name, value in (("tau_low", tau_low), ("tau_high", tau_high)):
        pl_module.log(f"train/{name}", value, on_step=True, on_epoch=False, batch_size=1)


def _parsed(entry: Any) -> Bounds:
    """An entry written as a mapping or a triple."""
    try:
        return Bounds(**entry) if isinstance(entry, dict) else Bounds(*entry)
    except TypeError as error:
        raise ValueError(f"schedule: an entry is {{step, tau_low, tau_high}}, got {entry!r}") from error


def _problems(schedule: Sequence[Bounds]) -> list[str]:
    if not schedule:
        return ["schedule: needs at least one entry {step, tau_low, tau_high}"]
    problems = []
    for i, entry in enumerate(schedule):
        if entry.step < 0:
            problems.append(f"schedule[{i}].step: must be at least 0, got {entry.step}")
        if i and entry.step <= schedule[i - 1].step:
            problems.append(
                f"schedule[{i}].step: steps must increase, got {entry.step} after {schedule[i - 1].step}"
            )
        if not (entry.tau_low >= 0 and math.isfinite(entry.tau_high)):
            problems.append(f"schedule[{i}].tau_low, tau_high: must be finite and at least 0, got {entry}")
        elif not entry.tau_low <= entry.tau_high:
            problems.append(f"schedule[{i}].tau_low: {entry.tau_low} is above tau_high {entry.tau_high}")
    return problems
