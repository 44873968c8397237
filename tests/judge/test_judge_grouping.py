"""The captions of an image share calls, and no answer is asked for twice."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
import torch
from judge_fakes import data_of
from test_judge_failures import rollouts

from balcap.judge import Decompose, JudgeFailure, Rate, Verdict, Verify
from balcap.rewards import Linguistic, Precision, Recall, RewardSuite
from tests.judge_questions import decompose, verify
from tests.judge_replies import said

CAPTIONS = ["A cat. not a dog", "A cat. A mat. calm", "A mat", "A hat. A cat. not a dog"]


def suite() -> RewardSuite:
    return RewardSuite([Precision(), Recall(), Linguistic()])


def tasks(server) -> list[str]:
    return [body["messages"][0]["content"].splitlines()[0].removeprefix("Task: ") for body in server.requests]


def test_both_groupings_give_the_same_rewards(make_judge, server, png):
    rewards = {}
    for grouping in ("group", "per_rollout"):
        server.requests.clear()
        judge = make_judge(grouping=grouping)
        rewards[grouping] = suite()(
            rollouts([CAPTIONS], png), suite().gather(judge, rollouts([CAPTIONS], png))
        )
        if grouping == "group":
            # 4 captions and the reference: 1 + 1; 5 distinct assertions in 1; 4 captions in 1; rated one by one
            assert sorted(tasks(server)) == ["decompose"] * 2 + ["match"] + ["rate"] * 4 + ["verify"]
        else:
            assert sorted(tasks(server)) == ["decompose"] * 5 + ["match"] * 4 + ["rate"] * 4 + ["verify"] * 4
    # precision: 1/2, 2/3 ("calm" cannot be pointed at), 1, 2/3; recall of [A cat, A mat]: 1/2, 1, 1/2, 1/2
    expected = [[[1 / 2, 1 / 2, 0.5], [2 / 3, 1.0, 0.5], [1.0, 1 / 2, 0.5], [2 / 3, 1 / 2, 0.5]]]
    torch.testing.assert_close(rewards["group"], torch.tensor(expected))
    assert torch.equal(rewards["group"], rewards["per_rollout"])


def test_an_assertion_is_verified_once_whatever_its_spelling(make_judge, server, png):
    judge = make_judge()
    said = ["A cat", "a  cat.", "not a dog", "A cat"]
    verdicts = [Verdict(True, True), Verdict(True, True), Verdict(False, True), Verdict(True, True)]
    assert judge.run(verify(judge, png, said)) == verdicts
    (body,) = server.requests
    assert [item["text"] for item in data_of(body["messages"], "assertions")] == ["A cat", "not a dog"]


def test_verdicts_are_remembered_for_the_image(make_judge, server, png, tmp_path):
    judge = make_judge(cache=str(tmp_path / "c.sqlite"))
    judge.run(verify(judge, png, ["A cat", "A mat"]))
    judge.close()  # a later epoch, another process
    judge.run(verify(judge, png, ["A hat", "A cat", "A mat", "A bat"]))
    asked = [[item["text"] for item in data_of(body["messages"], "assertions")] for body in server.requests]
    assert asked == [["A cat", "A mat"], ["A hat", "A bat"]]
    assert judge.stats().cache_hits == 2
    other = png + b" "  # another file
    judge.run(verify(judge, other, ["A cat"]))
    assert server.calls == 3


def test_questions_under_way_are_shared_item_by_item(make_judge, server, png):
    judge = make_judge()

    async def both():
        return await asyncio.gather(
            verify(judge, png, ["A cat", "A mat"]), verify(judge, png, ["A mat", "not a dog"])
        )

    first, second = judge.run(both())
    assert (first[1], second) == (Verdict(True, True), [Verdict(True, True), Verdict(False, True)])
    asked = [[item["text"] for item in data_of(body["messages"], "assertions")] for body in server.requests]
    assert sorted(asked) == [["A cat", "A mat"], ["not a dog"]]


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (4, 3, [2, 2]), (3, 9, [3])]
)
def test_long_lists_are_split_evenly(make_judge, server, png, count, most, sizes):
    judge = make_judge(per_call={"verify": most})
    said = [f"Thing {number}" for number in range(count)]
    assert judge.run(verify(judge, png, said)) == [Verdict(True, True)] * count
    asked = [len(data_of(body["messages"], "assertions")) for body in server.requests]
    assert sorted(asked, reverse=True) == sizes
    assert max(asked) <= most


def test_what_is_shared_stands_first(make_judge, server, png):
    """Providers bill a prompt less as far as it begins like one that they have just seen."""
    judge = make_judge(per_call={"verify": 1, "match": 1})
    judge.run(verify(judge, png, ["A cat", "A mat"]))
    one, other = (body["messages"] for body in server.requests)
    assert one[0] == other[0]
    assert one[1]["content"][0] == other[1]["content"][0]
    assert one[1]["content"][0]["type"] == "image_url"
    assert one[1]["content"][1] != other[1]["content"][1]
    server.requests.clear()
    suite().gather(judge, rollouts([["A cat", "A hat"]], png))
    texts = [
        said(body["messages"][1])
        for body, task in zip(server.requests, tasks(server), strict=True)
        if task == "match"
    ]
    heads = {text.partition("<captions>")[0] for text in texts}
    assert len(texts) == 2
    assert len(heads) == 1
    assert heads.pop().startswith("<reference_units>\n[{")


def test_units_of_the_data_are_not_asked_for(make_judge, server, png):
    judge = make_judge()
    batch = rollouts([["A cat"]], png).batch
    batch = replace(batch, references=["A cat. A mat"], extras={"reference_units": [["A cat", "A bat"]]})
    judgments = judge.run(suite().gather_group(judge, batch, 0, ["A cat"]))
    assert judgments.units == [["A cat", "A bat"]]
    assert judgments["match"] == [[[True, False]]]
    assert tasks(server).count("decompose") == 1  # the caption's


@pytest.mark.parametrize("fault", ["refusal", "short", "length"])
def test_one_caption_does_not_take_its_group_along(make_judge, server, fault):
    """What fails together is asked again in halves, down to the caption that it is about."""
    real = server._fault
    poisoned = lambda body, digest: fault if "poison" in str(body["messages"][1]) else real(body, digest)  # noqa: E731
    server._fault = poisoned
    judge = make_judge(retries=1)
    said = judge.run(decompose(judge, ["A cat", "A mat", "poison", "A hat"]))
    del server._fault
    assert said == [["A cat"], ["A mat"], None, ["A hat"]]
    assert judge.stats().failures == {"decompose": 1}


def test_what_does_not_depend_on_the_captions_is_not_divided(make_judge, server):
    server.always = "401"
    judge = make_judge()
    answers = judge.run(judge.ask(Decompose, ["A cat", "A mat", "A hat"]))
    assert [type(answer) for answer in answers] == [JudgeFailure] * 3
    assert {answer.kind for answer in answers} == {"denied"}
    assert server.calls == 1
    assert judge.stats().failures == {"decompose": 3}


def test_a_missing_verdict_is_a_missing_precision_of_who_stated_it(make_judge, server, png):
    real = server._fault
    server._fault = lambda body, digest: (
        "refusal"
        if "hat" in str(body["messages"][1]) and "verify" in (body["messages"][0]["content"].splitlines()[0])
        else real(body, digest)
    )
    judge = make_judge(retries=0)
    judgments = suite().gather(judge, rollouts([CAPTIONS], png))
    del server._fault
    precision = suite()(None, judgments)[0, :, 0].tolist()
    assert precision[:3] == pytest.approx([1 / 2, 2 / 3, 1.0])
    assert math.isnan(precision[3])
    assert judgments.failures == {"verify": 1}


def test_a_task_with_a_mistake_raises(make_judge, server):
    class Mistaken(Rate):
        version = "mistaken"

        def parse(self, answer, items):
            raise ZeroDivisionError("a mistake")

    judge = make_judge()
    with pytest.raises(ZeroDivisionError):
        judge.run(judge.ask(Mistaken, ["A cat"]))


def test_closing_in_the_middle_answers_everybody(make_judge, server, png):
    server.always = "hang"
    judge = make_judge(timeout_s=30)
    waiting = judge.submit(judge.ask(Verify, ["A cat", "A mat"], image=png))
    while not server.calls:
        pass
    judge.close()
    with pytest.raises((JudgeFailure, BaseException)):  # noqa: PT012
        for answer in waiting.result(10):
            raise answer
