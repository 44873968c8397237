"""What a pretended judge replies: right answers, wrong ones, how long they take and what they are billed."""

from __future__ import annotations

import gzip
import json
import math
import random
from base64 import b64decode
from collections.abc import Callable
from functools import cache, lru_cache
from io import BytesIO
from typing import Any

from balcap.judge.tasks import Decompose, Match, Rate, Rating, Verdict, Verify

Messages = list[dict[str, Any]]
Answer = Callable[[Messages], dict[str, Any]]


# ---- the right answers


def task_of(messages: Messages) -> str:
    """The kind of judgment, from the first line of the system message."""
    return messages[0]["content"].split("\n", 1)[0].removeprefix("Task: ").strip()


def said(message: dict[str, Any]) -> str:
    """The text of a message."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def data_of(messages: Messages, tag: str) -> Any:
    """What stands in the fence `tag` of the user's message."""
    text = said(next(message for message in messages if message["role"] == "user"))
    return json.loads(text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0])


def image_urls(messages: Messages) -> list[dict[str, Any]]:
    """The ``image_url`` of every image, ``detail`` included."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["image_url"] for parts in contents for part in parts if part["type"] == "image_url"]


def question_of(messages: Messages) -> Messages:
    """The first two messages: a repair repeats them before the answer that was wrong and what was wrong with it."""
    return messages[:2]


def right_answer(messages: Messages) -> dict[str, Any]:
    """Sentences are assertions; "not" makes one false, "calm" not pointable; units match word by word."""
    task = task_of(messages)
    if task == "decompose":
        texts = [caption["text"] for caption in data_of(messages, "captions")]
        return Decompose().encode([[t.strip() for t in text.split(".") if t.strip()] for text in texts])
    if task == "verify":
        assert image_urls(messages)[0]["url"].startswith("data:image/")
        texts = [assertion["text"] for assertion in data_of(messages, "assertions")]
        return Verify().encode([Verdict("not" not in text, "calm" not in text) for text in texts])
    if task == "match":
        units = [unit["text"] for unit in data_of(messages, "reference_units")]
        return Match().encode(
            [[unit in caption["assertions"] for unit in units] for caption in data_of(messages, "captions")]
        )
    assert task == "rate", task
    return Rate().encode([Rating(1.0, 0.5, 0.0)] * len(data_of(messages, "captions")))


# ---- the wrong ones

WRONG_USAGE: dict[str, Any] = {
    "usage_none": None,
    "usage_below": {"prompt_tokens": -1000, "completion_tokens": -1000, "total_tokens": -2000},
    "usage_text": {"prompt_tokens": "many", "completion_tokens": "few", "total_tokens": "?"},
    "usage_cached": {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 10_000},
    },
}


def spoil(fault: str | None, answer: dict[str, Any]) -> tuple[str | None, str, str | None]:
    """Content, finish reason and refusal of a message in which `fault` is what is wrong with `answer`.

    Raises:
        ValueError: if the fault needs a list of items with ids and `answer` holds none.
    """
    answer = json.loads(json.dumps(answer))  # our own copy
    text = json.dumps(answer)
    match fault:
        case "prose":
            return f"Sure! Here it is:\n```json\n{text}\n```\nHope that helps.", "stop", None
        case "thought":
            return f'<thought>Perhaps {{"id": 1}}?</thought>{text}', "stop", None
        case "loose":
            return f"{text[:-1]}, // as asked\n}}", "stop", None
        case "again":
            return f"{text}\n\n{text}", "stop", None
        case "truncated":
            return text[: len(text) // 2], "stop", None
        case "length":
            return text[: len(text) // 2], "length", None
        case "empty":
            return "", "stop", None
        case "refusal":
            return None, "stop", "I cannot help with that."
        case "filter":
            return "", "content_filter", None
        case "short":
            _items(answer).pop()
        case "unknown_id":
            items = _items(answer)
            items[0]["id"] = max(item["id"] for item in items) + 1
        case "twice":
            items = _items(answer)
            if len(items) == 1:
                items.append(dict(items[0]))
            else:
                items[0]["id"] = items[-1]["id"]
        case "out_of_range":
            first = _items(answer)[0]
            first.update({key: _out_of_range(value) for key, value in first.items() if key != "id"})
    return json.dumps(answer), "stop", None


def message_of(fault: str | None, content: str | None, refusal: str | None) -> dict[str, Any]:
    """The assistant's message; "reasoning" and "tool" put the content where few look for it."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal}
    if fault == "reasoning":
        return message | {"content": None, "reasoning_content": content}
    if fault == "tool":
        call = {"id": "1", "type": "function", "function": {"name": "json_tool_call", "arguments": content}}
        return message | {"content": None, "tool_calls": [call]}
    return message


@cache
def bomb() -> bytes:
    """100 MB of zeros, zipped to 100 KB."""
    return gzip.compress(b"0" * 100_000_000)


def _items(answer: dict[str, Any]) -> list[dict[str, Any]]:
    for value in answer.values():
        if isinstance(value, list) and value and all(isinstance(e, dict) and "id" in e for e in value):
            return value
    raise ValueError(f"no list of items with ids in {answer}")


def _out_of_range(value: Any) -> Any:
    """11 of 10 for a score, 2 for a bool, an id that no unit has; a number where texts belong."""
    if isinstance(value, bool):
        return 2
    if isinstance(value, list):
        numbers = all(isinstance(item, int) for item in value)
        return [*value, 1 + max(value, default=98)] if numbers else [11]
    return 11


# ---- how long it takes and what it is billed


def log_normal(median: float, p99: float, seed: int = 0) -> Callable[[], float]:
    """Draws of a log-normal latency in seconds with this median and 99th percentile."""
    if not 0 < median <= p99:
        raise ValueError(f"median {median} and p99 {p99} must be positive and in order")
    rng, sigma = random.Random(seed), math.log(p99 / median) / 2.3263478740
    return lambda: rng.lognormvariate(math.log(median), sigma)


def gpt_4o_mini_image_tokens(width: int, height: int, detail: str | None = None) -> int:
    """Tokens of one image: 2,833, and 5,667 per tile of 512 pixels unless `detail` is ``low``.

    Tiles are counted after fitting the image into 2,048 x 2,048 and its shorter side into 768:
    640 x 480 is 2 tiles, 2,833 + 2 * 5,667 = 14,167 tokens.
    """
    if detail == "low":
        return 2833
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    tiles = math.ceil(round(width * scale, 6) / 512) * math.ceil(round(height * scale, 6) / 512)
    return 2833 + 5667 * tiles


@lru_cache(maxsize=64)  # a picture comes with many questions
def image_size(url: str) -> tuple[int, int]:
    """Width and height of the picture in a ``data:`` URL."""
    from PIL import Image

    with Image.open(BytesIO(b64decode(url.partition(",")[2]))) as image:
        return image.size
