"""Right answers that are written down item by item, to see after a crash what was asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any

from examples.shapes.oracle import answer as oracle
from tests.judge_replies import data_of, image_urls, task_of


def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The oracle's answer; the items of the question go to the file named by ``ITEM_LOG``, one line per call."""
    given = oracle(messages)
    line = {"at": time.time(), "items": [f"{task_of(messages)} {digest}" for digest in _items(messages)]}
    with open(os.environ["ITEM_LOG"], "a") as file:
        file.write(json.dumps(line) + "\n")
    return given


def _items(messages: list[dict[str, Any]]) -> list[str]:
    task = task_of(messages)
    if task == "verify":
        about = image_urls(messages)[0]["url"]
        items = [item["text"] for item in data_of(messages, "assertions")]
    elif task == "match":
        about = data_of(messages, "reference_units")
        items = [item["assertions"] for item in data_of(messages, "captions")]
    else:
        about, items = "", [item["text"] for item in data_of(messages, "captions")]
    return [hashlib.sha256(json.dumps([about, item]).encode()).hexdigest() for item in items]
