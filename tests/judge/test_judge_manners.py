"""Judges that are right but odd: other places for the answer, loose JSON, templates with rules, wrong or no usage."""

from __future__ import annotations

import json
import sqlite3
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from balcap.judge import BudgetSpent, Judge, JudgeFailure
from balcap.judge.http import without_bad_usage
from balcap.judge.models import Price
from balcap.judge.prompt import extract_json
from balcap.judge.tasks.rate import Rate, Rating
from tests.judge_replies import WRONG_USAGE, bomb, right_answer
from tests.judge_server import JudgeServer

RIGHT = Rating(1.0, 0.5, 0.0)
MODEL = "openai/gpt-4o-mini"


class OddServer(JudgeServer):
    """Answers rightly, in its own manner."""

    manner = ""
    usage_given: Any = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization"))
        roles = [message["role"] for message in body["messages"]]
        talk = [role for role in roles if role != "system"]
        if self.manner == "no system" and "system" in roles:
            return web.json_response({"error": {"message": "System role not supported"}}, status=400)
        if any(one == other for one, other in pairwise(talk)):
            return web.json_response({"error": {"message": "Conversation roles must alternate"}}, status=400)
        if self.manner == "stream only" and not body.get("stream"):
            return web.json_response({"error": {"message": "only streams"}}, status=400)
        messages = body["messages"][:2]
        if "system" not in roles:
            messages = [{"role": "system", "content": messages[0]["content"]}, messages[0]]
        text = json.dumps(right_answer(messages))
        if self.manner == "broken first" and len(self.requests) == 1:
            text = text[: len(text) // 2]
        if body.get("stream"):
            return await self._stream(request, text)
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        if self.manner == "usage":
            reply["usage"] = self.usage_given
        if self.manner == "no object":
            reply["choices"] = 5
        data = json.dumps(reply).encode()
        return web.Response(body=data, content_type="application/json")

    async def _stream(self, request: web.Request, text: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta, finish in (
            ({"role": "assistant", "content": text[:9]}, None),
            ({"content": text[9:]}, "stop"),
        ):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            chunk = {
                "id": "x",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-environments-own")
    server = OddServer()
    yield server
    server.close()


@pytest.fixture
def ask(odd: OddServer):
    """``ask(manner, number=1, params={}, **settings)`` -> the judge, and its answers about that many captions."""
    judges: list[Judge] = []

    def ask(manner: str, number: int = 1, params: dict[str, Any] | None = None, **settings: Any):
        odd.manner = manner
        given = {"retries": 1, "cache": None, "concurrency": 1} | settings
        judges.append(Judge(MODEL, params={"api_base": odd.url, **(params or {})}, **given))
        return judges[-1], judges[-1].run(judges[-1].ask(Rate, [f"A cat {i}." for i in range(number)]))

    yield ask
    for judge in judges:
        judge.close()


# ── where the answer stands ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("manner", ["", "no system", "broken first"])
def test_templates_with_rules(ask, odd: OddServer, manner: str) -> None:
    assert ask(manner)[1] == [RIGHT]
    assert len(odd.requests) == (2 if manner else 1)


@pytest.mark.parametrize("fault", ["reasoning", "tool", "thought", "loose", "again", "zipped"])
def test_the_answer_is_found(make_judge, server, fault: str) -> None:
    server.always = fault
    judge = make_judge(retries=0)
    assert judge.run(judge.ask(Rate, ["A cat."])) == [RIGHT]
    assert server.calls == 1


def test_a_judge_that_only_streams(ask) -> None:
    judge, answers = ask("stream only", params={"stream": True})
    assert answers == [RIGHT]
    assert judge.stats().tokens_in > 50  # counted here: the stream says nothing of them
    assert judge.stats().cost_usd > 0


def test_text_is_sent_as_text(ask, odd: OddServer) -> None:
    ask("")
    assert [type(message["content"]) for message in odd.requests[0]["messages"]] == [str, str]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, 2,], "b": "x,]",}',
        '{"a": [1, 2], // two\n "b": "x,]" /* } */}',
        '<thought>Maybe {"a": 1}?</thought>{"a": [1, 2], "b": "x,]"}',
        '<thinking>{"a"</thinking>\n```json\n{"a": [1, 2], "b": "x,]"}\n```',
        'analysis {"a": 0} assistantfinal{"a": [1, 2], "b": "x,]"}',
        '{"a": [1, 2], "b": "x,]"}\n\n{"b": "x,]", "a": [1, 2]}',
        'It\'s 5" wide: {"a": [1, 2,], "b": "x,]"}',
    ],
)
def test_loose_json_is_read(text: str) -> None:
    assert extract_json(text) == {"a": [1, 2], "b": "x,]"}


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────

