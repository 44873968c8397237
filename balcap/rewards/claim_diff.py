"""ClaimDiff: whose errors are more where caption and reference differ? (arXiv 2605.20278)"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks import Difference, Differences
from balcap.rewards.base import Reward, per_rollout
from balcap.types import Rollouts


def score_differences(differences: Sequence[Difference]) -> float:
    """``0.5 - 0.5 (E_A - E_B) / D``, in [0, 1]: the default of the authors' code (``normalized_diff``).

    E_A are the differences in which the caption errs, E_B those in which the reference errs; one in which both err counts
    in each. D is their number, those in which nobody errs included. 0.5 says: as good as the reference.

    Args:
        differences: of the caption from the reference. Without any, 0.5.
    """
    if not differences:
        return 0.5
    caption = sum(one.wrong in ("caption", "both") for one in differences)
    reference = sum(one.wrong in ("reference", "both") for one in differences)
    return 0.5 - 0.5 * (caption - reference) / len(differences)


class ClaimDiff(Reward):
    """`score_differences` per rollout; NaN where comparing the caption failed (the authors' code has 0 there)."""

    name = "claim_diff"
    needs = (Differences,)
    needs_reference = True

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        return per_rollout(judgments[Differences.name], score_differences)
