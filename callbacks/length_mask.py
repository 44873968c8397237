"""A schedule of the length-conditional mask's bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from balcap.algorithms import LengthMask


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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        transforms: Any = getattr(pl_module, "reward_transforms", ())
        self._masks = [one for one in transforms if isinstance(one, LengthMask)]
        if not self._masks:
            raise ValueError(
                "LengthMaskSchedule: model.reward_transforms holds no balcap.algorithms.LengthMask to schedule"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        tau_low, tau_high = self.at(trainer.global_step)
        for name, value in (("tau_low", tau_low), ("tau_high", tau_high)):
            for mask in self._masks:
                setattr(mask, name, value)
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
