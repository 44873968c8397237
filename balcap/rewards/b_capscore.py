"""b-CapScore: precision, recall and language in one figure (arXiv 2605.07394)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from balcap.judge import Judgments
from balcap.judge.tasks import Match, Rate, Verify
from balcap.rewards.base import Reward, per_rollout
from balcap.rewards.linguistic import score_linguistic
from balcap.rewards.precision import score_precision
from balcap.rewards.recall import score_recall
from balcap.types import Rollouts


def b_capscore(
    precision: Float[Tensor, "*S"],
    recall: Float[Tensor, "*S"],
    linguistic: Float[Tensor, "*S"],
) -> Float[Tensor, "*S"]:
    """Harmonic mean 3 / (1/p + 1/r + 1/l), elementwise, in [0, 1].

    0 where one of the three is 0, NaN where one is missing.

    The paper does not say whether it takes the harmonic mean of each caption and then the mean over the
    captions, or the harmonic mean of the three means. Both come from this function: `BCapScore` does the
    first; call it with the three means for the second, which is never smaller.

    Args:
        precision: pointability-aware, in [0, 1].
        recall: reference coverage, in [0, 1].
        linguistic: quality of the language, in [0, 1].
    """
    parts = torch.stack(torch.broadcast_tensors(precision, recall, linguistic))
    score = parts.shape[0] / parts.reciprocal().sum(0)  # a part of 0 makes it 3 / inf = 0
    return torch.where(parts.isnan().any(0), torch.nan, score)


class BCapScore(Reward):
    """`b_capscore` per rollout from the judgments themselves; ``compute()`` is the mean over captions.

    Reads the judgments, not the rewards of the run: pointability counts even in a run that trains without
    it, and the length mask does not touch it. NaN where a part is missing or was not judged at all.
    """

    name = "b_capscore"
    needs = (Verify, Match, Rate)
    needs_reference = True

    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        if any(task.name not in judgments for task in self.needs):
            shape = next(([len(a), len(a[0])] for a in judgments.answers.values()), [0, 0])
            return torch.full(shape, torch.nan)
        return b_capscore(
            per_rollout(judgments[Verify.name], score_precision),
            per_rollout(judgments[Match.name], score_recall),
            per_rollout(judgments[Rate.name], score_linguistic),
        )
