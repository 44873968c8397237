"""What a reward is: captions and what was judged of them in, scores in [0, 1] out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from balcap.judge import Judgments, Task
from balcap.types import Rollouts

T = TypeVar("T")


class Reward(Metric):
    """A score in [0, 1] per rollout and, as a metric, its mean over all rollouts seen.

    ``reward(rollouts, judgments)`` returns ``[B, G]`` float32, NaN where it is missing, and accumulates;
    ``compute()`` is the mean over what is there, on all ranks, NaN if nothing is. A reward sees all that is known
    of the rollouts (captions, tokens, lengths, images, references, the batch's extra columns) and the judgments
    that it `needs`; it asks no judge itself.

    To add one, write a file with a pure ``score_*`` function and a subclass that sets `name` and `needs`
    and implements `score`; name the class in the YAML.

    Attributes:
        name: how the reward is called in logs; distinct within a suite.
        needs: kinds of judgment that it reads; none for a reward without a judge.
        columns: further columns of the data that it reads, by itself or in its judgments.
        needs_for_spans: kinds of judgment that its `verdicts` read beside, which cost some more tokens: only asked for where
            the advantage estimator has use for them (``needs_coverage``).
        needs_reference: whether it is missing for an image without a reference caption.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[type[Task[Any]], ...]] = ()
    needs_for_spans: ClassVar[tuple[type[Task[Any]], ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ()
    needs_reference: ClassVar[bool] = False
    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float32 like the metrics of torchmetrics: some accelerators know no float64
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        """Scores in [0, 1], NaN where a judgment is missing."""

    def verdicts(self, judgments: Judgments) -> Sequence[Sequence[Sequence[bool] | None]] | None:
        """``[B][G]``: whether each assertion of a caption, in the order of `Decompose`, raises this reward or lowers it.

        None for a caption whose judgment is missing; None at all, as here, for a reward that does not judge assertions.
        """
        return None

    @property
    def judges_assertions(self) -> bool:
        """Whether it has `verdicts`."""
        return type(self).verdicts is not Reward.verdicts

    def update(self, rollouts: Rollouts, judgments: Judgments, scores: Tensor | None = None) -> None:
        """Accumulate; `scores` of these rollouts are not computed again if they are given."""
        scores = (self.score(rollouts, judgments) if scores is None else scores).to(self.device)
        there = ~scores.isnan()
        self.total += torch.where(there, scores, 0.0).sum()
        self.count += there.sum()

    def compute(self) -> Tensor:
        """Mean over the scores that are there; NaN if there is none."""
        return self.total / self.count

    def forward(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G"]:
        """Scores of this batch, which are also accumulated.

        Raises:
            TorchMetricsUserError: between ``sync`` and ``unsync``, when the state is not this rank's own.
        """
        if self._is_synced:
            raise TorchMetricsUserError("The reward is synchronised: call unsync before forward.")
        scores = self.score(rollouts, judgments).to(self.device)
        self.update(rollouts, judgments, scores)
        # What `self.log("…", reward, on_step=True)` of Lightning shows for this step.
        self._forward_cache = scores.nanmean()  # type: ignore[assignment]
        return scores


def per_rollout(answers: Sequence[Sequence[T | None]], score: Callable[[T], float]) -> Float[Tensor, "B G"]:
    """`score` of every answer, NaN where it is missing (None)."""
    rows = [[float("nan") if answer is None else score(answer) for answer in row] for row in answers]
    return torch.tensor(rows, dtype=torch.float32)
