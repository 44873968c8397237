"""The length mask: the linguistic reward counts only for captions of about the reference's length.

Without it the linguistic reward pulls towards short, flawless captions and recall towards endless ones
(arXiv 2605.07394, length-conditional reward mask). Lengths are tokens of the policy's tokenizer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from balcap.algorithms.base import RewardTransform
from balcap.types import Rollouts

TAU_LOW, TAU_HIGH = 0.5, 2.0
"""Bounds of the paper's main results."""


class _OnOneReward(RewardTransform):
    """A transform by length that acts on one reward.

    Args:
        reward: its name.
    """

    def __init__(self, reward: str) -> None:
        self.reward = reward

    def transform(self, rewards: Tensor, names: Sequence[str], rollouts: Rollouts) -> Tensor:
        index = list(names).index(self.reward)
        return self._apply(rewards, rollouts.lengths, rollouts.reference_lengths, index)

    @abstractmethod
    def _apply(self, rewards: Tensor, lengths: Tensor, reference_lengths: Tensor, index: int) -> Tensor: ...

    def problems(self, names: Sequence[str]) -> list[str]:
        key, kind = "model.reward_transforms", type(self).__name__
        problems = [f"{key}: {kind}'s {self.wrong}"] if self.wrong else []
        if self.reward not in names:
            problems.append(f"{key}: {kind} acts on the reward {self.reward!r}; there are {', '.join(names)}")
        return problems

    @property
    @abstractmethod
    def wrong(self) -> str:
        """What is out of range, empty if nothing is."""


class LengthMask(_OnOneReward):
    """`length_mask` by ``class_path``.

    Args:
        tau_low: smallest kept ratio of caption tokens to reference tokens, at least 0.
        tau_high: largest kept ratio.
        reward: name of the reward that is masked.
    """

    def __init__(
        self, tau_low: float = TAU_LOW, tau_high: float = TAU_HIGH, reward: str = "linguistic"
    ) -> None:
        super().__init__(reward)
        self.tau_low, self.tau_high = tau_low, tau_high

    def _apply(self, rewards: Tensor, lengths: Tensor, reference_lengths: Tensor, index: int) -> Tensor:
        return length_mask(rewards, lengths, reference_lengths, self.tau_low, self.tau_high, index)

    @property
    def wrong(self) -> str:
        right = 0 <= self.tau_low <= self.tau_high
        return (
            "" if right else f"tau_low: {self.tau_low} must lie between 0 and its tau_high: {self.tau_high}"
        )


class LinearLengthPenalty(_OnOneReward):
    """`linear_length_penalty` by ``class_path``.

    Args:
        slope: reward lost per unit of the length ratio, at least 0.
        reward: name of the reward that is lowered.
    """

    def __init__(self, slope: float = 1.0, reward: str = "linguistic") -> None:
        super().__init__(reward)
        self.slope = slope

    def _apply(self, rewards: Tensor, lengths: Tensor, reference_lengths: Tensor, index: int) -> Tensor:
        return linear_length_penalty(rewards, lengths, reference_lengths, index, self.slope)

    @property
    def wrong(self) -> str:
        return "" if 0 <= self.slope < math.inf else f"slope: {self.slope} must be at least 0"


def length_ratio(
    lengths: Int[Tensor, "B G"],
    reference_lengths: Int[Tensor, " B"],
) -> Float[Tensor, "B G"]:
    """``ρ = tokens(caption) / tokens(reference)``, float64; NaN where the reference has no tokens.

    float64, because the quotient of two integers is then rounded to the same number as the decimal that
    a user writes for τ: a ratio that equals a bound compares equal to it.
    """
    if lengths.ndim != 2 or reference_lengths.shape != lengths.shape[:1]:
        raise ValueError(
            "lengths must be [B, G] and reference_lengths [B]: "
            f"got {list(lengths.shape)} and {list(reference_lengths.shape)}"
        )
    reference = reference_lengths.double()[:, None]  # [B, 1]
    return torch.where(reference > 0, lengths.double() / reference, torch.nan)


