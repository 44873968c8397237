"""A reward that needs no judge, for tests that train whatever model."""

from __future__ import annotations

from typing import Any

import torch

from balcap.judge import Judgments
from balcap.rewards import Reward
from balcap.types import Rollouts


class Short(Reward):
    """1 / (1 + letters): random words differ in it."""

    name = "short"

    def score(self, rollouts: Rollouts, judgments: Judgments) -> torch.Tensor:
        return torch.tensor([[1 / (1 + len(text)) for text in group] for group in rollouts.captions])


TRAINED_ON_IT: dict[str, Any] = {
    "model.rewards": '[{"class_path": "tests.short_captions.Short"}]',
    "model.weights": '{"short": 1.0}',
    "model.reward_transforms": "[]",
    "model.sampling.max_tokens": 6,
}
"""Options of a run."""
