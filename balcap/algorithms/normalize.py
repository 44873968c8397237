"""Standard scores with missing values left out: what `cgdpo` and `grpo` share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def standardize(values: Tensor, dim: int, eps: float, population: Tensor | None = None) -> Tensor:
    """``(x - mean) / (std + eps)`` along `dim`, over what is there; std with ddof = 1.

    Args:
        values: any shape, NaN = missing.
        dim: the dimension that mean and std are taken over.
        eps: added to the std. Keeps a spread that is only rounding from being blown up; shrinks every
            result by ``std / (std + eps)``.
        population: values to take mean and std from instead, when `values` is only a part of them; same
            number of dimensions.

    Returns:
        The shape of `values`; 0 where the value is missing, and exactly 0 everywhere where the population
        along `dim` has fewer than two values or is constant.
    """
    mean, std, varies = statistics(values if population is None else population, dim)
    return torch.where(varies & ~values.isnan(), (values - mean) / (std + eps), 0.0)


def statistics(population: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, std (ddof = 1) and whether there are two different values, along `dim`, which stays as a dimension of 1; of
    what is there (NaN = missing)."""
    there = ~population.isnan()
    count = there.sum(dim, keepdim=True)
    mean = torch.where(there, population, 0.0).sum(dim, keepdim=True) / count.clamp(min=1)
    squares = torch.where(there, population - mean, 0.0).square().sum(dim, keepdim=True)
    std = (squares / (count - 1).clamp(min=1)).sqrt()

    # A constant population is detected by max == min: its mean can miss the constant by a rounding, and eps
    # alone would pass the miss on, divided by eps. The comparison is also False for one value or none.
    highest = torch.where(there, population, -torch.inf).amax(dim, keepdim=True)
    lowest = torch.where(there, population, torch.inf).amin(dim, keepdim=True)
    return mean, std, highest > lowest


def check_rewards(rewards: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and weights in at least float32, on one device.

    Raises:
        ValueError: shapes are not ``[B, G, K]`` and ``[K]``.
    """
    if rewards.ndim != 3 or weights.shape != rewards.shape[-1:]:
        raise ValueError(
            "rewards must be [B, G, K] and weights [K], one weight for each reward: "
            f"got {list(rewards.shape)} and {list(weights.shape)}"
        )
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return rewards.to(dtype), weights.to(rewards.device, dtype)


def eps_problems(eps: float, key: str = "model.advantage.init_args.eps") -> list[str]:
    """What is wrong with what is added to a standard deviation, with its key."""
    return [] if 0 < eps < math.inf else [f"{key}: {eps} must be above 0"]
