"""A question to a judge: which task, about what, asked of whom; and its keys in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from balcap.judge.images import ImagePolicy, image_url
from balcap.judge.tasks.base import Message, Schema, Task

# Where a model is reached, not what it answers: no part of a key, so that a server may move.
CONNECTION = {"api_base", "base_url", "api_key", "api_version", "organization", "extra_headers", "timeout"}


@dataclass(frozen=True)
class Route:
    """One judge: a model with its parameters.

    Attributes:
        model: litellm model string.
        params: what is passed to litellm beside the messages.
    """

    model: str
    params: Mapping[str, Any] = field(hash=False)

    @cached_property
    def name(self) -> str:
        """Distinct for distinct models and parameters."""
        return f"{self.model} {_digest(dict(self.params))[:12]}"

    @cached_property
    def content(self) -> dict[str, Any]:
        """The parameters that an answer depends on."""
        return {name: value for name, value in self.params.items() if name not in CONNECTION}


@dataclass(frozen=True)
class Question:
    """A task in its context, to be asked about items.

    Attributes:
        task: the kind of judgment.
        context: what its `messages` takes beside the items.
        routes: who is asked, the others where the first fails.
        images: how images are sent.
    """

    task: Task[Any]
    context: Mapping[str, Any]
    routes: Sequence[Route]
    images: ImagePolicy

    def keys(self, piece: Sequence[Any]) -> list[str]:
        """Keys under which the answers to these items may be stored, one per route.

        SHA-256 over model, parameters, task, its version (which stands for prompt and schema), context
        (images by the SHA-256 of their file) and what identifies the items.
        """
        about = [self.task.identity(item) for item in piece]
        return [_digest([route.model, route.content, *self._fixed, about]) for route in self.routes]

    @cached_property
    def _fixed(self) -> list[Any]:
        context = {
            name: _image_digest(value) if isinstance(value, bytes) else value
            for name, value in self.context.items()
        }
        return [self.task.name, self.task.version, context, repr(self.images) if self.shows_image else ""]

    @property
    def shows_image(self) -> bool:
        """Whether an image is part of the context."""
        return any(isinstance(value, bytes) for value in self.context.values())

    def messages(self, items: Sequence[Any]) -> list[Message]:
        """The chat as `Task.messages` writes it."""
        return self.task.messages(items, **self.context)


def wire(messages: Sequence[Message], images: ImagePolicy, provider: str) -> list[Message]:
    """The chat as a provider takes it: images as ``data:`` URLs under the policy.

    Raises:
        ImageError: if an image cannot be decoded, or not be made to fit.
    """
    detail = images.detail_for(provider)

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] != "image":
            return given
        url = {"url": image_url(given["image"], images)}
        return {"type": "image_url", "image_url": url if detail is None else {**url, "detail": detail}}

    return [
        {**message, "content": [part(given) for given in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@lru_cache(maxsize=64)  # a group asks about the same image again and again; Python keeps the hash of bytes
def _image_digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


@lru_cache(maxsize=64)
def response_format(task: str, schema: type[Schema]) -> dict[str, Any]:
    """The OpenAI strict structured-output setting for `schema`."""
    form = {"name": task, "strict": True, "schema": schema.model_json_schema()}
    return {"type": "json_schema", "json_schema": form}