def within_length_bounds(
    lengths: Int[Tensor, "B G"],
    reference_lengths: Int[Tensor, " B"],
    tau_low: float,
    tau_high: float,
) -> Bool[Tensor, "B G"]:
    """True where ``tau_low <= ρ <= tau_high``: the rollouts that may keep their linguistic reward.

    Raises:
        ValueError: not ``0 <= tau_low <= tau_high``.

    Degenerate case: a reference without tokens gives no ratio, and all captions of its group are inside.
    """
    if not 0 <= tau_low <= tau_high:
        raise ValueError(f"need 0 <= tau_low <= tau_high, got tau_low={tau_low} and tau_high={tau_high}")
    ratio = length_ratio(lengths, reference_lengths)
    return ratio.isnan() | ((ratio >= tau_low) & (ratio <= tau_high))


def length_mask(
    rewards: Float[Tensor, "B G K"],
    lengths: Int[Tensor, "B G"],
    reference_lengths: Int[Tensor, " B"],
    tau_low: float,
    tau_high: float,
    index: int,
) -> Float[Tensor, "B G K"]:
    """The rewards, with the one at `index` set to 0 outside ``[tau_low, tau_high]``, bounds included.

    Equation: ``r_ling <- r_ling * 1[tau_low <= ρ <= tau_high]`` (arXiv 2605.07394, length-conditional
    reward mask).

    Args:
        rewards: in [0, 1], NaN where missing. Not modified.
        lengths: caption tokens, without the end-of-sequence token.
        reference_lengths: reference tokens, without special tokens.
        tau_low: smallest ratio that keeps the reward.
        tau_high: largest ratio that keeps the reward; ``math.inf`` for none.
        index: which of the K rewards is the linguistic one.

    Raises:
        ValueError: not ``0 <= tau_low <= tau_high``, or shapes that do not fit.

    Degenerate cases: a missing reward stays NaN, outside as well as inside. One could argue that outside the
    answer is 0 whatever the judge would have said, but then a judge's failure would enter the group's
    mean as a value, and only for captions of the wrong length. A reference without tokens masks nothing.
    """
    keep = within_length_bounds(lengths, reference_lengths, tau_low, tau_high)
    reward = rewards[..., index]
    return _replaced(rewards, index, torch.where(keep | reward.isnan(), reward, 0.0))


def linear_length_penalty(
    rewards: Float[Tensor, "B G K"],
    lengths: Int[Tensor, "B G"],
    reference_lengths: Int[Tensor, " B"],
    index: int,
    slope: float = 1.0,
) -> Float[Tensor, "B G K"]:
    """The rewards, with the one at `index` lowered in proportion to the distance of ρ from 1.

    Equation: ``r_ling <- clamp(r_ling - slope * |ρ - 1|, 0, 1)``. The paper (arXiv 2605.07394) compares its
    mask with "a linear penalty on ρ" and publishes no formula that we could read: the centre at 1, the
    symmetry, the slope and the clamp are our choice. With slope 1 a perfect reward is used up at ρ = 2,
    where the mask of the main results ends as well.

    Args:
        rewards, lengths, reference_lengths, index: as for `length_mask`.
        slope: reward lost per unit of ρ, at least 0.

    Raises:
        ValueError: a negative slope, or shapes that do not fit.

    Degenerate cases: a missing reward stays NaN; a reference without tokens takes no penalty.
    """
    if slope < 0:
        raise ValueError(f"slope must be at least 0, got {slope}")
    ratio = length_ratio(lengths, reference_lengths)
    distance = torch.where(ratio.isnan(), 0.0, (ratio - 1).abs()).to(rewards.dtype)
    return _replaced(rewards, index, (rewards[..., index] - slope * distance).clamp(0, 1))


def _replaced(rewards: Tensor, index: int, values: Tensor) -> Tensor:
    """A copy of the rewards with the one at `index` exchanged."""
    rewards = rewards.clone()
    rewards[..., index] = values
    return rewards
