"""The pretended judge itself: every fault is what it says, as a plain HTTP client sees it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from PIL import Image

from tests.judge_replies import gpt_4o_mini_image_tokens, log_normal, right_answer, spoil
from tests.judge_server import FAULTS, PASSING, JudgeServer, ServerProcess, server_process
from tests.support import ROOT

CAPTIONS = [{"id": 1, "text": "A cat. A calm mat."}, {"id": 2, "text": "Not a dog."}]
DECOMPOSED = {
    "captions": [{"id": 1, "assertions": ["A cat", "A calm mat"]}, {"id": 2, "assertions": ["Not a dog"]}]
}


def picture(width: int = 640, height: int = 480) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def fence(tag: str, value: Any) -> str:
    return f"<{tag}>\n{json.dumps(value)}\n</{tag}>"


def question(task: str, text: str, image: str | None = None, system: str = "Judge.") -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": image}})
    messages = [
        {"role": "system", "content": f"Task: {task}\n\n{system}"},
        {"role": "user", "content": parts},
    ]
    return {"model": "gpt-4o-mini", "messages": messages}


DECOMPOSE = question("decompose", fence("captions", CAPTIONS))


async def post(url: str, body: dict[str, Any], timeout: float = 5.0) -> tuple[int, Any, str]:
    """Status, headers, body."""
    limit = aiohttp.ClientTimeout(total=timeout)
    async with (
        aiohttp.ClientSession(timeout=limit) as session,
        session.post(f"{url}/chat/completions", json=body, headers={"Authorization": "Bearer k"}) as response,
    ):
        return response.status, response.headers, await response.text()


def ask(server: JudgeServer, body: dict[str, Any] = DECOMPOSE, timeout: float = 5.0) -> dict[str, Any]:
    """The JSON of a response that is one."""
    status, headers, text = asyncio.run(post(server.url, body, timeout))
    assert (status, headers["Content-Type"]) == (200, "application/json")
    return json.loads(text)


def said(server: JudgeServer, body: dict[str, Any] = DECOMPOSE) -> dict[str, Any]:
    """The JSON in the message of a response."""
    return json.loads(ask(server, body)["choices"][0]["message"]["content"])


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()


def test_right_answers_have_the_form_of_an_openai_response(server: JudgeServer) -> None:
    reply = ask(server)
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "gpt-4o-mini"
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    assert json.loads(choice["message"]["content"]) == DECOMPOSED
    assert server.requests == [DECOMPOSE]
    assert server.keys == ["Bearer k"]
    assert server.calls == 1


def test_right_answers_to_the_other_tasks() -> None:
    texts = [{"id": 1, "text": "A cat"}, {"id": 2, "text": "not a dog"}, {"id": 3, "text": "calm mood"}]
    verify = question("verify", fence("assertions", texts), picture())
    assert right_answer(verify["messages"]) == {
        "verdicts": [
            {"id": 1, "true": True, "pointable": True},
            {"id": 2, "true": False, "pointable": True},
            {"id": 3, "true": True, "pointable": False},
        ]
    }
    captions = [{"id": 1, "assertions": ["A cat", "A hat"]}, {"id": 2, "assertions": ["A dog"]}]
    match = question("match", fence("reference_units", texts) + "\n" + fence("captions", captions))
    assert right_answer(match["messages"]) == {
        "captions": [
            {"id": 1, "covered": [1], "missing": [2, 3]},
            {"id": 2, "covered": [], "missing": [1, 2, 3]},
        ]
    }
    rate = question("rate", fence("captions", CAPTIONS[:1]))
    assert right_answer(rate["messages"]) == {
        "captions": [{"id": 1, "clarity": 10, "fluency": 5.0, "coherency": 0}]
    }


# ---- one fault at a time


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_statuses(server: JudgeServer, status: int) -> None:
    server.always = str(status)
    seen, headers, text = asyncio.run(post(server.url, DECOMPOSE))
    assert seen == status
    assert "Retry-After" not in headers
    assert json.loads(text) == {"error": {"message": "went wrong with Bearer k"}}


def test_too_many_requests_with_a_time_to_wait(server: JudgeServer) -> None:
    server.always, server.retry_after = "429_after", 0.25
    status, headers, _ = asyncio.run(post(server.url, DECOMPOSE))
    assert (status, headers["Retry-After"]) == (429, "0.25")


def test_an_exhausted_quota(server: JudgeServer) -> None:
    server.always = "quota"
    status, _, text = asyncio.run(post(server.url, DECOMPOSE))
    assert (status, json.loads(text)["error"]["code"]) == (429, "insufficient_quota")


def test_a_server_that_knows_no_schemas(server: JudgeServer) -> None:
    server.always = "no_schema"
    status, _, text = asyncio.run(post(server.url, {**DECOMPOSE, "response_format": {}}))
    assert status == 400
    assert "response_format" in text
    assert said(server) == DECOMPOSED


def test_an_error_page_with_status_200(server: JudgeServer) -> None:
    server.always = "html"
    status, headers, text = asyncio.run(post(server.url, DECOMPOSE))
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert text.startswith("<html>")


def test_hanging_sends_nothing_until_the_server_closes(server: JudgeServer) -> None:
    other = JudgeServer()
    other.always = "hang"

    async def hanging() -> float:
        asked = asyncio.create_task(post(other.url, DECOMPOSE))
        while not other.calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert not asked.done()
        started = time.monotonic()
        await asyncio.to_thread(other.close)
        with pytest.raises(aiohttp.ClientError):
            await asked
        return time.monotonic() - started

    assert asyncio.run(hanging()) < 3
    assert [record["answered"] for record in other.records] == [False]

    server.always, server.hang_s = "hang", 0.2
    started = time.monotonic()
    assert said(server) == DECOMPOSED
    assert time.monotonic() - started >= 0.2


def test_a_client_that_gives_up_leaves_nothing_behind(server: JudgeServer) -> None:
    server.always = "hang"
    with pytest.raises(TimeoutError):
        asyncio.run(post(server.url, DECOMPOSE, timeout=0.2))
    until = time.monotonic() + 5
    while not server.records and time.monotonic() < until:
        time.sleep(0.01)
    assert [(record["fault"], record["answered"]) for record in server.records] == [("hang", False)]


def test_a_dripping_body_outlasts_the_clients_patience(server: JudgeServer) -> None:
    server.always, server.drip_s = "drip", 0.05

    async def sip() -> tuple[int, bytes]:
        limit = aiohttp.ClientTimeout(total=None, sock_read=0.5)  # no gap is as long as this
        url, body = f"{server.url}/chat/completions", b""
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.post(url, json=DECOMPOSE) as response,
        ):
            until = time.monotonic() + 1
            while time.monotonic() < until:
                body += await response.content.readany()
            return response.status, body

    status, body = asyncio.run(sip())
    assert status == 200
    assert 2 <= len(body) <= 21  # 1 s at a byte each 0.05 s
    assert b'{"id": "chatcmpl-1", "object'.startswith(body)
    server.drip_s = 0.0
    assert said(server) == DECOMPOSED  # the body is right for those who wait


def test_a_connection_reset_in_the_middle_of_a_response(server: JudgeServer) -> None:
    server.always = "reset"

    async def read() -> bytes:
        body = json.dumps(DECOMPOSE).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        seen = b""
        try:
            while chunk := await reader.read(65536):
                seen += chunk
        except ConnectionResetError:
            return seen
        raise AssertionError("the connection ended in an orderly way")

    head, _, body = asyncio.run(read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    promised = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert len(body) == promised // 2
    with pytest.raises(aiohttp.ClientError):
        ask(server)


@pytest.mark.parametrize(("fault", "reason"), [("truncated", "stop"), ("length", "length")])
def test_content_that_breaks_off(server: JudgeServer, fault: str, reason: str) -> None:
    server.always = fault
    (choice,) = ask(server)["choices"]
    assert choice["finish_reason"] == reason
    assert json.dumps(DECOMPOSED).startswith(choice["message"]["content"])
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice["message"]["content"])


def test_prose_around_the_right_answer(server: JudgeServer) -> None:
    server.always = "prose"
    content = ask(server)["choices"][0]["message"]["content"]
    assert content.startswith("Sure!")
    assert json.loads(content.split("```json\n")[1].split("\n```")[0]) == DECOMPOSED


@pytest.mark.parametrize(
    ("fault", "message", "reason"),
    [
        ("empty", {"content": "", "refusal": None}, "stop"),
        ("refusal", {"content": None, "refusal": "I cannot help with that."}, "stop"),
        ("filter", {"content": "", "refusal": None}, "content_filter"),
    ],
)
def test_no_answer_at_all(server: JudgeServer, fault: str, message: dict[str, Any], reason: str) -> None:
    server.always = fault
    (choice,) = ask(server)["choices"]
    assert choice["message"] == {"role": "assistant", **message}
    assert choice["finish_reason"] == reason


def test_lists_that_do_not_fit(server: JudgeServer) -> None:
    first, second = DECOMPOSED["captions"]
    server.script = ["short", "unknown_id", "twice", None]
    assert said(server) == {"captions": [first]}
    assert said(server) == {"captions": [{**first, "id": 3}, second]}
    assert said(server) == {"captions": [{**first, "id": 2}, second]}
    assert said(server) == DECOMPOSED


RATED = {"captions": [{"id": 1, "clarity": 10, "fluency": 5.0, "coherency": 0}]}
VERDICTS = {
    "verdicts": [{"id": 1, "true": True, "pointable": False}, {"id": 2, "true": True, "pointable": True}]
}
MATCHED = {"captions": [{"id": 1, "covered": [2], "missing": [1, 3]}]}


def test_lists_of_one() -> None:
    (rated,) = RATED["captions"]
    assert json.loads(str(spoil("short", RATED)[0])) == {"captions": []}
    assert json.loads(str(spoil("unknown_id", RATED)[0])) == {"captions": [{**rated, "id": 2}]}
    assert json.loads(str(spoil("twice", RATED)[0])) == {"captions": [rated, rated]}


@pytest.mark.parametrize(
    ("answer", "first"),
    [
        (RATED, {"id": 1, "clarity": 11, "fluency": 11, "coherency": 11}),
        (VERDICTS, {"id": 1, "true": 2, "pointable": 2}),
        (MATCHED, {"id": 1, "covered": [2, 3], "missing": [1, 3, 4]}),
        (DECOMPOSED, {"id": 1, "assertions": [11]}),
    ],
)
def test_values_out_of_range(answer: dict[str, Any], first: dict[str, Any]) -> None:
    before = json.dumps(answer)
    (items,) = json.loads(str(spoil("out_of_range", answer)[0])).values()
    (right,) = answer.values()
    assert items == [first, *right[1:]]
    assert json.dumps(answer) == before  # the right answer is left alone


def test_faults_that_do_not_fit_the_answer_are_not_passed_over() -> None:
    with pytest.raises(ValueError, match="no list of items"):
        spoil("short", {"clarity": 10})


def test_misspelt_faults_are_named() -> None:
    with pytest.raises(ValueError, match="unknown faults: reste"):
        JudgeServer(faults=["reste"])


# ---- bills, times, chance


def test_bills(server: JudgeServer) -> None:
    body = question("verify", fence("assertions", [{"id": 1, "text": "A cat"}]), picture())
    text = len(body["messages"][0]["content"]) + len(body["messages"][1]["content"][1]["text"])
    reply = ask(server, body)
    content = reply["choices"][0]["message"]["content"]
    # 640 x 480: 2 tiles, 2833 + 2 * 5667 = 14167
    assert reply["usage"] == {
        "prompt_tokens": text // 4 + 14167,
        "completion_tokens": len(content) // 4,
        "total_tokens": text // 4 + 14167 + len(content) // 4,
    }
    server.image_tokens = lambda width, height, detail: width + height
    assert ask(server, body)["usage"]["prompt_tokens"] == text // 4 + 640 + 480
    server.always = "refusal"
    assert ask(server, body)["usage"]["completion_tokens"] == len("I cannot help with that.") // 4
    for fault in ("truncated", "empty", "filter", "length"):
        server.always = fault
        assert ask(server, body)["usage"]["prompt_tokens"] == text // 4 + 640 + 480, fault


@pytest.mark.parametrize(
    ("size", "detail", "tiles"),
    [
        ((640, 480), None, 2),
        ((512, 512), "high", 1),
        ((1024, 1024), None, 4),  # the shorter side comes down to 768: 768 x 768
        ((4096, 2048), None, 6),  # 2048 x 1024, then 1536 x 768
        ((4096, 2048), "low", 0),
    ],
)
def test_tokens_of_images(size: tuple[int, int], detail: str | None, tiles: int) -> None:
    assert gpt_4o_mini_image_tokens(*size, detail) == 2833 + tiles * 5667


def test_prefixes_that_were_seen_are_cached(server: JudgeServer) -> None:
    server.cached_prefixes = True
    system = "Judge with care. " * 400  # 6,800 characters, 1,700 tokens
    bodies = [question("rate", fence("captions", [{"id": 1, "text": text}]), system=system) for text in "ab"]
    cached = [ask(server, b)["usage"]["prompt_tokens_details"]["cached_tokens"] for b in [*bodies, bodies[0]]]
    # "Task: rate\n\n" + 6,800 characters: 13 whole blocks of 512 characters, 1,664 tokens, and a last one
    assert cached[0] == 0
    assert 1664 <= cached[1] <= cached[2]
    assert all(tokens % 128 == 0 for tokens in cached)


def test_latency_before_answers_not_before_refusals(server: JudgeServer) -> None:
    server.latency = 0.3
    started = time.monotonic()
    ask(server)
    assert time.monotonic() - started >= 0.3
    server.always = "429"
    started = time.monotonic()
    asyncio.run(post(server.url, DECOMPOSE))
    assert time.monotonic() - started < 0.3


def test_log_normal_latency_has_its_median_and_tail() -> None:
    draw = log_normal(0.5, 4.0, seed=3)
    values = sorted(draw() for _ in range(20_000))
    assert statistics.median(values) == pytest.approx(0.5, rel=0.05)
    assert values[int(0.99 * len(values))] == pytest.approx(4.0, rel=0.15)
    again = log_normal(0.5, 4.0, seed=3)
    assert again() == log_normal(0.5, 4.0, seed=3)()
    with pytest.raises(ValueError, match="in order"):
        log_normal(1.0, 0.5)


def met(share: float, seed: int, order: int = 1, n: int = 300) -> dict[str, list[str | None]]:
    """Caption -> the faults that its first and second request meet."""
    server = JudgeServer(fault_share=share, seed=seed)
    server.drip_s, server.hang_s = 0.0, 0.0
    captions = [f"Caption {i}." for i in range(n)][::order]
    bodies = [question("rate", fence("captions", [{"id": 1, "text": text}])) for text in captions]

    async def all_of_them() -> None:
        async with aiohttp.ClientSession() as session:
            for body in [*bodies, *bodies]:
                try:
                    async with session.post(f"{server.url}/chat/completions", json=body) as response:
                        await response.read()
                except aiohttp.ClientError:
                    pass

    try:
        asyncio.run(all_of_them())
    finally:
        server.close()
    assert server.calls == 2 * n
    found: dict[str, list[str | None]] = {}
    for record in server.records:
        found.setdefault(record["sha256"], []).append(record["fault"])
    return found


def test_the_mix_has_its_share_and_comes_again_with_its_seed() -> None:
    first = met(0.3, seed=1)
    faults = Counter(fault for pair in first.values() for fault in pair)
    # 600 requests: 180 faults expected, standard deviation sqrt(600 * 0.3 * 0.7) = 11
    assert 140 <= faults.total() - faults[None] <= 220
    assert set(faults) == {None, *PASSING}  # 10 of each expected
    assert len({tuple(pair) for pair in first.values()}) > 20  # a repetition draws anew
    assert met(0.3, seed=1, order=-1) == first
    assert met(0.3, seed=2) != first


def test_the_mix_holds_nothing_that_cannot_pass() -> None:
    assert {*FAULTS} - {*PASSING} == {"400", "400_schema", "401", "404", "quota", "no_schema"}


def test_a_repair_is_answered_like_the_question(server: JudgeServer) -> None:
    asked: list[Any] = []

    def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
        asked.append(messages)
        return DECOMPOSED

    server.right_answer = answer
    wrong = [{"role": "assistant", "content": "{}"}, {"role": "user", "content": "That cannot be used."}]
    reply = ask(server, {**DECOMPOSE, "messages": [*DECOMPOSE["messages"], *wrong]})
    assert json.loads(reply["choices"][0]["message"]["content"]) == DECOMPOSED
    assert asked == [DECOMPOSE["messages"]]
    assert reply["usage"]["prompt_tokens"] > ask(server)["usage"]["prompt_tokens"]


def test_records_say_what_was_answered(server: JudgeServer) -> None:
    server.script = [None, "prose", "429", "short", "drip"]
    server.drip_s = 0.0
    for _ in range(5):
        asyncio.run(post(server.url, DECOMPOSE))
    server_records = [(r["task"], r["fault"], r["answered"]) for r in server.records]
    assert server_records == [
        ("decompose", None, True),
        ("decompose", "prose", True),
        ("decompose", "429", False),
        ("decompose", "short", False),
        ("decompose", "drip", True),
    ]
    assert [r["usage"] is None for r in server.records] == [False, False, True, False, False]
    assert len({r["sha256"] for r in server.records}) == 1


# ---- as a process


ANSWER = "tests.judge_replies.right_answer"


def test_a_server_process_logs_every_request_and_stops(tmp_path) -> None:
    log = tmp_path / "requests.jsonl"
    with server_process(answer=ANSWER, log=log, down_after=3, latency=0.01, latency_p99=0.02) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/v1"
        statuses = [asyncio.run(post(server.url, DECOMPOSE))[0] for _ in range(5)]
        assert statuses == [200, 200, 200, 503, 503]
        process = server.process
    assert process.returncode == 0
    rows = server.log()
    assert [row["fault"] for row in rows] == [None, None, None, "503", "503"]
    assert [row["answered"] for row in rows] == [True, True, True, False, False]
    assert set(rows[0]) == {"time", "task", "sha256", "fault", "answered", "usage"}
    assert abs(rows[0]["time"] - time.time()) < 60
    with server_process(answer=ANSWER, port=server.port) as back:  # as after an outage
        assert asyncio.run(post(back.url, DECOMPOSE))[0] == 200


def test_what_hangs_when_the_process_stops_is_logged(tmp_path) -> None:
    log = tmp_path / "requests.jsonl"

    async def hang(process: ServerProcess) -> None:
        asked = asyncio.create_task(post(process.url, DECOMPOSE))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(process.stop)
        with pytest.raises(aiohttp.ClientError):
            await asked

    with server_process(answer=ANSWER, log=log, faults="hang", fault_share=1.0) as process:
        asyncio.run(hang(process))
    assert [(row["fault"], row["answered"]) for row in process.log()] == [("hang", False)]


PARENT = f"""
import os, signal
from tests.judge_server import server_process
with server_process(answer="{ANSWER}") as server:
    print(server.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_process_ends_with_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    until, child = time.monotonic() + 10, int(done.stdout)
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_process_that_cannot_start_says_so() -> None:
    with pytest.raises(RuntimeError, match="did not start"), server_process(answer="json.no_such_thing"):
        pass


@pytest.mark.slow
def test_the_oracle_answers_by_default() -> None:
    texts = [{"id": 1, "text": "A red circle is on a table."}]
    with server_process() as server:
        status, _, text = asyncio.run(post(server.url, question("rate", fence("captions", texts))))
    assert status == 200
    (rated,) = json.loads(json.loads(text)["choices"][0]["message"]["content"])["captions"]
    assert rated["id"] == 1
    assert 0 <= rated["clarity"] <= 10
