"""CapRL: a caption is worth what a reader who cannot see the image can answer from it (arXiv 2509.22647)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks.answer import COLUMN, Answer
from balcap.rewards.base import Reward, per_rollout
from balcap.types import Rollouts

LONGEST_WITH_ALL, SHORTEST_WITH_NONE = 2048, 3072
"""Tokens between which the length reward falls: the defaults of the authors' code (CapRL++)."""


def score_answers(right: Sequence[bool | None]) -> float:
    """Questions that were answered right / questions that were answered, in [0, 1] (arXiv 2509.22647).

    Args:
        right: one per question; False also for "cannot answer", None where no answer came.

    Degenerate case: NaN where nothing was answered, or there is no question.
    """
    there = [one for one in right if one is not None]
    return sum(there) / len(there) if there else math.nan


def caprl_length(
    lengths: Int[Tensor, "B G"], longest: int = LONGEST_WITH_ALL, none: int = SHORTEST_WITH_NONE
) -> Float[Tensor, "B G"]:
    """1 up to `longest` tokens, 0 from `none` tokens on, linear between them (the authors' code of CapRL++)."""
    return ((none - lengths.float()) / (none - longest)).clamp(0, 1)


class CapRL(Reward):
    """`score_answers` per rollout, on the row's multiple-choice questions: see `balcap.judge.tasks.Answer`.

    NaN where no question was answered, and where the row has none.
    """

    name = "caprl"
    needs = (Answer,)
    columns = (COLUMN,)

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        return per_rollout(judgments[Answer.name], score_answers)


class CapRLLength(Reward):
    """`caprl_length` per rollout, in tokens of the policy. NaN where `CapRL` is: no bonus without an answer.

    Args:
        longest: tokens of the longest caption that gets all of it.
        none: tokens of the shortest that gets nothing, above `longest`.

    Raises:
        ValueError: `none` is not above `longest`.
    """

    name = "caprl_length"
    needs = (Answer,)
    columns = (COLUMN,)

    def __init__(self, longest: int = LONGEST_WITH_ALL, none: int = SHORTEST_WITH_NONE) -> None:
        super().__init__()
        if not 0 <= longest < none:
            raise ValueError(
                f"model.rewards: CapRLLength's longest: {longest} must lie between 0 and its none: {none}"
            )
        self.longest, self.none = longest, none

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        missing = per_rollout(judgments[Answer.name], score_answers).isnan()
        return torch.where(missing, torch.nan, caprl_length(rollouts.lengths.cpu(), self.longest, self.none))
