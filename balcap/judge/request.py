"""One question to a judge and its key in the cache."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from balcap.judge.tasks.base import Message, Schema


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        task: name of the task.
        version: version of the task.
        model: litellm model string.
        params: what is passed to litellm beside the messages.
        messages: the chat.
        schema: the form of the answer.
    """

    task: str
    version: str
    model: str
    params: Mapping[str, Any] = field(hash=False)
    messages: list[Message] = field(hash=False)
    schema: type[Schema]

    @cached_property
    def key(self) -> str:
        """SHA-256 over the above, images as their SHA-256; the version stands for the schema."""
        content = [self.model, self.task, self.version, self.params, _without_images(self.messages)]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _without_images(messages: list[Message]) -> list[Message]:
    return [
        {**message, "content": [_without_image(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _without_image(part: dict[str, Any]) -> dict[str, Any]:
    return {"image_sha256": _digest(part["image_url"]["url"])} if part["type"] == "image_url" else part


@lru_cache(maxsize=32)  # the questions of a group share one URL object, whose hash Python keeps
def _digest(url: str) -> str:
    return hashlib.sha256(base64.b64decode(url.partition(",")[2])).hexdigest()


@lru_cache(maxsize=64)
def response_format(task: str, schema: type[Schema]) -> dict[str, Any]:
    """The OpenAI strict structured-output setting for `schema`."""
    form = {"name": task, "strict": True, "schema": schema.model_json_schema()}
    return {"type": "json_schema", "json_schema": form}
