"""The pretended judge: faults are what they say, as a plain HTTP client sees them, and come again with their seed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from tests.judge_replies import gpt_4o_mini_image_tokens, spoil
from tests.judge_server import JudgeServer, server_process
from tests.support import ROOT

CAPTIONS = [{"id": 1, "text": "A cat. A calm mat."}, {"id": 2, "text": "Not a dog."}]
DECOMPOSED = {
    "captions": [{"id": 1, "assertions": ["A cat", "A calm mat"]}, {"id": 2, "assertions": ["Not a dog"]}]
}
RATED = {"captions": [{"id": 1, "clarity": 10, "fluency": 5.0, "coherency": 0}]}
ANSWER = "tests.judge_replies.right_answer"


def question(captions: list[dict[str, Any]] = CAPTIONS) -> dict[str, Any]:
    text = f"<captions>\n{json.dumps(captions)}\n</captions>"
    messages = [{"role": "system", "content": "Task: decompose\n\nSplit."}, {"role": "user", "content": text}]
    return {"model": "gpt-4o-mini", "messages": messages}


async def post(url: str, body: dict[str, Any], timeout: float = 5.0) -> tuple[int, Any, str]:
    """Status, headers, body."""
    limit = aiohttp.ClientTimeout(total=timeout)
    async with (
        aiohttp.ClientSession(timeout=limit) as session,
        session.post(f"{url}/chat/completions", json=body, headers={"Authorization": "Bearer k"}) as response,
    ):
        return response.status, response.headers, await response.text()


def recorded(server: JudgeServer, least: int = 1) -> list[dict[str, Any]]:
    """What the server wrote down, which it does after it has answered."""
    deadline = time.monotonic() + 20
    while len(server.records) < least and time.monotonic() < deadline:
        time.sleep(0.01)
    return server.records


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    yield server
    server.close()


def test_a_right_answer_has_the_form_and_bill_of_an_openai_response(server: JudgeServer) -> None:
    status, headers, text = asyncio.run(post(server.url, question()))
    assert (status, headers["Content-Type"]) == (200, "application/json")
    reply = json.loads(text)
    (choice,) = reply["choices"]
    content = choice["message"]["content"]
    assert (choice["finish_reason"], json.loads(content)) == ("stop", DECOMPOSED)
    asked = sum(len(message["content"]) for message in question()["messages"])
    assert reply["usage"]["prompt_tokens"] == pytest.approx(asked / 4, abs=1)
    assert reply["usage"]["completion_tokens"] == len(content) // 4
    assert (server.requests, server.keys) == ([question()], ["Bearer k"])
    assert [(record["task"], record["answered"]) for record in recorded(server)] == [("decompose", True)]


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("401", 401, "Bearer k"),
        ("429_after", 429, ""),
        ("quota", 429, "insufficient_quota"),
        ("html", 200, "<html>"),
    ],
)
def test_refusals(server: JudgeServer, fault: str, status: int, text: str) -> None:
    server.script, server.retry_after = [fault], 0.25
    seen, headers, body = asyncio.run(post(server.url, question()))
    assert seen == status
    assert text in body
    assert headers.get("Retry-After") == ("0.25" if fault == "429_after" else None)
    assert [(record["fault"], record["usage"]) for record in recorded(server)] == [(fault, None)]


@pytest.mark.parametrize(
    ("fault", "error"), [("hang", TimeoutError), ("drip", TimeoutError), ("reset", aiohttp.ClientError)]
)
def test_transport(server: JudgeServer, fault: str, error: type[Exception]) -> None:
    server.always = fault
    with pytest.raises(error):
        asyncio.run(post(server.url, question(), timeout=0.5))
    server.hang_s = server.drip_s = 0.0
    if fault != "reset":  # right in the end, for those who wait
        assert asyncio.run(post(server.url, question()))[0] == 200


@pytest.mark.parametrize(
    ("fault", "answer", "content"),
    [
        ("short", DECOMPOSED, {"captions": DECOMPOSED["captions"][:1]}),
        ("short", RATED, {"captions": []}),
        ("unknown_id", RATED, {"captions": [{**RATED["captions"][0], "id": 2}]}),
        ("twice", RATED, {"captions": RATED["captions"] * 2}),
        ("out_of_range", RATED, {"captions": [{"id": 1, "clarity": 11, "fluency": 11, "coherency": 11}]}),
        (
            "out_of_range",
            {"captions": [{"id": 1, "covered": [2], "missing": [1]}]},
            {"captions": [{"id": 1, "covered": [2, 3], "missing": [1, 2]}]},
        ),
        ("out_of_range", {"verdicts": [{"id": 1, "true": True}]}, {"verdicts": [{"id": 1, "true": 2}]}),
    ],
)
def test_lists_that_do_not_fit_the_question(
    fault: str, answer: dict[str, Any], content: dict[str, Any]
) -> None:
    before = json.dumps(answer)
    assert json.loads(str(spoil(fault, answer)[0])) == content
    assert json.dumps(answer) == before


def test_a_misspelt_fault_is_named() -> None:
    with pytest.raises(ValueError, match="unknown faults: reste"):
        JudgeServer(faults=["reste"])


def test_tokens_of_images() -> None:
    # 640 x 480 is 2 tiles of 512; 4096 x 2048 comes down to 2048 x 1024, then 1536 x 768: 6
    assert gpt_4o_mini_image_tokens(640, 480) == 2833 + 2 * 5667
    assert gpt_4o_mini_image_tokens(4096, 2048) == 2833 + 6 * 5667
    assert gpt_4o_mini_image_tokens(4096, 2048, "low") == 2833


def faults(seed: int, order: int = 1) -> dict[str, list[str | None]]:
    """Request -> the faults that it meets when it comes twice."""
    server = JudgeServer(fault_share=0.3, seed=seed, faults=("429", "503", "short"))
    bodies = [question([{"id": 1, "text": f"Caption {number}."}]) for number in range(100)[::order]]
    try:
        for body in [*bodies, *bodies]:
            asyncio.run(post(server.url, body))
    finally:
        server.close()
    seen: dict[str, list[str | None]] = {}
    for record in recorded(server):
        seen.setdefault(record["sha256"], []).append(record["fault"])
    return seen


def test_the_mix_has_its_share_and_comes_again_with_its_seed() -> None:
    first = faults(seed=1)
    met = [fault for pair in first.values() for fault in pair]
    # 200 requests: 60 faults expected, standard deviation sqrt(200 * 0.3 * 0.7) = 6.5
    assert 34 <= len(met) - met.count(None) <= 86
    assert faults(seed=1, order=-1) == first
    assert faults(seed=2) != first


def test_a_server_process_logs_every_request_and_stops(tmp_path) -> None:
    log = tmp_path / "requests.jsonl"
    with server_process(answer=ANSWER, log=log, down_after=2) as server:
        assert [asyncio.run(post(server.url, question()))[0] for _ in range(3)] == [200, 200, 503]
    assert server.process.returncode == 0
    assert [(row["fault"], row["answered"]) for row in server.log()] == [(None, True)] * 2 + [("503", False)]
    with server_process(answer=ANSWER, port=server.port) as back:  # as after an outage
        assert asyncio.run(post(back.url, question()))[0] == 200


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
