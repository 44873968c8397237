"""Recall: how much of the reference a caption states or lets one infer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks import Match
from balcap.rewards.base import Reward, per_rollout
from balcap.types import Rollouts


def score_recall(covered: Sequence[bool]) -> float:
    """Reference units that are covered / all reference units, in [0, 1] (arXiv 2605.07394).

    A reference without units, such as an empty one, says nothing about a caption: NaN, missing.

    Args:
        covered: one per unit of the reference.
    """
    return sum(covered) / len(covered) if covered else math.nan


class Recall(Reward):
    """`score_recall` per rollout; NaN for a group whose reference has no units or was not decomposed."""

    name = "recall"
    needs = (Match,)
    needs_reference = True

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        return per_rollout(judgments[Match.name], score_recall)
