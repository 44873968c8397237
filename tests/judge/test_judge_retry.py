"""Retries, repair, deadlines, several places to ask, and when to stop."""

from __future__ import annotations

import asyncio
import time

import pytest
from judge_fakes import JudgeServer

from balcap.judge import Deployment, JudgeFailure, JudgeUnavailable, Rate, TaskModel, retry
from balcap.judge.retry import Health
from tests.judge_questions import rate

NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture
def other():
    server = JudgeServer()
    yield server
    server.close()


def test_a_wrong_answer_is_repaired_in_one_round(make_judge, server):
    server.script = ["out_of_range"]
    judge = make_judge(retries=3)
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    first, second = (body["messages"] for body in server.requests)
    assert second[:2] == first
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"].startswith("<previous_answer>\n")
    assert "outside 0 to 10" in second[3]["content"]


def test_repair_is_tried_once_and_then_the_question_is_put_again(make_judge, server):
    server.script = ["out_of_range", "out_of_range"]
    judge = make_judge(retries=3)
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    assert [len(body["messages"]) for body in server.requests] == [2, 4, 2]


def test_an_empty_answer_has_nothing_to_repair(make_judge, server):
    server.script = ["empty"]
    judge = make_judge(retries=1)
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    assert [len(body["messages"]) for body in server.requests] == [2, 2]


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_one_hanging_call_cannot_hold_a_judgment_beyond_its_deadline(make_judge, server, fault):
    server.always = fault
    judge = make_judge(timeout_s=0.4, deadline_s=1.0, retries=50)
    judge.run(judge.ask(Rate, [""]))  # the first question imports litellm
    start = time.monotonic()
    with pytest.raises(JudgeFailure, match="deadline_s: 1 is over") as failure:
        judge.run(rate(judge, "A cat."))
    assert time.monotonic() - start < 5
    assert failure.value.kind == "timeout"
    assert 2 <= server.calls <= 4


@pytest.mark.parametrize("fault", ["html", "reset", "429_after", "503", "500"])
def test_what_may_pass_is_repeated(make_judge, server, fault):
    server.script = [fault, fault]
    judge = make_judge(retries=2)
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    assert server.calls == 3


def test_a_fallback_answers_and_is_remembered_as_itself(make_judge, server, tmp_path):
    fallback = TaskModel("openai/gpt-5-mini", {"api_base": server.url})
    settings = {"params": {"api_base": NOWHERE}, "fallbacks": [fallback], "cache": str(tmp_path / "c.sqlite")}
    judge = make_judge(retries=0, **settings)
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    assert [body["model"] for body in server.requests] == ["gpt-5-mini"]
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0  # still remembered while the first is away
    assert server.calls == 1
    judge.close()
    alone = make_judge(model="openai/gpt-4o-mini", cache=settings["cache"])
    alone.run(rate(alone, "A cat."))  # who asks the first one only must not get the other's answer
    assert [body["model"] for body in server.requests] == ["gpt-5-mini", "gpt-4o-mini"]
    again = make_judge(model="openai/gpt-5-mini", cache=settings["cache"])
    again.run(rate(again, "A cat."))
    assert server.calls == 2


@pytest.mark.parametrize("fault", ["401", "refusal", "out_of_range", "503"])
def test_a_fallback_is_asked_whatever_the_first_one_lacks(make_judge, server, other, fault):
    other.always = fault
    fallback = TaskModel("openai/gpt-5-mini", {"api_base": server.url})
    judge = make_judge(params={"api_base": other.url}, fallbacks=[fallback], retries=1)
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    assert judge.stats().failures == {}


def test_a_judge_that_is_away_is_not_asked_first_for_a_while(make_judge, server, other, monkeypatch):
    other.always = "503"
    fallback = TaskModel("openai/gpt-5-mini", {"api_base": server.url})
    judge = make_judge(params={"api_base": other.url}, fallbacks=[fallback], retries=0)
    for number in range(retry.COOL_DOWN_AFTER + 5):
        judge.run(rate(judge, f"A cat {number}."))
    assert other.calls == retry.COOL_DOWN_AFTER
    monkeypatch.setattr(retry, "COOL_DOWN_S", 0.0)
    judge._session.retrier._cools_until.clear()
    other.always = None
    judge.run(rate(judge, "A dog."))
    assert other.calls == retry.COOL_DOWN_AFTER + 1


def test_deployments_share_the_work(make_judge, server, other):
    places = [Deployment("openai/gpt-4o-mini", {"api_base": url}) for url in (server.url, other.url)]
    judge = make_judge(params={"temperature": 0}, deployments=places)

    async def many():
        return await asyncio.gather(*(rate(judge, f"A cat {number}.") for number in range(40)))

    assert len(judge.run(many())) == 40
    assert server.calls + other.calls == 40
    assert min(server.calls, other.calls) > 3
    assert server.requests[0]["temperature"] == 0


def test_a_deployment_that_is_down_costs_retries_not_judgments(make_judge, server):
    places = [Deployment("openai/gpt-4o-mini", {"api_base": url}) for url in (server.url, NOWHERE)]
    judge = make_judge(params=None, deployments=places, retries=8)

    async def many():
        return await asyncio.gather(*(rate(judge, f"A cat {number}.") for number in range(20)))

    assert len(judge.run(many())) == 20
    assert judge.stats().failures == {}


