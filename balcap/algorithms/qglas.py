"""QGLAS: of the good captions of a group, the shorter ones gain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from balcap.algorithms.base import AdvantageTransform
from balcap.types import Rollouts


class QGLAS(AdvantageTransform):
    """`qglas` by ``class_path``.

    Args:
        scale: λ, the largest gain, at least 0.
        cap: c, the share by which a caption is shorter at which the gain is largest, above 0.
    """

    per_caption = True

    def __init__(self, scale: float = 0.5, cap: float = 0.5) -> None:
        self.scale, self.cap = scale, cap
        if not 0 <= scale < math.inf or not 0 < cap < math.inf:
            raise ValueError(
                f"model.advantage_transforms: QGLAS needs scale >= 0 and cap > 0, not {scale} and {cap}"
            )

    def transform(
        self, advantages: Tensor, rewards: Tensor, names: Sequence[str], rollouts: Rollouts
    ) -> Tensor:
        return qglas(advantages, rollouts.lengths, self.scale, self.cap)


def qglas(
    advantages: Float[Tensor, "B G"], lengths: Int[Tensor, "B G"], scale: float = 0.5, cap: float = 0.5
) -> Float[Tensor, "B G"]:
    """Advantages, with a gain for captions that are good and short.

    In each group, with ``L_ref`` the mean length of its captions with a positive advantage (QGLAS, 2026; from the paper's
    text, without its code; the defaults of `scale` and `cap` are ours)::

        A <- A + scale * clip((L_ref - L) / L_ref, 0, cap) / cap      where A > 0 and L < L_ref

    It acts after the estimator and only upwards, so it changes no sign: a rival of the length mask, which acts on rewards.

    Args:
        advantages: one per caption. Not modified.
        lengths: caption tokens.
        scale: λ of the paper.
        cap: c of the paper.

    Raises:
        ValueError: advantages are not one per caption.

    Degenerate cases: a group without positive advantages stays as it is; so do captions of length 0 of a group whose good
    captions are all empty.
    """
    if advantages.shape != lengths.shape:
        raise ValueError(
            f"QGLAS needs one advantage per caption, {list(lengths.shape)}, got {list(advantages.shape)}; "
            "put it before transforms that give one per token"
        )
    good = advantages > 0
    reference = torch.where(good, lengths, 0).sum(1, keepdim=True) / good.sum(1, keepdim=True).clamp(min=1)
    shorter = (reference - lengths) / reference.clamp(min=1e-9)
    gain = scale * shorter.clamp(0, cap) / cap
    return torch.where(good, advantages + gain.to(advantages.dtype), advantages)
