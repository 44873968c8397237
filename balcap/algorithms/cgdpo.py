"""c-GDPO: every reward is normalised in its group before the rewards are summed (arXiv 2605.07394)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from balcap.algorithms.base import AdvantageEstimator, AllGather
from balcap.algorithms.normalize import check_rewards, eps_problems, standardize, statistics


class CGDPO(AdvantageEstimator):
    """`cgdpo` by ``class_path``.

    Args:
        eps: added to both standard deviations, above 0.
        whiten: normalise the weighted sum over the batch of all ranks as well.
    """

    def __init__(self, eps: float = 1e-4, whiten: bool = True) -> None:
        self.eps, self.whiten = eps, whiten

    def advantages(self, rewards: Tensor, weights: Tensor, all_gather: AllGather | None = None) -> Tensor:
        return cgdpo(rewards, weights, self.eps, self.whiten, all_gather)

    def problems(self) -> list[str]:
        return eps_problems(self.eps)


def cgdpo(
    rewards: Float[Tensor, "B G K"],
    weights: Float[Tensor, " K"],
    eps: float = 1e-4,
    whiten: bool = True,
    all_gather: AllGather | None = None,
) -> Float[Tensor, "B G"]:
    """Advantages of c-GDPO: decoupled normalisation, weighted sum, batch whitening.

    For prompt i, rollout j, reward k (arXiv 2605.07394, advantage of c-GDPO)::

        A_ijk = (r_ijk - mean_j r_ijk) / (std_j r_ijk + eps)     in the group of prompt i, ddof = 1
        A_ij  = sum_k w_k A_ijk
        A_ij <- (A_ij - mean A) / (std A + eps)                  over the optimizer step, ddof = 1

    Because each reward is divided by its own spread first, a reward with a small spread (precision) is
    not drowned by one with a large spread (a masked linguistic reward), and two different triples do not
    collapse into one advantage because their sums are equal.

    Args:
        rewards: finite, or NaN where the reward is missing. All micro-batches of the optimizer step
            together: the whitening looks at what is passed here, and at other ranks through `all_gather`.
        weights: α, β, γ of the paper, in the order of the rewards. A reward of weight 0 is ignored, and
            whether it is missing does not matter.
        eps: added to both standard deviations.
        whiten: False leaves out the third line.
        all_gather: maps a tensor ``[B, G]`` of this rank to ``[ranks, B, G]`` of all, in any order of ranks,
            or to ``[B, G]`` where there is one: what `LightningModule.all_gather` does. Called exactly
            once, by every rank, when `whiten`; B and G must be equal on all ranks. None: this rank is alone.

    Returns:
        At least float32. Whitened advantages have mean 0 and std ``s / (s + eps)`` over the scored
        rollouts of all ranks, s being the std before whitening. Shifting a reward changes nothing; scaling
        it by c changes its term only by ``(1 + eps / std) / (1 + eps / (c std))``.

    Raises:
        ValueError: `weights` does not have one weight for each reward.

    Degenerate cases: a missing reward contributes 0 to the sum of its rollout. A reward that is constant in a
    group, or that fewer than two of its rollouts have, contributes exactly 0 to that group. A rollout with
    no reward of non-zero weight gets exactly 0 and is not part of the whitening's mean and std. Where
    all sums are equal, as when every group is constant, all advantages are exactly 0. The terms of a
    group add up to 0, missing rewards or not, so the mean that whitening takes off is 0 up to rounding: it
    scales the step and moves nobody.
    """
    return cgdpo_terms(rewards, weights, eps, whiten, all_gather)[0]


def cgdpo_terms(
    rewards: Float[Tensor, "B G K"],
    weights: Float[Tensor, " K"],
    eps: float = 1e-4,
    whiten: bool = True,
    all_gather: AllGather | None = None,
) -> tuple[Float[Tensor, "B G"], Float[Tensor, "B G K"]]:
    """Advantages of `cgdpo`, and what each reward contributes to them.

    Args:
        rewards, weights, eps, whiten, all_gather: see `cgdpo`.

    Returns:
        The advantages; and ``w_k A_ijk``, divided by ``std A + eps`` when `whiten`, 0 where the reward is missing or
        weighs 0. Over K the terms add up to the advantages, up to the rounding of the batch's mean.

    Raises:
        ValueError: see `cgdpo`.
    """
    rewards, weights = check_rewards(rewards, weights)
    used = weights != 0  # [K]
    scored = (~rewards.isnan() & used).any(dim=-1)  # [B, G]
    terms = torch.where(
        used, standardize(rewards, dim=1, eps=eps) * weights, 0.0
    )  # [B, G, K], 0 where missing
    advantages = terms.sum(dim=-1)  # [B, G]
    if not whiten:
        return advantages, terms

    local = torch.where(scored, advantages, torch.nan)
    everyone = (local if all_gather is None else all_gather(local)).flatten()  # of all ranks
    _, std, varies = statistics(everyone, dim=0)
    whitened = standardize(local.flatten(), dim=0, eps=eps, population=everyone).view_as(advantages)
    return whitened, torch.where(varies, terms / (std + eps), 0.0)
