"""Right answers that are written down item by item, to see after a crash what was asked twice.

No times are compared: a server on a busy machine may answer a request after the client that sent it has died.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from examples.shapes.oracle import answer as oracle
from tests.judge_replies import data_of, image_urls, task_of


def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The oracle's answer; the items of the question go to the file named by ``ITEM_LOG``, one line per call."""
    given = oracle(messages)
    line = [f"{task_of(messages)} {digest}" for digest in _items(messages)]
    with open(os.environ["ITEM_LOG"], "a") as file:
        file.write(json.dumps(line) + "\n")
    return given


def calls(log: Path) -> list[list[str]]:
    """The items of each call that was answered, in the order of the answers."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def lost(calls: list[list[str]]) -> set[int]:
    """Which calls were paid for nothing: those with an item that a later call asks again."""
    found: set[int] = set()
    latest: dict[str, int] = {}
    for index, items in enumerate(calls):
        found |= {latest[item] for item in items if item in latest}
        latest |= dict.fromkeys(items, index)
    return found


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
