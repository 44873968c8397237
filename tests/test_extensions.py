"""What users add from the YAML alone: rewards, a judgment, an algorithm, transforms, a column of the data.

Everything here is defined outside the package, as a user's own file would be.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from balcap.algorithms import AdvantageEstimator, AdvantageTransform, RewardTransform
from balcap.judge import Judgments
from balcap.judge.prompt import chat, fence
from balcap.judge.task import Schema, Task
from balcap.rewards import Reward
from balcap.rewards.base import per_rollout
from balcap.types import Rollouts
from examples.shapes.oracle import Oracle
from tests.support import metrics

HERE = "tests.test_extensions"


class Brevity(Reward):
    """1 / (1 + words): no judge."""

    name = "brevity"

    def score(self, rollouts: Rollouts, judgments: Judgments) -> torch.Tensor:
        return torch.tensor([[1 / (1 + len(text.split())) for text in group] for group in rollouts.captions])


class ColourNames(Schema):
    colours: list[str]


class Colours(Task[list[str]]):
    """A judgment of one's own: which colours a caption names."""

    name, version, schema, answer_type = "colours", "1", ColourNames, list[str]

    def messages(self, items, **context):
        return chat(self.name, "List the colours that the caption names.", fence("caption", items[0]))

    def parse(self, answer, items, **context):
        return [answer.colours]


class Colourful(Reward):
    """Share of three colours that a caption names."""

    name, needs = "colourful", (Colours,)

    def score(self, rollouts: Rollouts, judgments: Judgments) -> torch.Tensor:
        return per_rollout(judgments["colours"], lambda colours: min(1.0, len(colours) / 3))


class ColourJudge(Oracle):
    """The embedded world's judge, which knows the new judgment as well."""

    async def acompletion(self, *args, **kwargs):
        system, user = (message["content"] for message in kwargs["messages"])
        if not system.startswith("Task: colours"):
            return await super().acompletion(*args, **kwargs)
        text = user if isinstance(user, str) else user[0]["text"]
        colours = sorted(set(re.findall("red|green|blue|yellow", text)))
        response = kwargs["model_response"]
        response.choices[0].message.content = json.dumps({"colours": colours})
        return response


class Answered(Reward):
    """Share of a row's questions whose answer stands in the caption: a reward of a column of the data."""

    name = "answered"

    def score(self, rollouts: Rollouts, judgments: Judgments) -> torch.Tensor:
        rows = zip(rollouts.batch.extra("questions"), rollouts.captions, strict=True)
        return torch.tensor(
            [
                [sum(q["answer"] in text for q in questions) / len(questions) for text in group]
                for questions, group in rows
            ]
        )


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


def test_a_judgment_of_ones_own(fit_arguments, cli, tmp_path: Path) -> None:
    rewards = f"[balcap.rewards.Precision, {HERE}.Colourful]"
    options = {
        "model.rewards": rewards,
        "model.weights": "{precision: 1, colourful: 1}",
        "model.reward_transforms": "[]",
        "model.judge.providers": f"{{shapes: {HERE}.ColourJudge}}",
        "trainer.max_steps": 1,
    }
    cli(fit_arguments(**options))
    table = _rollouts(tmp_path / "run")
    for caption, reward in zip(table["caption"], table["reward/colourful"], strict=True):
        assert reward == pytest.approx(min(1, len(set(re.findall("red|green|blue|yellow", caption))) / 3))
    cli(fit_arguments(**options, run_dir=tmp_path / "again"))
    first = next(row for row in metrics(tmp_path / "again") if row.get("train/loss"))
    assert float(first["judge/calls"]) == 0  # remembered, as any judgment


def test_a_column_of_the_data_reaches_a_reward(fit_arguments, cli, world: Path, tmp_path: Path) -> None:
    rows = json.loads((world / "shapes.json").read_text())
    for row in rows:
        words = row["conversations"][1]["value"].split()
        row["questions"] = [{"question": "Which word?", "answer": word} for word in words[:4]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {
        "data.data": tmp_path / "rows.json",
        "data.columns": "[questions]",
        "model.rewards": f"[{HERE}.Answered]",
        "model.weights": "{answered: 1}",
        "model.reward_transforms": "[]",
        "model.judge": "null",
        "model.judge.cache": None,
        "trainer.max_steps": 1,
    }
    cli(fit_arguments(**options))
    answers = {row["image"]: [q["answer"] for q in row["questions"]] for row in rows}
    table = _rollouts(tmp_path / "run")
    for sample, caption, reward in zip(
        table["sample_id"], table["caption"], table["reward/answered"], strict=True
    ):
        wanted = answers[sample]
        assert reward == pytest.approx(sum(word in caption for word in wanted) / len(wanted))
    assert any(table["reward/answered"])


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
