"""The suite, with a judge that is a few lines long, and a new reward with a new kind of judgment."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from balcap.judge import JudgeFailure, Judgments, Rating, Task, Verdict
from balcap.judge.prompt import chat
from balcap.judge.task import Schema
from balcap.rewards import Linguistic, Precision, Recall, Reward, RewardSuite, merge
from balcap.rewards.base import per_rollout
from balcap.types import CaptionBatch, Rollouts

NAN = float("nan")


class FakeJudge:
    """Words are assertions, capital words are true; "fail" fails. Speaks every task through `parse`."""

    grouping = "group"

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    async def ask(
        self, task: type[Task[Any]], items: Sequence[Any], together: bool = False, **context: Any
    ) -> list[Any]:
        await asyncio.sleep(0)
        return [self._one(task(), item, context) for item in items]

    def _one(self, task: Task[Any], item: Any, context: dict[str, Any]) -> Any:
        known = task.known(item, **context)
        if known is not None:
            return known
        self.asked.append((task.name, item))
        if "fail" in str(item):
            return JudgeFailure(task.name, "as told")
        if task.name == "decompose":
            return item.split()
        if task.name == "verify":
            return Verdict(item.istitle(), True)
        if task.name == "match":
            return [unit in item for unit in context["units"]]
        if task.name == "rate":
            return Rating(0.5, 0.5, 0.5)
        return task.parse(task.read({"colours": [item.count("red")]}), [item], **context)[0]

    def run(self, coroutine):
        return asyncio.run(coroutine)


def rollouts(captions: list[list[str]], references: list[str]) -> Rollouts:
    B, G = len(captions), len(captions[0])
    ids = [f"image {i}" for i in range(B)]
    batch = CaptionBatch(ids, [], [(b"png",)] * B, ["Describe."] * B, references)
    zeros = torch.zeros(B, G, 1)
    return Rollouts(
        batch,
        captions,
        token_ids=zeros.long(),
        completion_mask=zeros.bool(),
        sampler_logps=zeros,
        truncated=zeros[..., 0].bool(),
        lengths=zeros[..., 0].long(),
        reference_lengths=zeros[:, 0, 0].long(),
    )


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), equal_nan=True)


def test_rewards_stand_in_the_order_of_the_suite():
    suite = RewardSuite([Linguistic(), Precision(), Recall()])
    judge = FakeJudge()
    judged = suite.gather(judge, rollouts([["Cat dog", "Cat Mat"], ["Sun", ""]], ["Cat Mat", ""]))
    # linguistic 0.5, 0 for the empty caption; precision 1/2, 2/2, 1/1, 0 for the empty caption;
    # recall of "Cat Mat" 1/2 and 2/2; the empty reference has no recall
    rewards = suite(None, judged)
    close(rewards, [[[0.5, 0.5, 0.5], [0.5, 1.0, 1.0]], [[0.5, 1.0, NAN], [0.0, 0.0, NAN]]])
    assert rewards.dtype == torch.float32
    assert suite.names == ("linguistic", "precision", "recall")
    assert suite["precision"].compute().item() == pytest.approx(2.5 / 4)
    assert judged.units == [["Cat", "Mat"], []]
    assert judged.failures == {}


def test_needs_are_asked_for_once_each():
    suite = RewardSuite([Precision(), Recall(), Linguistic()])
    judge = FakeJudge()
    suite.gather(judge, rollouts([["Cat", "Cat", "Dog"]], ["Sun"]))
    assert Counter(name for name, _ in judge.asked) == {"decompose": 3, "verify": 2, "match": 2, "rate": 2}


def test_what_is_not_needed_is_not_asked():
    judge = FakeJudge()
    judged = RewardSuite([Linguistic()]).gather(judge, rollouts([["Cat", "Dog"]], ["Sun"]))
    assert Counter(name for name, _ in judge.asked) == {"rate": 2}
    assert judged.units == [None]
    assert "verify" not in judged


def test_failures_count_missing_answers():
    suite = RewardSuite([Precision(), Recall(), Linguistic()])
    judged = suite.gather(FakeJudge(), rollouts([["Cat", "fail"], ["Dog", "Sun"]], ["Cat", "fail this"]))
    close(suite(None, judged)[..., 1], [[1.0, NAN], [NAN, NAN]])
    assert judged.failures == {"decompose": 1, "verify": 1, "match": 3, "rate": 1}
    assert judged.units == [["Cat"], None]
    assert sorted(judged.reasons) == ["decompose: as told", "rate: as told"]


def test_groups_gathered_one_by_one_are_the_same_batch():
    suite = RewardSuite([Precision(), Recall()])
    given = rollouts([["Cat", "fail"], ["Dog", "Sun"]], ["Cat", "Sun"])
    together = suite.gather(FakeJudge(), given)
    rows = enumerate(given.captions)
    apart = merge([asyncio.run(suite.gather_group(FakeJudge(), given.batch, *row)) for row in rows])
    assert together == apart


def test_suites_refuse_what_cannot_be_told_apart():
    with pytest.raises(ValueError, match=r"model\.rewards: two rewards are called precision"):
        RewardSuite([Precision(), Precision(pointable=False)])
    with pytest.raises(ValueError, match="no reward"):
        RewardSuite([])
    with pytest.raises(KeyError):
        RewardSuite([Precision()])["recall"]


# ---- a new kind of judgment and a new reward: nothing is registered anywhere


class Colours(Schema):
    colours: list[int]


class CountColours(Task[int]):
    """How often a caption says red."""

    name = "count_colours"
    version = "1"
    schema = Colours
    answer_type = int

    def messages(self, items):
        return chat(self.name, "Count.", " ".join(items))

    def parse(self, answer: Colours, items) -> list[int]:
        return [sum(answer.colours)]

    async def inputs(self, group):
        return {}, [[caption] for caption in group.captions]


class Redness(Reward):
    """1 if the caption says red."""

    name = "redness"
    needs = (CountColours,)

    def score(self, rollouts: Rollouts, judgments: Judgments) -> torch.Tensor:
        return per_rollout(judgments[CountColours.name], lambda count: float(count > 0))


def test_a_new_reward_and_a_new_task():
    suite = RewardSuite([Precision(), Redness()])
    judged = suite.gather(FakeJudge(), rollouts([["A red cat", "A cat", "fail red"]], [""]))
    close(suite(None, judged)[..., 1], [[1.0, 0.0, NAN]])
    assert suite["redness"].compute().item() == 0.5
    assert judged.failures["count_colours"] == 1


class OneCall(CountColours):
    """Judges all captions of a group in one question, as a task may."""

    async def judge_group(self, group):
        (count,) = await group.judge.ask(CountColours, [" ".join(group.captions)])
        return [count] * len(group.captions)


class GroupRedness(Redness):
    needs = (OneCall,)


def test_a_task_may_judge_a_group_in_one_call():
    judge = FakeJudge()
    suite = RewardSuite([GroupRedness()])
    judged = suite.gather(judge, rollouts([["A red cat", "A cat"]], [""]))
    close(suite(None, judged)[..., 0], [[1.0, 1.0]])
    assert len(judge.asked) == 1
