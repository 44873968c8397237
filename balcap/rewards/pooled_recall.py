"""Pooled recall: how much of what the captions of a group have found together a caption tells. Needs no reference."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks.pooled_match import PooledMatch
from balcap.rewards.base import Reward, per_rollout
from balcap.rewards.recall import score_recall
from balcap.types import Rollouts


class PooledRecall(Reward):
    """`score_recall` per rollout over the pool of its group: the assertions of all G captions of the image that are true
    and pointable, as the judge has verified them for `Precision`.

    It compares the captions of one group. Between groups, or steps, it says little: a policy that says less has a
    smaller pool. Nothing in it bounds the length, and without references nor does the length mask; `Precision`, or
    `balcap.algorithms.GR3`, does.

    NaN where decomposing, verifying or matching the caption failed, where nothing in the group is true and pointable,
    and for a group of one caption, which is its own pool (validation, unless ``model.val_captions`` is raised).
    """

    name = "pooled_recall"
    needs = (PooledMatch,)

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        scores = per_rollout(judgments[PooledMatch.name], score_recall)
        return scores if scores.shape[1] > 1 else torch.full_like(scores, torch.nan)
