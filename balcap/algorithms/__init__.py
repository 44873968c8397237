"""From rewards to a gradient: pure functions of tensors, no trainer, no logging, no collectives.

One step of training reads them from top to bottom::

    length_mask.py  LengthMask           rewards [B, G, K] -> [B, G, K]; LinearLengthPenalty, its baseline
    cgdpo.py        CGDPO                rewards [B, G, K] -> advantages [B, G]
    grpo.py         GRPO                 the same; the baseline that c-GDPO beats
    corr_grpo.py    CorrGRPO             the same; gr3.py: GR3 on rewards; qglas.py: QGLAS on advantages: rivals
    span_credit.py  SpanCredit           c-GDPO per token, advantages [B, G, T]; and SpanPenalty, its rival
    loss.py         policy_loss          log-probs [B, G, T], advantages -> scalar; clipped surrogate + KL
    base.py         what a YAML may name in their place; normalize.py: standard scores with missing values

Each class is thin: the formula is in the function beside it. Shapes are those of `balcap.types`. A missing reward is
NaN everywhere and never 0. Which equation of the paper each function is, and where it departs from the paper, is
listed in ``docs/papers.md``.
"""

from balcap.algorithms.base import AdvantageEstimator, AdvantageTransform, RewardTransform
from balcap.algorithms.cgdpo import CGDPO, cgdpo, cgdpo_terms
from balcap.algorithms.corr_grpo import CorrGRPO, corr_grpo
from balcap.algorithms.gr3 import GR3, gr3
from balcap.algorithms.grpo import GRPO, grpo
from balcap.algorithms.length_mask import (
    LengthMask,
    LinearLengthPenalty,
    length_mask,
    length_ratio,
    linear_length_penalty,
    within_length_bounds,
)
from balcap.algorithms.loss import (
    PolicyLoss,
    aggregate,
    clipped_surrogate,
    kl_k3,
    loss_normalizer,
    policy_loss,
    truncated_importance,
)
from balcap.algorithms.qglas import QGLAS, qglas
from balcap.algorithms.span_credit import SpanCredit, SpanPenalty, span_credit, span_penalty

__all__ = [
    "CGDPO",
    "GR3",
    "GRPO",
    "QGLAS",
    "AdvantageEstimator",
    "AdvantageTransform",
    "CorrGRPO",
    "LengthMask",
    "LinearLengthPenalty",
    "PolicyLoss",
    "RewardTransform",
    "SpanCredit",
    "SpanPenalty",
    "aggregate",
    "cgdpo",
    "cgdpo_terms",
    "clipped_surrogate",
    "corr_grpo",
    "gr3",
    "grpo",
    "kl_k3",
    "length_mask",
    "length_ratio",
    "linear_length_penalty",
    "loss_normalizer",
    "policy_loss",
    "qglas",
    "span_credit",
    "span_penalty",
    "truncated_importance",
    "within_length_bounds",
]
