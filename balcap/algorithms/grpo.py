"""Vanilla GRPO on several rewards: sum first, then normalise the sum in the group."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from balcap.algorithms.base import AdvantageEstimator, AllGather
from balcap.algorithms.normalize import check_rewards, eps_problems, standardize


class GRPO(AdvantageEstimator):
    """`grpo` by ``class_path``.

    Args:
        eps: added to the standard deviation, above 0.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = eps

    def advantages(self, rewards: Tensor, weights: Tensor, all_gather: AllGather | None = None) -> Tensor:
        return grpo(rewards, weights, self.eps)

    def problems(self) -> list[str]:
        return eps_problems(self.eps)


def grpo(
    rewards: Float[Tensor, "B G K"],
    weights: Float[Tensor, " K"],
    eps: float = 1e-4,
) -> Float[Tensor, "B G"]:
    """Group-relative advantages of the weighted sum of the rewards.

    For prompt i, rollout j (GRPO, arXiv 2402.03300; the baseline of arXiv 2605.07394)::

        s_ij = sum_k w_k r_ijk
        A_ij = (s_ij - mean_j s_ij) / (std_j s_ij + eps)         in the group of prompt i, ddof = 1

    Args:
        rewards: finite, or NaN where the reward is missing.
        weights: in the order of the rewards. A reward of weight 0 is ignored, missing or not.
        eps: added to the standard deviation.

    Returns:
        At least float32; mean 0 and std ``s / (s + eps)`` over the complete rollouts of a group. With a
        single reward of weight 1 it equals `cgdpo` without whitening.

    Raises:
        ValueError: `weights` does not have one weight for each reward.

    Degenerate cases: a rollout that misses any reward of non-zero weight has no sum to compare; it gets
    exactly 0 and is left out of its group's mean and std. A group with fewer than two complete
    rollouts, or with equal sums, gets exactly 0.
    """
    rewards, weights = check_rewards(rewards, weights)
    # where, not a product alone: 0 * NaN is NaN, and a reward of weight 0 may be missing.
    sums = torch.where(weights != 0, rewards * weights, 0.0).sum(dim=-1)  # [B, G], NaN where incomplete
    return standardize(sums, dim=1, eps=eps)
