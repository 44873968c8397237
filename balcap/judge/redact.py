"""Texts that are kept (reasons, warnings) carry no secrets."""

from __future__ import annotations

import os
import re

_LIMIT = 300
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_SHAPES = re.compile(
    r"sk-[\w*.-]{4,}|Bearer\s+[^\s'\"]+|AKIA[0-9A-Z]{8,}|AIza[\w-]{10,}|hf_\w{8,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?<=[?&]key=)[\w-]+"
)


def redact(text: str) -> str:
    """`text` on one line, at most 300 characters, without anything that looks like or is a secret.

    A secret is the value of an environment variable whose name speaks of a key, token, secret, password
    or credential, or a text of the shape of a well-known key.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    text = " ".join(_SHAPES.sub("***", text).split())
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"
