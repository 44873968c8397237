"""From what a model wrote to the one JSON object that was asked for."""

from __future__ import annotations

import json
from typing import Any

from balcap.judge.errors import InvalidAnswer

_LONGEST = 400_000  # characters; more is a model that does not stop


def extract_json(text: str) -> dict[str, Any]:
    """The JSON object in `text`, alone or within prose, code fences or after ``</think>``.

    Raises:
        InvalidAnswer: if there is no complete object, or more than one.
    """
    if not text.lstrip().startswith("{"):  # else the words may be a caption's
        text = text.split("</think>", 1)[-1]
    if len(text) > _LONGEST:
        raise InvalidAnswer(f"the answer is {len(text)} characters long")
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            end = position + 1  # prose; or a broken object, whose inner objects then fail the schema
        except (ValueError, RecursionError):
            raise InvalidAnswer("the JSON of the answer is out of all measure") from None
        else:
            found.append(value)
        position = text.find("{", end)
    if not found:
        raise InvalidAnswer("the answer holds no complete JSON object")
    if len(found) > 1:
        raise InvalidAnswer(f"the answer holds {len(found)} JSON objects, one was asked for")
    return found[0]
