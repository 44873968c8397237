"""Recall without a reference: the pool of a group, who is asked about it, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from balcap.judge import JudgeFailure, Verdict
from balcap.judge.tasks.pooled_match import pooled_units
from balcap.rewards import PooledRecall, Precision, Recall, RewardSuite
from tests.commands.test_estimate_dry_run import calls, play
from tests.rewards.test_rewards_suite import FakeJudge, close, rollouts

NAN = float("nan")


class PoolJudge(FakeJudge):
    """Words that begin with a unit cover it; the verdict on "Unsure" is missing, and so is what "Odd" covers."""

    def _one(self, task: Any, item: Any, context: dict[str, Any]) -> Any:
        if (task.name == "verify" and item == "Unsure") or (task.name == "match" and "Odd" in item):
            return JudgeFailure(task.name, "as told")
        answer = super()._one(task, item, context)
        if task.name == "match" and item and context["units"]:
            return [any(word.startswith(unit) for word in item) for unit in context["units"]]
        return answer


def scores(captions: list[list[str]], judge: FakeJudge | None = None) -> torch.Tensor:
    suite = RewardSuite([PooledRecall()])
    given = rollouts(captions, [""] * len(captions))
    return suite(given, suite.gather(judge or PoolJudge(), given))[..., 0]


@pytest.mark.parametrize("grouping", ["group", "per_rollout"])
def test_the_share_of_what_the_group_has_found(grouping: str):
    judge = PoolJudge()
    judge.grouping = grouping
    # capital words are true: the pool is Cat, Mat, Catfish, Sun; "dog" is in nobody's way
    given = [["Cat dog", "Cat Mat", "Catfish Mat Sun", ""]]
    # Cat | Cat, Mat | Catfish, Mat, Sun and, as it follows from a catfish, Cat | nothing
    close(scores(given, judge), [[1 / 4, 2 / 4, 4 / 4, 0.0]])
    # the empty caption asserts nothing, which needs no call; the others lack a unit in their own words
    assert [item for name, item in judge.asked if name == "match"] == [
        ("Cat", "dog"), ("Cat", "Mat"), ("Catfish", "Mat", "Sun")
    ]  # fmt: skip


def test_what_a_caption_states_itself_needs_no_call():
    judge = PoolJudge()
    close(
        scores([["Cat Mat", "Mat Cat", "Cat Mat"], ["Sun.", "sun. Sun", "Moon Sun"]], judge),
        [[1.0] * 3, [0.5, 0.5, 1.0]],
    )
    assert [item for name, item in judge.asked if name == "match"] == [("Sun.",), ("sun.", "Sun")]


def test_missing_verdicts_and_matches_are_missing_and_empty_pools_too():
    # Unsure has no verdict: its caption misses the reward and adds nothing to the pool of Cat, Odd and Sun
    given = [
        ["Cat", "Unsure Mat", "Odd", "Sun Cat"],
        ["dog", "dog cow", "dog", "cow"],
        ["fail", "Cat", "Cat", "fail"],
    ]
    close(scores(given), [[1 / 3, NAN, NAN, 2 / 3], [NAN] * 4, [NAN, 1.0, 1.0, NAN]])


def test_a_caption_alone_is_its_own_pool_which_says_nothing():
    judge = PoolJudge()
    close(scores([["Cat dog"]], judge), [[NAN]])
    assert not [item for name, item in judge.asked if name == "match"]


def test_the_order_of_the_captions_changes_nothing():
    captions = ["Cat dog", "Catfish", "Mat Sun", "Sun Cat"]
    straight, backwards = scores([captions]), scores([captions[::-1]])
    torch.testing.assert_close(straight, backwards.flip(1))


def test_only_what_is_true_and_pointable_is_pooled_once():
    yes, blind, false = Verdict(True, True), Verdict(True, False), Verdict(False, True)
    said = [["A cat.", "It is calm.", "A dog."], ["a cat", "A mat."], None]
    assert pooled_units(said, [[yes, blind, false], [yes, yes], None]) == ("A cat.", "A mat.")


def test_beside_recall_each_has_its_own_units():
    suite = RewardSuite([Precision(), Recall(), PooledRecall()])
    given = rollouts([["Cat", "Mat"]], ["Cat Sun"])
    judged = suite.gather(PoolJudge(), given)
    close(suite(given, judged), [[[1.0, 0.5, 0.5], [1.0, 0.0, 0.5]]])
    assert judged.units == [["Cat", "Sun"]]
    assert judged.failures == {}


def test_a_pool_is_matched_in_the_calls_of_one_reference():
    used = play(suite=RewardSuite([Precision(), PooledRecall()]))
    # 8 captions: decomposed four a call, verified together, and matched with the pool eight a call; no reference
    assert calls(used) == {"decompose": 2, "verify": 1, "match": 1}
