"""What an algorithm is made of: an advantage estimator, and transforms before and after it.

Each is a small class over a pure function, so that a YAML can name it by ``class_path``, also one from outside this
package: ``model.reward_transforms`` -> ``model.advantage`` -> ``model.advantage_transforms``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from balcap.types import AssertionSpans, Rollouts

AllGather = Callable[[Tensor], Tensor]
"""``[...]`` of this rank -> ``[ranks, ...]`` of all, or the same tensor where there is one rank."""


class AdvantageEstimator(ABC):
    """From rewards to advantages, such as `balcap.algorithms.CGDPO`.

    Attributes:
        needs_spans: whether it gives advantages per token, by `token_advantages`. Captions are then decomposed with the
            words that each assertion comes from (`balcap.judge.tasks.DecomposeSpans`).
        needs_coverage: whether it has use for which assertions cover the reference (`balcap.judge.tasks.MatchSpans`).
    """

    needs_spans: ClassVar[bool] = False
    needs_coverage: bool = False

    @abstractmethod
    def advantages(self, rewards: Tensor, weights: Tensor, all_gather: AllGather | None = None) -> Tensor:
        """``[B, G]`` advantages of the rollouts of this rank.

        Args:
            rewards: ``[B, G, K]`` after the reward transforms; NaN where missing.
            weights: ``[K]`` of the rewards.
            all_gather: for statistics over all ranks; every rank must then call it equally often.
        """

    def token_advantages(
        self, rewards: Tensor, weights: Tensor, spans: AssertionSpans, all_gather: AllGather | None = None
    ) -> Tensor:
        """``[B, G, T]`` advantages of the tokens of this rank's rollouts, asked for where it `needs_spans`.

        Args:
            rewards, weights, all_gather: see `advantages`.
            spans: of the same rollouts.
        """
        raise NotImplementedError(f"{type(self).__name__} has no token_advantages()")

    def problems(self) -> list[str]:
        """What is wrong with the settings, each with the key to change."""
        return []


class RewardTransform(ABC):
    """Changes rewards before the estimator sees them, such as `balcap.algorithms.LengthMask`."""

    @abstractmethod
    def transform(self, rewards: Tensor, names: Sequence[str], rollouts: Rollouts) -> Tensor:
        """New rewards ``[B, G, K]``; the given ones are not modified. A missing reward (NaN) stays missing.

        Args:
            rewards: ``[B, G, K]`` in [0, 1], in the order of `names`.
            names: ``[K]`` of the rewards.
            rollouts: that were rewarded.
        """

    def problems(self, names: Sequence[str]) -> list[str]:
        """What is wrong with the settings in a run with these rewards, each with the key to change."""
        return []


class AdvantageTransform(ABC):
    """Changes advantages after the estimator.

    Attributes:
        per_caption: whether it can only change advantages of whole captions, and not those of tokens.
    """

    per_caption: ClassVar[bool] = False

    @abstractmethod
    def transform(
        self, advantages: Tensor, rewards: Tensor, names: Sequence[str], rollouts: Rollouts
    ) -> Tensor:
        """New advantages: ``[B, G]``, one per caption, or ``[B, G, T]``, one per token.

        Args:
            advantages: of the estimator or of the transform before.
            rewards: ``[B, G, K]`` that the estimator saw.
            names: ``[K]`` of the rewards.
            rollouts: that were rewarded.
        """
