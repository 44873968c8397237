"""Fences: what a caption says is data inside the prompt, never part of it."""

from __future__ import annotations

import json
import re
from typing import Any

# "<" and ">" close fences and open chat-template tokens (<|im_start|>, <image>). Control and format
# characters, line separators and lone surrogates can hide or reorder text, or break the request's
# encoding. All are legal in JSON as \u escapes, so nothing is lost.
_UNSAFE = re.compile(
    "[<>\x00-\x1f\x7f-\x9f\u00ad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def fence(tag: str, value: Any) -> str:
    """``<tag>``, `value` as one line of JSON, ``</tag>``.

    The JSON holds no ``<`` or ``>`` and no control character, so it cannot end its fence; ``json.loads``
    of the middle line gives `value` back.

    Args:
        tag: name of the fence: letters and underscores.
        value: anything that JSON can hold.
    """
    return f"<{tag}>\n{_UNSAFE.sub(_escape, json.dumps(value, ensure_ascii=False))}\n</{tag}>"


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    if character in "<>\x7f":  # ASCII, which json.dumps leaves as it is
        return f"\\u{ord(character):04x}"
    return json.dumps(character)[1:-1]
