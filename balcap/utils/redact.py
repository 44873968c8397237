"""Texts that are kept (reasons, warnings) carry no secrets."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import quote, quote_plus

LIMIT = 300  # characters of a text that is kept
_LONGEST = 20_000  # characters that are looked at; errors may quote a whole request
_SHORTEST = (
    8  # characters of a secret that is known by the name of its variable alone: TOKENIZERS_PARALLELISM=true
)
_SHORTEST_REFERENCED = 4
_SECRET_NAME = re.compile(r"key|token|secret|passw|passphrase|credential|auth|bearer|cookie", re.IGNORECASE)

SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"sk-[\w*.-]{4,}|(?:AKIA|ASIA)[0-9A-Z]{8,}|AIza[\w-]{10,}|ya29\.[\w-]{8,}|eyJ[\w-]{8,}\.[\w.-]{8,}"
    r"|(?:hf|gsk|ghp|gho|ghs|github_pat|r8|tgp_v1|fw)_\w{8,}|(?:xai|pplx|nvapi|glpat|csk)-[\w-]{8,}"
    r"|(?i:bearer)\s+[^\s'\"]{6,}"
    r"|(?i:authorization|x-api-key|api-key)['\"]*\s*[:=]\s*['\"]*(?:(?i:basic|token)\s+)?[^\s'\",}]+"
    r")"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|[?&](?i:key|api[_-]?key|token|access_token|subscription-key|sig|code)=[^\s&'\"]+"
)
"""What keys of well-known providers, credentials in headers and credentials in URLs look like."""

_referenced: set[str] = set()


def redact(text: str) -> str:
    """`text` on one line, at most 300 characters, without anything that looks like or is a secret.

    A secret is the value of an environment variable whose name speaks of a key, token, secret, password or
    credential, or that `keep_secret` was told of, plain or as base64, in a URL, in JSON or in Python's
    quotes; or a text of the shape of a well-known key.
    """
    text = " ".join(text.split())[:_LONGEST]
    for value in environment_secrets():
        for form in _forms(value):
            text = text.replace(form, "***")
    text = SHAPES.sub("***", text)
    return text if len(text) <= LIMIT else text[: LIMIT - 1] + "…"


def keep_secret(names: Iterable[str]) -> None:
    """Count the values of these environment variables as secrets, whatever they are called."""
    _referenced.update(names)


def environment_secrets() -> list[str]:
    """Values of the environment that are secrets, the longest first: one may be part of another."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= (_SHORTEST_REFERENCED if name in _referenced else _SHORTEST)
        and (name in _referenced or _SECRET_NAME.search(name))
    }
    return sorted(values, key=lambda value: (-len(value), value))


@lru_cache(maxsize=1024)
def _forms(secret: str) -> tuple[str, ...]:
    """How a secret may stand in an error text, the longest first."""
    quoted = (quote(secret), quote(secret, safe=""), quote_plus(secret))
    forms = {secret, " ".join(secret.split()), json.dumps(secret)[1:-1], repr(secret)[1:-1], *quoted}
    forms |= {re.sub("%[0-9A-F]{2}", lambda code: code.group().lower(), form) for form in quoted}
    for before in range(3):  # base64 of "user:secret" shifts the secret's bits by 0, 2 or 4
        core = _base64_core(secret.encode(errors="surrogateescape"), before)
        forms |= {core, core.replace("+", "-").replace("/", "_")} if len(core) >= _SHORTEST else set()
    return tuple(sorted((form for form in forms if form), key=lambda form: (-len(form), form)))


def _base64_core(secret: bytes, before: int) -> str:
    """The characters of the base64 of a text with `secret` in it, `before` bytes (mod 3) into it, that depend
    on nothing but the secret."""
    encoded = base64.b64encode(bytes(before) + secret).decode()
    return encoded[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
