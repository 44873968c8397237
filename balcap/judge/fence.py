"""Fences: what a caption says is data inside the prompt, never part of it."""

from __future__ import annotations

import json
import re
from typing import Any

# Angle brackets close fences, and with square brackets and bars they write the special tokens of chat
# templates: <|im_start|>, <start_of_turn>, <<SYS>>, [INST], <｜User｜>, ]~b]. Their full-width and small forms
# become them under Unicode normalisation. Control and format characters, line separators, lone surrogates
# and everything that shows as nothing can hide or reorder text, carry a message that no reader sees, or break
# the request's encoding. All are legal in JSON as \u escapes, so nothing is lost.
_UNSAFE = re.compile(
    "[][<>|\ufe47\ufe48\ufe64\ufe65\uff1c\uff1e\uff3b\uff3d\uff5c"  # brackets and bars
    "\x00-\x1f\x7f-\x9f"  # control
    "\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # format
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff"  # shown as nothing
    "\u2028\u2029"  # line separators
    "\ud800-\udfff]"  # half a character
)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')  # within JSON, whose own brackets must stay


def fence(tag: str, value: Any) -> str:
    """``<tag>``, `value` as one line of JSON, ``</tag>``.

    No string in the JSON holds an angle or square bracket, a bar, a control or an invisible character, so it
    can neither end its fence nor spell a special token of a chat template; ``json.loads`` of the middle line
    gives `value` back. (Two surrogates that stand side by side are one character in JSON, and come back so.)

    Args:
        tag: name of the fence: letters and underscores.
        value: anything that JSON can hold.

    Raises:
        ValueError: for NaN and infinity, which JSON does not know.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"<{tag}>\n{_STRING.sub(_escape_string, text)}\n</{tag}>"


def _escape_string(match: re.Match[str]) -> str:
    return _UNSAFE.sub(_escape, match.group())


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1] if not match.group().isascii() else f"\\u{ord(match.group()):04x}"
