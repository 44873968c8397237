"""Linguistic: how well a caption is written, whatever it says."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks import Rate, Rating
from balcap.rewards.base import Reward, per_rollout
from balcap.types import Rollouts


def score_linguistic(rating: Rating) -> float:
    """Mean of clarity, fluency and coherency, in [0, 1] (arXiv 2605.07394). The length gate comes later."""
    return rating.mean


class Linguistic(Reward):
    """`score_linguistic` per rollout; NaN where rating the caption failed."""

    name = "linguistic"
    needs = (Rate,)

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        return per_rollout(judgments[Rate.name], score_linguistic)
