"""A judge that knows the truth: litellm provider ``shapes``, model ``shapes/oracle``.

It receives exactly the messages that any judge receives, reads the scene from the image's bytes, and
answers in the JSON that the task asks for. It is told nothing else: which task it is stands in the
first line of the system message, the data stands in the fences of the user message.
"""

from __future__ import annotations

import base64
import json
import re
from functools import lru_cache
from typing import Any

from litellm import CustomLLM, ModelResponse
from litellm.types.utils import Usage

from balcap.shapes.draw import scene_of
from balcap.shapes.fluency import rate
from balcap.shapes.language import covered, is_pointable, is_true, read_fact, read_facts, say
from balcap.shapes.scene import Scene

_FENCE = re.compile(r"<(\w+)>\n(.*?)\n</\1>", re.DOTALL)


@lru_cache(maxsize=4096)
def _scene(url: str) -> Scene:
    return scene_of(base64.b64decode(url.split(",", 1)[1]))


@lru_cache(maxsize=65536)
def _fact(text: str) -> tuple:
    return read_fact(text)


def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The oracle's answer to a judge's messages; ValueError where they hold no known task."""
    task = messages[0]["content"].split("\n", 1)[0].removeprefix("Task: ").strip()
    parts = messages[-1]["content"]
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    data = {tag: json.loads(body) for tag, body in _FENCE.findall(text)}
    if task == "decompose":
        return {"assertions": [say(fact) for fact in read_facts(data["caption"])]}
    if task == "verify":
        scene = next(_scene(part["image_url"]["url"]) for part in parts if part["type"] == "image_url")
        facts = [(item["id"], _fact(item["text"])) for item in data["assertions"]]
        return {
            "verdicts": [{"id": i, "true": is_true(f, scene), "pointable": is_pointable(f)} for i, f in facts]
        }
    if task == "match":
        stated = {_fact(item["text"]) for item in data["assertions"]}
        units = [(item["id"], _fact(item["text"])) for item in data["reference_units"]]
        return {"units": [{"id": i, "covered": covered(unit, stated)} for i, unit in units]}
    if task == "rate":
        names = ("clarity", "fluency", "coherency")
        scores = zip(names, rate(data["caption"]), strict=True)
        return {name: round(10 * score, 4) for name, score in scores}
    raise ValueError(f"shapes/oracle does not know the task {task!r}")


class Oracle(CustomLLM):
    """The litellm provider. It costs nothing and counts four characters as a token."""

    def _respond(self, messages: list[dict[str, Any]], response: ModelResponse) -> ModelResponse:
        content = json.dumps(answer(messages))
        response.choices[0].message.content = content
        response.choices[0].finish_reason = "stop"
        asked = sum(
            len(part.get("text", "")) if isinstance(part, dict) else len(part)
            for message in messages
            for part in ([message["content"]] if isinstance(message["content"], str) else message["content"])
        )
        usage = Usage(prompt_tokens=asked // 4, completion_tokens=len(content) // 4)
        usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
        response.usage = usage  # type: ignore[attr-defined]
        return response

    def completion(self, *args: Any, **kwargs: Any) -> ModelResponse:
        """See `litellm.completion`."""
        return self._respond(kwargs["messages"], kwargs["model_response"])

    async def acompletion(self, *args: Any, **kwargs: Any) -> ModelResponse:
        """See `litellm.acompletion`."""
        return self._respond(kwargs["messages"], kwargs["model_response"])
