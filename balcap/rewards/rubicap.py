"""RubiCap: how much of a rubric that was written for the image a caption meets (arXiv 2603.09160; second-hand)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks.rubric import COLUMN, CheckRubric, read_rubric
from balcap.rewards.base import Reward, per_rollout
from balcap.types import Rollouts


def score_rubric(met: Sequence[bool], weights: Sequence[float]) -> float:
    """``Σ w y / Σ w``, in [0, 1].

    Args:
        met: y, one per criterion.
        weights: w, above 0; in RubiCap 1, 2 or 3.

    Degenerate case: NaN, missing, without criteria.
    """
    if not weights:
        return math.nan
    return sum(weight for weight, is_met in zip(weights, met, strict=True) if is_met) / sum(weights)


class RubiCap(Reward):
    """`score_rubric` per rollout, on the row's ``rubric``: see `balcap.judge.tasks.CheckRubric`.

    NaN where checking the caption failed, and where the row has no rubric.
    """

    name = "rubicap"
    needs = (CheckRubric,)
    columns = (COLUMN,)

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        batch = rollouts.batch
        columns = zip(batch.extra(COLUMN), batch.sample_ids, strict=True)
        weights = [[one.weight for one in read_rubric(*column)] for column in columns]
        rows = [
            per_rollout([of_image], partial(score_rubric, weights=of_rubric))
            for of_image, of_rubric in zip(judgments[CheckRubric.name], weights, strict=True)
        ]
        return torch.cat(rows)
