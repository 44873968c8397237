"""GR³: every reward is divided by how long its caption is among those of its group (arXiv 2603.10535)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from balcap.algorithms.base import RewardTransform
from balcap.types import Rollouts


class GR3(RewardTransform):
    """`gr3` by ``class_path``.

    Args:
        alpha: how much length costs, at least 0.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def transform(self, rewards: Tensor, names: Sequence[str], rollouts: Rollouts) -> Tensor:
        return gr3(rewards, rollouts.lengths, self.alpha)

    def problems(self, names: Sequence[str]) -> list[str]:
        right = 0 <= self.alpha < math.inf
        return [] if right else [f"model.reward_transforms: GR3's alpha: {self.alpha} must be at least 0"]


def gr3(
    rewards: Float[Tensor, "B G K"], lengths: Int[Tensor, "B G"], alpha: float = 1.0
) -> Float[Tensor, "B G K"]:
    """Group-relative reward rescaling: ``r_ij / (1 + alpha L_ij / mean_j L_ij)``.

    Source: arXiv 2603.10535; second-hand: the formula is from notes on the paper, and `alpha` has no published default that
    we could read. In the range ``[0, r]``: at alpha 1 a caption of average length keeps half of its rewards.

    Args:
        rewards: in [0, 1], NaN where missing. Not modified.
        lengths: caption tokens.
        alpha: how much length costs, at least 0; at 0 the rewards stay as they are.

    Degenerate cases: a missing reward stays missing; a group of empty captions keeps its rewards.
    """
    mean = lengths.double().mean(1, keepdim=True)  # [B, 1]
    share = lengths / mean.clamp(min=1e-9)
    return rewards / (1 + alpha * share).to(rewards.dtype)[..., None]