USAGE = [
    *WRONG_USAGE.values(),
    "none",
    {"prompt_tokens": "many", "completion_tokens": 5, "prompt_tokens_details": "few"},
    {},
]


@pytest.mark.parametrize("usage", USAGE)
def test_wrong_usage_is_counted_here_and_the_answer_is_used(
    ask, odd: OddServer, usage: Any, tmp_path: Path
) -> None:
    odd.usage_given = usage
    _, answers = ask("usage", ledger=str(tmp_path / "l.sqlite"))
    assert answers == [RIGHT]
    with sqlite3.connect(tmp_path / "l.sqlite") as rows:
        ((tokens_in, tokens_out, cached, usd),) = rows.execute(
            "SELECT tokens_in, tokens_out, tokens_cached, usd FROM calls"
        )
    assert 100 < tokens_in < 1000
    assert 10 < tokens_out < 100
    assert cached == 0
    assert usd == pytest.approx(0.15e-6 * tokens_in + 0.6e-6 * tokens_out)


@pytest.mark.parametrize("manner", ["usage", "no object"])
def test_the_budget_binds_without_usage(ask, odd: OddServer, manner: str) -> None:
    prices = {MODEL: Price(100.0, 100.0)}
    judge, answers = ask(manner, 200, prices=prices, budget_usd=0.5, max_failed_share=1.0, retries=0)
    assert isinstance(judge.stopped, BudgetSpent)
    assert len(odd.requests) < 30
    assert 0.5 <= judge.spent() < 0.6
    assert isinstance(answers[-1], JudgeFailure)


def test_usage_that_counts_is_left_alone() -> None:
    good = json.dumps({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}).encode()
    assert without_bad_usage(good) == good
    assert without_bad_usage(b"no json") == b"no json"


# ── what is not an answer ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["huge", "bomb"])
def test_no_more_is_read_than_an_answer_can_be(make_judge, server, fault: str) -> None:
    bomb()
    judge = make_judge(retries=0)
    judge.run(judge.ask(Rate, ["A cat."]))  # imports
    server.always = fault
    tracemalloc.start()
    (failure,) = judge.run(judge.ask(Rate, ["A dog."]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(failure, JudgeFailure)
    assert "larger than 4 MB" in failure.reason
    assert peak < 60e6  # the server, too, runs in this process


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_judge_that_denies_is_not_asked_again(make_judge, server, status: str) -> None:
    server.always = status
    judge = make_judge(retries=5, concurrency=1)
    answers = judge.run(judge.ask(Rate, [f"A cat {i}." for i in range(50)]))
    assert server.calls == 3
    assert "it denies access" in str(judge.stopped)
    assert {answer.kind for answer in answers} == {"denied", "stopped"}


def test_the_environments_key_goes_to_its_provider_alone(
    ask, odd: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("")
    assert odd.keys == ["Bearer none"]
    ask("", params={"api_key": "os.environ/OPENAI_API_KEY"})
    assert odd.keys[1:] == ["Bearer sk-the-environments-own"]


# ── time and files ───────────────────────────────────────────────────────────────────────────────────


def test_waiting_in_our_own_queue_is_not_the_judges_time(make_judge, server) -> None:
    server.latency = 0.2
    server.script = ["500"] * 3
    judge = make_judge(timeout_s=1.5, deadline_s=2.0, retries=3, concurrency=1)
    answers = judge.run(judge.ask(Rate, [f"A cat {i}." for i in range(12)]))
    assert answers == [RIGHT] * 12


def test_a_cache_that_is_locked_loses_nothing(
    make_judge, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balcap.judge.cache.BUSY_S", 0.1)
    cache = tmp_path / "c.sqlite"
    judge = make_judge(cache=str(cache))
    judge.run(judge.ask(Rate, ["A cat."]))
    other = sqlite3.connect(cache)
    other.execute("BEGIN IMMEDIATE")
    assert judge.run(judge.ask(Rate, ["A dog.", "A cow."])) == [RIGHT] * 2
    assert judge.run(judge.ask(Rate, ["A dog."])) == [RIGHT]  # remembered all the same
    assert server.calls == 3
    other.rollback()
    time.sleep(0.15)
    judge.close()
    assert other.execute("SELECT count(*) FROM answers").fetchone() == (3,)
    other.close()


def test_a_call_about_several_captions_fails_once(make_judge, server) -> None:
    server.always = "500"
    judge = make_judge(retries=0, concurrency=1, per_call={"rate": 2})
    judge.run(judge.ask(Rate, [f"A cat {i}." for i in range(8)]))
    assert server.calls == 4
    assert judge.stopped is None  # eight failures in a row stop a run, these are four
