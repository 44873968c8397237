"""Judges for the tests of this room: the server with a fixed bill, and providers in this process."""

from __future__ import annotations

import json
from typing import Any

import litellm

from tests import judge_server
from tests.judge_replies import data_of, right_answer

__all__ = ["JudgeServer", "NotAProvider", "Provider", "data_of", "right_answer"]


class JudgeServer(judge_server.JudgeServer):
    """`tests.judge_server.JudgeServer`, which bills 1,000 tokens in and 100 out for everything."""

    def usage(self, messages: list[dict[str, Any]], content: str) -> dict[str, Any]:
        return {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


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
