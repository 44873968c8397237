"""A judge that can be right, wrong, late or absent: one set of answers behind a server and a provider."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import litellm
from aiohttp import web


def data_of(messages: list[dict[str, Any]], tag: str) -> Any:
    """What stands in the fence `tag` of the user message."""
    text = messages[1]["content"][-1]["text"]
    return json.loads(text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0])


def right_answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Sentences are assertions; "not" makes one false, "calm" not pointable; units match word by word."""
    task = messages[0]["content"].splitlines()[0].removeprefix("Task: ")
    if task == "decompose":
        return {"assertions": [s.strip() for s in data_of(messages, "caption").split(".") if s.strip()]}
    if task == "verify":
        assert messages[1]["content"][0]["image_url"]["url"].startswith("data:image/")
        return {
            "verdicts": [
                {"id": a["id"], "true": "not" not in a["text"], "pointable": "calm" not in a["text"]}
                for a in data_of(messages, "assertions")
            ]
        }
    if task == "match":
        said = {a["text"] for a in data_of(messages, "assertions")}
        return {
            "units": [
                {"id": u["id"], "covered": u["text"] in said} for u in data_of(messages, "reference_units")
            ]
        }
    assert task == "rate"
    return {"clarity": 10, "fluency": 5.0, "coherency": 0}


class JudgeServer:
    """An OpenAI-compatible server on loopback.

    `script` holds what to do wrong with the next requests, first come first served; when it is empty, and
    for None, the answer is right. `always` overrides it. `requests` keeps all request bodies.
    """

    def __init__(self, answer: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None) -> None:
        self.right_answer = answer or right_answer
        self.script: list[str | None] = []
        self.always: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner: web.AppRunner
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def calls(self) -> int:
        return len(self.requests)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> int:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self._runner.addresses[0][1]

    async def _stop(self) -> None:
        await self._runner.cleanup()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization"))
        fault = self.always or (self.script.pop(0) if self.script else None)
        if fault == "no_schema":
            fault = "400_schema" if "response_format" in body else None
        errors = {"429": 429, "500": 500, "503": 503, "401": 401, "400": 400, "404": 404}
        if fault in errors:
            key = request.headers.get("Authorization", "")
            return web.json_response({"error": {"message": f"went wrong with {key}"}}, status=errors[fault])
        if fault == "quota":
            error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
            return web.json_response({"error": error}, status=429)
        if fault == "400_schema":
            return web.json_response(
                {"error": {"message": "response_format is not supported here"}}, status=400
            )
        if fault == "hang":
            await asyncio.sleep(5)
        content, finish, refusal = self._wrong(fault, self.right_answer(body["messages"]))
        message = {"role": "assistant", "content": content, "refusal": refusal}
        return web.json_response(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
            }
        )

    @staticmethod
    def _wrong(fault: str | None, answer: dict[str, Any]) -> tuple[str | None, str, str | None]:
        text = json.dumps(answer)
        items = next(iter(answer.values()))
        if fault == "prose":
            return f"Sure! Here it is:\n```json\n{text}\n```\nHope that helps.", "stop", None
        if fault == "truncated":
            return text[: len(text) // 2], "stop", None
        if fault == "length":
            return text[: len(text) // 2], "length", None
        if fault == "short":
            return json.dumps({key: value[:-1] for key, value in answer.items()}), "stop", None
        if fault == "unknown_id":
            items[0]["id"] = 99
            return json.dumps(answer), "stop", None
        if fault == "twice":
            items[0]["id"] = items[-1]["id"]
            return json.dumps(answer), "stop", None
        if fault == "out_of_range":
            return json.dumps({**answer, "clarity": 11}), "stop", None
        if fault == "empty":
            return "", "stop", None
        if fault == "refusal":
            return None, "stop", "I cannot help with that."
        if fault == "filter":
            return "", "content_filter", None
        return text, "stop", None


class Provider(litellm.CustomLLM):
    """The right answers, in this process."""

    calls = 0

    async def acompletion(self, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        response = kwargs["model_response"]
        response.choices[0].message.content = json.dumps(right_answer(kwargs["messages"]))
        response.usage = litellm.Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15)
        return response


class NotAProvider:
    """Not a subclass of `litellm.CustomLLM`."""
