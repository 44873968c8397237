"""CorrGRPO: the spread that rewards share is counted once, by their correlations in the group."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from balcap.algorithms.base import AdvantageEstimator, AllGather
from balcap.algorithms.normalize import check_rewards, eps_problems


class CorrGRPO(AdvantageEstimator):
    """`corr_grpo` by ``class_path``.

    Args:
        eps: added to the denominator, above 0.
    """

    def __init__(self, eps: float = 1e-4) -> None:
        self.eps = eps

    def advantages(self, rewards: Tensor, weights: Tensor, all_gather: AllGather | None = None) -> Tensor:
        return corr_grpo(rewards, weights, self.eps)

    def problems(self) -> list[str]:
        return eps_problems(self.eps)


def corr_grpo(
    rewards: Float[Tensor, "B G K"],
    weights: Float[Tensor, " K"],
    eps: float = 1e-4,
) -> Float[Tensor, "B G"]:
    """Advantages of the sum of centred rewards, divided by the root of the sum of their correlations.

    For prompt i, rollout j, rewards l and m (CorrGRPO, 2026; second-hand: from notes on the paper's text, without its
    code)::

        A_ij = sum_l w_l (r_ijl - mean_j r_ijl) / (sqrt(sum_lm ρ_lm) + eps)    ρ: correlations in the group of prompt i

    The rewards are not divided by their own spread: that is what the formula says, and the difference from `cgdpo`.
    Independent rewards are divided by √K, equal ones by K.

    Args:
        rewards: finite, or NaN where the reward is missing.
        weights: in the order of the rewards. A reward of weight 0 is ignored, missing or not.
        eps: added to the denominator.

    Returns:
        At least float32; mean 0 over the complete rollouts of a group.

    Raises:
        ValueError: `weights` does not have one weight for each reward.

    Degenerate cases: a rollout that misses any reward of non-zero weight gets exactly 0 and is left out, as in `grpo`; a
    reward that is constant in a group has no correlations there and is left out of its denominator. Rewards that cancel
    (correlation -1) leave nothing but `eps` to divide by. A group with fewer than two complete rollouts gets exactly 0.
    """
    rewards, weights = check_rewards(rewards, weights)
    rewards, weights = rewards[..., weights != 0], weights[weights != 0]
    complete = ~rewards.isnan().any(-1, keepdim=True)  # [B, G, 1]
    count = complete.sum(1, keepdim=True)
    known = torch.where(complete, rewards, 0.0)
    centred = torch.where(complete, rewards - known.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    highest = torch.where(complete, rewards, -torch.inf).amax(1)
    varies = highest > torch.where(complete, rewards, torch.inf).amin(
        1
    )  # [B, K]; also False below two rollouts
    centred = torch.where(varies[:, None], centred, 0.0)
    norms = centred.square().sum(1).sqrt()  # [B, K]
    units = centred / torch.where(varies, norms, 1.0)[:, None]
    correlations = (units.sum(-1) ** 2).sum(1)  # [B]: the sum of all entries of units' Gram matrix
    return (centred * weights).sum(-1) / (correlations.sqrt()[:, None] + eps)
