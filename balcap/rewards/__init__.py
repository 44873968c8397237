"""Rewards: one file each, every score in [0, 1] (arXiv 2605.07394).

`precision.py`   true and pointable assertions / all assertions of the caption
`recall.py`      covered units / all units of the reference
`pooled_recall.py`  covered units / all units that the captions of the group have told: without references
`linguistic.py`  mean of clarity, fluency and coherency
`b_capscore.py`  the harmonic mean of the three
`clip_score.py`  CLIPScore, which needs no judge
`suite.py`       gathers what the rewards of a run need and stacks their scores ``[B, G, K]``
`base.py`        `Reward`, a torchmetrics component: missing judgments are NaN, never 0
"""

from balcap.rewards.b_capscore import BCapScore, b_capscore
from balcap.rewards.base import Reward
from balcap.rewards.clip_score import CLIPScore
from balcap.rewards.linguistic import Linguistic, score_linguistic
from balcap.rewards.pooled_recall import PooledRecall
from balcap.rewards.precision import Precision, score_precision
from balcap.rewards.recall import Recall, score_recall
from balcap.rewards.suite import RewardSuite, merge

__all__ = [
    "BCapScore",
    "CLIPScore",
    "Linguistic",
    "PooledRecall",
    "Precision",
    "Recall",
    "Reward",
    "RewardSuite",
    "b_capscore",
    "merge",
    "score_linguistic",
    "score_precision",
    "score_recall",
]
