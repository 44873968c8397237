"""Precision: how much of what a caption says is true of the image, and can be pointed at."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks import Verdict, Verify
from balcap.rewards.base import Reward, per_rollout
from balcap.types import Rollouts


def score_precision(verdicts: Sequence[Verdict], pointable: bool = True) -> float:
    """Assertions that are true and pointable / all assertions, in [0, 1] (arXiv 2605.07394).

    A caption that asserts nothing gets 0: silence must not be the safest caption.

    Args:
        verdicts: one per assertion of the caption.
        pointable: False counts every true assertion, the paper's ablation.
    """
    if not verdicts:
        return 0.0
    return sum(counts(verdict, pointable) for verdict in verdicts) / len(verdicts)


def counts(verdict: Verdict, pointable: bool = True) -> bool:
    """Whether an assertion counts for precision: it is true and, unless that is left out, pointable."""
    return verdict.true and (verdict.pointable or not pointable)


class Precision(Reward):
    """`score_precision` per rollout; NaN where decomposing or verifying the caption failed.

    Args:
        pointable: count only assertions that one could point at in the image.
    """

    name = "precision"
    needs = (Verify,)

    def __init__(self, pointable: bool = True):
        super().__init__()
        self.pointable = pointable

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        return per_rollout(judgments[Verify.name], lambda verdicts: score_precision(verdicts, self.pointable))

    def verdicts(self, judgments: Judgments) -> Sequence[Sequence[Sequence[bool] | None]]:
        return [
            [None if one is None else [counts(verdict, self.pointable) for verdict in one] for one in row]
            for row in judgments[Verify.name]
        ]
