"""What users add from the YAML alone: rewards with and without a judge, an algorithm, transforms.

Everything here is defined outside the package, as a user's own file would be.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from balcap.algorithms import AdvantageEstimator, AdvantageTransform, RewardTransform
from balcap.judge import Judgments
from balcap.rewards import Reward
from balcap.types import Rollouts
from tests.support import metrics

HERE = "tests.test_extensions"


class Brevity(Reward):
    """1 / (1 + words): no judge."""

    name = "brevity"

    def score(self, rollouts: Rollouts, judgments: Judgments) -> torch.Tensor:
        return torch.tensor([[1 / (1 + len(text.split())) for text in group] for group in rollouts.captions])


class LeaveOneOut(AdvantageEstimator):
    """RLOO (arXiv 2402.14740) on the weighted sum: r_j - mean of the others."""

    def advantages(self, rewards, weights, all_gather=None):
        sums = (rewards.nan_to_num() * weights).sum(-1)
        others = (sums.sum(1, keepdim=True) - sums) / (sums.shape[1] - 1)
        return sums - others


class Halve(RewardTransform):
    def transform(self, rewards, names, rollouts):
        return rewards / 2


class FirstTokens(AdvantageTransform):
    """Credit for the first tokens of a caption alone: one advantage per token."""

    def __init__(self, tokens: int = 2) -> None:
        self.tokens = tokens

    def transform(self, advantages, rewards, names, rollouts):
        first = torch.arange(rollouts.token_ids.shape[-1]) < self.tokens
        return advantages[..., None] * (first & rollouts.completion_mask)


def _rollouts(run: Path) -> dict[str, list]:
    return pq.read_table(sorted((run / "rollouts").glob("train-*"))[0]).to_pydict()


def test_a_reward_without_a_judge_trains_without_one(fit_arguments, cli, tmp_path: Path) -> None:
    cli(
        fit_arguments(
            **{
                "model.rewards": f"[{HERE}.Brevity]",
                "model.weights": "{brevity: 1}",
                "model.judge": "null",
                "model.judge.cache": None,
                "model.reward_transforms": "[]",
                "trainer.max_steps": 1,
            }
        )
    )
    rows = metrics(tmp_path / "run")
    assert all(0 < float(row["train/brevity"]) < 1 for row in rows if row.get("train/loss"))
    assert any(row.get("val/brevity") for row in rows)
    table = _rollouts(tmp_path / "run")
    for caption, reward in zip(table["caption"], table["reward/brevity"], strict=True):
        assert reward == pytest.approx(1 / (1 + len(caption.split())))


def test_an_algorithm_and_transforms_of_ones_own(fit_arguments, cli, tmp_path: Path) -> None:
    cli(
        fit_arguments(
            **{
                "model.advantage": f"{HERE}.LeaveOneOut",
                "model.reward_transforms": f"[{HERE}.Halve]",
                "model.advantage_transforms": f"[{{class_path: {HERE}.FirstTokens, init_args: {{tokens: 3}}}}]",
                "trainer.max_steps": 1,
            }
        )
    )
    table = _rollouts(tmp_path / "run")
    size = 3  # captions of a group; every caption has at least three tokens, of which three count
    for at in range(0, len(table["caption"]), size):
        rows = range(at, at + size)
        sums = [
            sum(table[f"reward/{n}"][i] or 0 for n in ("precision", "recall", "linguistic")) / 2 for i in rows
        ]
        for place, i in enumerate(rows):
            others = sum(s for j, s in enumerate(sums) if j != place) / (size - 1)
            tokens = table["length"][i] + (not table["truncated"][i])
            expected = (sums[place] - others) * min(3, tokens) / tokens
            assert table["advantage"][i] == pytest.approx(expected, abs=1e-6)
    (row,) = [row for row in metrics(tmp_path / "run") if row.get("train/loss")]
    assert float(row["train/grad_norm"]) > 0
