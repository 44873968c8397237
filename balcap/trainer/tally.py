"""Means over a step, its micro-batches and all ranks, with missing values left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Tally:
    """Sums and counts by name; the same names must be added on every rank, in the same order.

    What is on another device than the CPU stays there until it is asked for: the host would have to wait for it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float | Tensor, float | Tensor]] = {}
        self._largest: dict[str, float | Tensor] = {}

    def add(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        """Add a sum of `count` values under a name."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + _number(total), old_count + _number(count))

    def add_values(self, name: str, values: Tensor) -> None:
        """Add every value of a tensor that is not NaN."""
        known = ~values.isnan()
        self.add(name, torch.where(known, values, 0.0).double().sum(), known.sum())

    def add_max(self, name: str, value: float | Tensor) -> None:
        """Keep the largest of several values."""
        old, new = self._largest.get(name, -math.inf), _number(value)
        if isinstance(new, Tensor):
            self._largest[name] = new.clamp(min=old)
        else:
            self._largest[name] = max(old, new)

    def largest(self, all_gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Name -> largest value on any rank.

        Args:
            all_gather: maps ``[n]`` to ``[ranks, n]`` (or to itself on one rank).
        """
        if not self._largest:
            return {}
        local = _read(list(self._largest.values()))
        everywhere = all_gather(local) if all_gather else local
        return dict(zip(self._largest, everywhere.reshape(-1, len(local)).amax(0).tolist(), strict=True))

    def means(self, all_gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Name -> mean over all ranks; NaN where nothing was added.

        Args:
            all_gather: maps ``[n, 2]`` to ``[ranks, n, 2]`` (or to itself on one rank).
        """
        if not self._sums:
            return {}
        local = _read([value for pair in self._sums.values() for value in pair]).view(-1, 2)
        everywhere = all_gather(local) if all_gather else local
        total, count = everywhere.reshape(-1, *local.shape).sum(0).cpu().T
        means = torch.where(count > 0, total / count.clamp(min=1e-12), torch.nan)
        return dict(zip(self._sums, means.tolist(), strict=True))


def _number(value: float | Tensor) -> float | Tensor:
    """In 64 bits; a float, unless that would mean waiting for a device."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().double()
    return float(value)


def _read(values: Sequence[float | Tensor]) -> Tensor:
    """``[n]`` on the CPU; those on a device come in one copy."""
    there = [value for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(there).tolist() if there else ())
    return torch.tensor(
        [next(read) if isinstance(value, Tensor) else value for value in values], dtype=torch.float64
    )
