"""Rewards: one file each, every score in [0, 1] (arXiv 2605.07394).

`precision.py`   true and pointable assertions / all assertions of the caption
`recall.py`      covered units / all units of the reference
`pooled_recall.py`  covered units / all units that the captions of the group have told: without references
`linguistic.py`  mean of clarity, fluency and coherency
`b_capscore.py`  the harmonic mean of the three
`clip_score.py`  CLIPScore, which needs no judge
`caprl.py`       questions about the image that the caption answers (CapRL), and its length reward
`vcap.py`        correctness, completeness and text, as one call scores them (VCap)
`claim_diff.py`  who errs more where caption and reference differ (ClaimDiff)
`rubicap.py`     criteria written for the image that a caption meets (RubiCap)
`suite.py`       gathers what the rewards of a run need and stacks their scores ``[B, G, K]``
`base.py`        `Reward`, a torchmetrics component: missing judgments are NaN, never 0
"""

from balcap.rewards.b_capscore import BCapScore, b_capscore
from balcap.rewards.base import Reward
from balcap.rewards.caprl import CapRL, CapRLLength, caprl_length, score_answers
from balcap.rewards.claim_diff import ClaimDiff, score_differences
from balcap.rewards.clip_score import CLIPScore
from balcap.rewards.linguistic import Linguistic, score_linguistic
from balcap.rewards.pooled_recall import PooledRecall
from balcap.rewards.precision import Precision, score_precision
from balcap.rewards.recall import Recall, score_recall
from balcap.rewards.rubicap import RubiCap, score_rubric
from balcap.rewards.suite import RewardSuite, merge
from balcap.rewards.vcap import Completeness, Correctness, VisibleText

__all__ = [
    "BCapScore",
    "CLIPScore",
    "CapRL",
    "CapRLLength",
    "ClaimDiff",
    "Completeness",
    "Correctness",
    "Linguistic",
    "PooledRecall",
    "Precision",
    "Recall",
    "Reward",
    "RewardSuite",
    "RubiCap",
    "VisibleText",
    "b_capscore",
    "caprl_length",
    "merge",
    "score_answers",
    "score_differences",
    "score_linguistic",
    "score_precision",
    "score_recall",
    "score_rubric",
]