def test_a_deployment_that_is_too_busy_rests(make_judge, server, other):
    other.always = "429"
    places = [Deployment("openai/gpt-4o-mini", {"api_base": url}) for url in (server.url, other.url)]
    judge = make_judge(params=None, deployments=places, retries=8)
    for number in range(30):
        judge.run(rate(judge, f"A cat {number}."))
    assert server.calls == 30
    assert other.calls < 5  # half of 30 if it never cooled down


def test_requests_per_minute_are_kept_without_losing_a_judgment(make_judge, server, other):
    places = [
        Deployment("openai/gpt-4o-mini", {"api_base": server.url}, rpm=4),
        Deployment("openai/gpt-4o-mini", {"api_base": other.url}),
    ]
    judge = make_judge(params=None, deployments=places, retries=1)

    async def many():
        return await asyncio.gather(*(rate(judge, f"A cat {number}.") for number in range(30)))

    assert len(judge.run(many())) == 30
    assert judge.stats().failures == {}
    assert server.calls <= 8  # 4 in each of the two minutes that the test may touch
    assert server.calls + other.calls == 30 == judge.stats().calls


def test_where_all_deployments_are_at_their_limit_a_call_waits_and_is_no_attempt(make_judge, server):
    places = [Deployment("openai/gpt-4o-mini", {"api_base": server.url}, rpm=3)]
    judge = make_judge(params=None, deployments=places, retries=0)

    async def many():
        asked = [asyncio.ensure_future(rate(judge, f"A cat {number}.")) for number in range(8)]
        # The first one imports litellm.
        await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(asked, timeout=3)
        return [one for one in asked if one.done()]

    done = judge.run(many())
    assert 3 <= len(done) <= 6  # 3 in each of the two minutes that the test may touch
    assert len(done) == server.calls == judge.stats().calls
    assert judge.stats().failures == {}
    assert judge.stopped is None


def test_keys_of_deployments_come_from_named_variables(make_judge, server, monkeypatch):
    monkeypatch.setenv("MY_SECOND_KEY", "planted-second-key")
    place = Deployment("openai/gpt-4o-mini", {"api_base": server.url, "api_key": "os.environ/MY_SECOND_KEY"})
    judge = make_judge(params=None, deployments=[place])
    assert judge.problems() == []
    judge.run(rate(judge, "A cat."))
    assert server.keys == ["Bearer planted-second-key"]


def test_too_many_failures_stop_the_retry(make_judge, server):
    server.always = "503"
    judge = make_judge(retries=0, concurrency=4)

    async def many():
        return await judge.ask(Rate, [f"A cat {number}." for number in range(400)])

    answers = judge.run(many())
    assert {type(answer) for answer in answers} == {JudgeFailure}
    assert isinstance(judge.stopped, JudgeUnavailable)
    assert "went wrong" in str(judge.stopped)  # what the provider answered
    assert server.calls < 20
    assert {answer.kind for answer in answers} == {"server", "stopped"}
    assert judge.run(judge.ask(Rate, ["A dog."]))[0].kind == "stopped"


def test_some_failures_do_not(make_judge, server):
    server.script = ["401" if number % 3 == 0 else None for number in range(90)]
    judge = make_judge(retries=0, concurrency=1)
    answers = judge.run(judge.ask(Rate, [f"A cat {number}." for number in range(90)]))
    assert sum(isinstance(answer, JudgeFailure) for answer in answers) == 30
    assert judge.stopped is None


def test_a_share_of_one_never_stops(make_judge, server):
    server.always = "401"
    judge = make_judge(retries=0, max_failed_share=1.0)
    judge.run(judge.ask(Rate, [f"A cat {number}." for number in range(30)]))
    assert judge.stopped is None
    assert server.calls == 30


def test_a_cached_answer_needs_no_judge(make_judge, server, tmp_path):
    path = str(tmp_path / "c.sqlite")
    judge = make_judge(cache=path, retries=0)
    judge.run(rate(judge, "A cat."))
    server.always = "503"
    judge.run(judge.ask(Rate, [f"A dog {number}." for number in range(20)]))
    assert judge.stopped is not None
    assert judge.run(rate(judge, "A cat.")).clarity == 1.0


def test_health_is_kept_for_each_kind_of_judgment():
    health = Health(0.5)
    for _ in range(200):
        health.succeeded("rate")
    # one kind has lost its judge while the others go on
    said = []
    for _ in range(8):
        said.append(health.failed("verify", "timeout"))
        health.succeeded("rate")
    assert said[:7] == [None] * 7
    assert "verify" in (said[7] or "")


def test_nothing_coming_any_more_is_seen_at_once():
    health = Health(0.5)
    for task in ("rate", "verify", "match") * 100:
        health.succeeded(task)
    said = [health.failed(task, "server") for task in ("rate", "verify", "match", "rate") * 2]
    assert said[:7] == [None] * 7
    assert said[7] == "the last 8 judgments failed"


def test_one_image_that_is_refused_is_not_an_outage():
    health = Health(0.5)
    for _ in range(60):
        health.succeeded("rate")
    assert [health.failed("rate", "filtered") for _ in range(16)] == [None] * 16
    assert [health.failed("rate", "filtered") for _ in range(50)][-1] is not None  # but more than half is
