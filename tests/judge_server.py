"""A judge behind HTTP that is right, wrong, slow, late or absent, as asked: an OpenAI-compatible server on loopback.

In a test, in a thread of its own:

    server = JudgeServer(answer)
    server.script = ["429", "drip", None]     # what goes wrong with the next requests

As a process, for measurements and for runs that are killed; its first line of output is its URL:

    python -m tests.judge_server --port 0 --fault-share 0.3 --seed 1 --latency 0.5 --log requests.jsonl

    with server_process(fault_share=0.3, seed=1) as server:
        server.url, server.log()

What can go wrong:

    refused      400, 400_schema (response_format unknown), 401, 403, 404, quota (429 that will not pass), no_schema
                 (400_schema where the request asks for a schema, else right)
    busy, broken 429, 429_after (with Retry-After), 500, 503, html (a proxy's error page with status 200)
    transport    hang (no byte ever), drip (headers, then a byte every `drip_s`), reset (half a body, then RST)
    content      truncated, prose (JSON inside a chat: readable, so no failure), short (an item is missing),
                 unknown_id, twice (two items with one id), out_of_range, refusal, filter, empty, length (cut at
                 max_tokens)
    odd          right, but elsewhere: reasoning, tool (a call of one), thought, loose (comments and commas), again (the
                 same object twice), zipped; billed wrongly: usage_none, usage_below (0), usage_text, usage_cached (more
                 than the prompt); huge (10 MB) and bomb (100 MB of zeros, zipped), which nobody should read
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import importlib
import json
import math
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.judge_replies import (
    WRONG_USAGE,
    Answer,
    Messages,
    bomb,
    gpt_4o_mini_image_tokens,
    image_size,
    log_normal,
    message_of,
    question_of,
    right_answer,
    spoil,
    task_of,
)

ROOT = Path(__file__).parents[1]

_STATUS = {
    "400": 400,
    "401": 401,
    "403": 403,
    "404": 404,
    "429": 429,
    "429_after": 429,
    "500": 500,
    "503": 503,
}
_BUSY = ("429", "429_after", "500", "503", "html")
_TRANSPORT = ("hang", "drip", "reset")
_CONTENT = ("truncated", "prose", "short", "unknown_id", "twice", "out_of_range", "refusal", "filter")
_ODD = ("reasoning", "tool", "thought", "loose", "again", "zipped", *WRONG_USAGE)
ODD = (*_ODD, "huge", "bomb")
# What may go well when it is asked again; `fault_share` draws from these.
PASSING = (*_BUSY, *_TRANSPORT, *_CONTENT, "empty", "length")
_RIGHT_IN_THE_END = (None, "prose", "hang", "drip", *_ODD)
FAULTS = (*PASSING, *ODD, "400", "400_schema", "401", "403", "404", "quota", "no_schema")


# ---- the server


class JudgeServer:
    """The server, on its own event loop in a thread of its own.

    What goes wrong with a request is, in this order: "503" once `down_after` requests have come in; `always`;
    the first of `script`; a draw from `faults` with probability `fault_share`. The draw depends on `seed`,
    the request's messages and how often they have come, so the same requests meet the same faults in
    whatever order they arrive.

    Args:
        answer: the right answer to a request's first two messages, the question without rounds of repair.
        port: 0 for any.
        latency: seconds before an answer, or a function that draws them. Refusals at the door (status
            400 and above, a proxy's page) come at once.
        fault_share: share of requests that something goes wrong with.
        faults: what that may be, each as likely as the others.
        seed: of the draws.
        log_path: JSON-lines file, appended to as requests are done with; see `records`.

    Attributes:
        script: what goes wrong with the next requests, first come first served; None for nothing.
        always: what goes wrong with every request.
        requests: the bodies of all requests, in the order of their arrival.
        keys: the ``Authorization`` header of each.
        records: one dictionary per request that is done with: ``time``, ``task``, ``sha256`` of the messages,
            ``fault``, ``answered`` (the whole right answer was written out, in prose or not), ``usage`` (None
            where nothing was billed). Complete after `close`.
        keep: whether `requests`, `keys` and `records` grow; off in long runs.
        hang_s: seconds until a hanging request is answered after all; None: never.
        drip_s: seconds between two bytes of a dripping body.
        retry_after: of "429_after", in seconds.
        down_after: requests after which nothing but 503 comes; None: never.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        *,
        port: int = 0,
        latency: float | Callable[[], float] = 0.0,
        fault_share: float = 0.0,
        faults: Sequence[str] = PASSING,
        seed: int = 0,
        log_path: str | Path | None = None,
    ) -> None:
        if unknown := {*faults} - {*FAULTS}:
            raise ValueError(f"unknown faults: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
        self.right_answer = answer or right_answer
        self.latency = latency
        self.fault_share, self.faults, self.seed = fault_share, tuple(faults), seed
        self.script: list[str | None] = []
        self.always: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.records: list[dict[str, Any]] = []
        self.keep = True
        self.hang_s: float | None = None
        self.drip_s, self.retry_after = 0.2, 1.0
        self.down_after: int | None = None
        self._arrived = 0
        self._asked: Counter[str] = Counter()
        self._log_file = None if log_path is None else open(log_path, "a", buffering=1)  # noqa: SIM115
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner: web.AppRunner
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(port), self._loop).result(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def calls(self) -> int:
        return len(self.requests)

    def close(self) -> None:
        """Cut all connections, hanging ones included; what they asked is logged as not answered."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        if self._log_file is not None:
            self._log_file.close()

    async def _start(self, port: int) -> int:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._answer)
        # A client that gives up takes its handler along; else hanging ones would pile up.
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        return self._runner.addresses[0][1]

    async def _stop(self) -> None:
        await self._runner.cleanup()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        messages, key = body["messages"], request.headers.get("Authorization")
        if self.keep:
            self.requests.append(body)
            self.keys.append(key)
        digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
        fault = self._fault(body, digest)
        record = {
            "task": task_of(messages),
            "sha256": digest,
            "fault": fault,
            "answered": False,
            "usage": None,
        }
        try:
            response = _at_the_door(fault, key, self.retry_after)
            if response is not None:
                await response.prepare(request)
                await response.write_eof()
                return response
            await asyncio.sleep(self.latency() if callable(self.latency) else self.latency)
            if fault == "hang":
                await asyncio.sleep(math.inf if self.hang_s is None else self.hang_s)
            reply = self._reply(body, fault)
            record["usage"] = reply["usage"]
            written = await self._write(request, fault, reply)
            record["answered"] = fault in _RIGHT_IN_THE_END
            return written
        finally:
            self._record({"time": time.time(), **record})

    def _fault(self, body: dict[str, Any], digest: str) -> str | None:
        self._arrived += 1
        self._asked[digest] += 1
        fault = None
        if self.down_after is not None and self._arrived > self.down_after:
            fault = "503"
        elif self.always or self.script:
            fault = self.always or self.script.pop(0)
        elif self.fault_share:
            rng = random.Random(f"{self.seed}/{digest}/{self._asked[digest]}")
            fault = rng.choice(self.faults) if rng.random() < self.fault_share else None
        if fault == "no_schema":
            return "400_schema" if "response_format" in body else None
        if fault is not None and fault not in FAULTS:
            raise ValueError(f"unknown fault {fault!r}")
        return fault

    def _reply(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        content, finish, refusal = spoil(fault, self.right_answer(question_of(body["messages"])))
        usage = self.usage(body["messages"], content or refusal or "")
        reply = {
            "id": f"chatcmpl-{self._arrived}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [
                {"index": 0, "message": message_of(fault, content, refusal), "finish_reason": finish}
            ],
            "usage": WRONG_USAGE.get(fault or "", usage),
        }
        return reply | ({"padding": "x" * 10_000_000} if fault == "huge" else {})

    async def _write(
        self, request: web.Request, fault: str | None, reply: dict[str, Any]
    ) -> web.StreamResponse:
        payload = json.dumps(reply).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if fault in ("zipped", "bomb"):
            payload = bomb() if fault == "bomb" else gzip.compress(payload)
            response.headers["Content-Encoding"] = "gzip"
        response.content_length = len(payload)
        await response.prepare(request)
        if fault == "reset":
            await response.write(payload[: len(payload) // 2])
            await asyncio.sleep(0.02)  # the client reads the headers before the connection is gone
            _reset(request)
            return response
        if fault == "drip":
            for i in range(len(payload)):
                await response.write(payload[i : i + 1])
                await asyncio.sleep(self.drip_s)
        else:
            await response.write(payload)
        await response.write_eof()
        return response

    def usage(self, messages: Messages, content: str) -> dict[str, Any]:
        """What the request is billed: four characters a token, and the tokens of its images."""
        tokens_in, tokens_out = self._prompt_tokens(messages), len(content) // 4
        total = tokens_in + tokens_out
        return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": total}

    def _prompt_tokens(self, messages: Messages) -> int:
        characters, tokens = 0, 0
        for message in messages:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    characters += len(part["text"])
                else:
                    image = part["image_url"]
                    tokens += gpt_4o_mini_image_tokens(*image_size(image["url"]), image.get("detail"))
        return tokens + characters // 4

    def _record(self, record: dict[str, Any]) -> None:
        if self.keep:
            self.records.append(record)
        if self._log_file is not None:
            self._log_file.write(json.dumps(record) + "\n")


def _at_the_door(fault: str | None, key: str | None, retry_after: float) -> web.Response | None:
    """What comes back without a look at the question; None for other faults."""
    if fault == "html":
        page = "<html><body><h1>502 Bad Gateway</h1></body></html>"
        return web.Response(text=page, content_type="text/html")
    if fault == "quota":
        error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
        return web.json_response({"error": error}, status=429)
    if fault == "400_schema":
        return web.json_response({"error": {"message": "response_format is not supported here"}}, status=400)
    if fault not in _STATUS:
        return None
    headers = {"Retry-After": f"{retry_after:g}"} if fault == "429_after" else None
    error = {"message": f"went wrong with {key or ''}"}
    return web.json_response({"error": error}, status=_STATUS[fault], headers=headers)


def _reset(request: web.Request) -> None:
    """Tear the connection down with a RST."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()


# ---- as a process


class ServerProcess:
    """A server in a process of its own, as `server_process` starts it.

    Attributes:
        url: for ``api_base``.
        log_path: where it logs, None if it does not.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, log_path: Path | None) -> None:
        self.process, self.url, self.log_path = process, url, log_path

    @property
    def port(self) -> int:
        return int(self.url.removesuffix("/v1").rpartition(":")[2])

    def log(self) -> list[dict[str, Any]]:
        """The log so far; a half-written last line is left out."""
        assert self.log_path is not None, "started without a log"
        text = self.log_path.read_text() if self.log_path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def stop(self) -> None:
        """End it, if it still runs; its log is complete then."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def server_process(**options: Any) -> Iterator[ServerProcess]:
    """A server that lives as long as the block.

    Args:
        options: as on the command line, such as ``fault_share=0.3``; None leaves
            one out. The server ends with this process, however that ends.

    Raises:
        RuntimeError: if it does not start.
    """
    log_path = Path(options["log"]).absolute() if options.get("log") else None
    given = {**options, "log": log_path}
    flags = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in given.items()
        if value is not None and value is not False
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.judge_server", "--with-parent", *flags],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    server = ServerProcess(process, url, log_path)
    try:
        if not url:
            raise RuntimeError(f"the judge server did not start (status {process.wait()})")
        yield server
    finally:
        server.stop()


def load(path: str) -> Any:
    """The object at the import path ``package.module.name``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def main(args: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.judge_server", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--port", type=int, default=0, help="0 for any")
    add("--answer", default="examples.shapes.oracle.answer", help="import path of the right answers")
    add("--fault-share", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--latency", type=float, default=0.0, help="seconds; the median with --latency-p99")
    add("--latency-p99", type=float, help="makes the latency log-normal")
    add("--log", type=Path, help="JSON-lines file, one line per request")
    add("--down-after", type=int, help="requests until the server is down for good")
    add("--with-parent", action="store_true", help="end when the standard input closes")
    options = parser.parse_args(args)

    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # the oracle imports litellm
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before threads start, which inherit it
    latency: float | Callable[[], float] = options.latency
    if options.latency_p99 is not None:
        latency = log_normal(options.latency, options.latency_p99, options.seed)
    server = JudgeServer(
        load(options.answer),
        port=options.port,
        latency=latency,
        fault_share=options.fault_share,
        seed=options.seed,
        log_path=options.log,
    )
    server.keep = False
    server.down_after = options.down_after
    if options.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    print(server.url, flush=True)
    signal.sigwait(ends)
    server.close()


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
