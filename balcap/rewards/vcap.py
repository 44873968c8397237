"""VCap: three scores of one call that sees the image and, as a witness, the reference (arXiv 2605.28023; second-hand).

The sum of its rewards is .05 correctness + .04 completeness + .01 text, each from 0 to 10. Here a reward is in [0, 1], a
tenth of the score: with the weights .5, .4 and .1 the sum is the same.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks import Grade, Grades
from balcap.rewards.base import Reward, per_rollout
from balcap.types import Rollouts


class _OneGrade(Reward):
    needs = (Grade,)
    needs_reference = True

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        def grade(grades: Grades) -> float:
            return getattr(grades, self.name)

        return per_rollout(judgments[Grade.name], grade)


class Correctness(_OneGrade):
    """How much of what a caption says is true of the image; NaN where grading it failed."""

    name = "correctness"


class Completeness(_OneGrade):
    """How much of what there is to see a caption tells; NaN where grading it failed."""

    name = "completeness"


class VisibleText(_OneGrade):
    """How well a caption renders the text in the image, 1 where there is none; NaN where grading it failed."""

    name = "text"
