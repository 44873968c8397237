"""Recall: how much of the reference a caption states or lets one infer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks import DecomposeSpans, Match, MatchSpans
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
    needs_for_spans = (MatchSpans,)
    needs_reference = True

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        return per_rollout(judgments[Match.name], score_recall)

    def verdicts(self, judgments: Judgments) -> Sequence[Sequence[Sequence[bool] | None]] | None:
        """Whether each assertion is one that covers a unit; None where nobody asked which do."""
        if MatchSpans.name not in judgments or DecomposeSpans.name not in judgments:
            return None
        pairs = zip(judgments[DecomposeSpans.name], judgments[MatchSpans.name], strict=True)
        return [[_covers(*pair) for pair in zip(*rows, strict=True)] for rows in pairs]


def _covers(
    assertions: Sequence[object] | None, units: Sequence[Sequence[int] | None] | None
) -> list[bool] | None:
    """Per assertion whether any unit names it; None where either is missing."""
    if assertions is None or units is None:
        return None
    named = {place for sources in units for place in sources or ()}
    return [place in named for place in range(len(assertions))]
