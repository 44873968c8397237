"""Secrets come from the environment alone: kept texts carry none (`redact`), settings only refer to them (`resolve`)."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

_LIMIT = 300  # characters of a text that is kept
_LONGEST = 20_000  # characters that are looked at; errors may quote a whole request
_SHORTEST = 8  # characters of a secret known by its variable's name alone: TOKENIZERS_PARALLELISM=true
_SHORTEST_KNOWN = 4
_SECRET_NAME = re.compile(r"key|token|secret|passw|passphrase|credential|auth|bearer|cookie", re.IGNORECASE)

_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"sk-[\w*.-]{4,}|(?:AKIA|ASIA)[0-9A-Z]{8,}|AIza[\w-]{10,}|ya29\.[\w-]{8,}|eyJ[\w-]{8,}\.[\w.-]{8,}"
    r"|(?:hf|gsk|ghp|gho|ghs|github_pat|r8|tgp_v1|fw)_\w{8,}|(?:xai|pplx|nvapi|glpat|csk)-[\w-]{8,}"
    r"|(?i:bearer)\s+[^\s'\"]{6,}"
    r"|(?i:authorization|x-api-key|api-key)['\"]*\s*[:=]\s*['\"]*(?:(?i:basic|token)\s+)?[^\s'\",}]+"
    r")"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|[?&](?i:key|api[_-]?key|token|access_token|subscription-key|sig|code)=[^\s&'\"]+"
)
"""What keys of well-known providers, credentials in headers and credentials in URLs look like."""

_REFERENCE = re.compile(r"os\.environ/([A-Za-z_][A-Za-z0-9_]*)")
_SCHEME = re.compile(r"\s*(?:bearer|basic|token)?\s*", re.IGNORECASE)  # what may stand before a reference
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_ANYWHERE = re.compile("apikey|authorization|bearer|cookie|credentials?|passphrase|passwd|password|secrets?")
_AT_THE_END = {"auth", "jwt", "key", "keys", "token"}  # a token count or a key's name end otherwise
_HARMLESS = {"bos_token", "eos_token", "pad_token", "prompt_cache_key", "stop_token"}
_USER = re.compile(r"://[^/?#\s]*@")  # of a URL
_PARAMETER = re.compile(r"[?&]([^\s=&#]+)=[^\s&#]")  # of a URL, with a value
_PUBLIC = re.compile(r"/|~|\w+://(?![^/?#]*@)")  # variables with such values name places, not secrets
_FIX = "keys come from the environment; remove it, or write os.environ/<NAME> for the variable that holds it"

_referenced: set[str] = set()


def redact(text: str) -> str:
    """`text` on one line, at most 300 characters, without secrets (`secret_filter`)."""
    text = (
        secret_filter()(" ".join(text.split())[:_LONGEST]).encode(errors="replace").decode()
    )  # files are UTF-8
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"


def secret_filter() -> Callable[[str], str]:
    """A function that puts ``***`` in the place of anything in a text that looks like or is a secret.

    A secret is the value of an environment variable, as it is now, whose name speaks of a key, token, secret, password or
    credential, or that `keep_secret` was given, plain or as base64, in a URL, in JSON or in Python's
    quotes; or a text of the shape of a well-known key.
    """
    forms = [form for value in _environment_secrets() for form in _forms(value)]

    def clean(text: str) -> str:
        for form in forms:
            text = text.replace(form, "***")
        return _SHAPES.sub("***", text)

    return clean


def keep_secret(names: Iterable[str]) -> None:
    """Count the values of these environment variables as secrets, whatever they are called."""
    _referenced.update(names)


def _environment_secrets() -> list[str]:
    """Values of the environment that are secrets, the longest first: one may be part of another."""
    variables = os.environ.items()
    referenced = {text for name, text in variables if name in _referenced and len(text) >= _SHORTEST_KNOWN}
    named = {value for name, value in variables if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    return sorted(referenced | named, key=len, reverse=True)


@lru_cache(maxsize=1024)
def _forms(secret: str) -> list[str]:
    """How a secret may stand in an error text."""
    raw = secret.encode(errors="surrogateescape")
    quoted = (quote(secret), quote(secret, safe=""), quote_plus(secret))
    forms = {secret, " ".join(secret.split()), json.dumps(secret)[1:-1], repr(secret)[1:-1], *quoted}
    forms |= {re.sub("%[0-9A-F]{2}", lambda code: code.group().lower(), form) for form in quoted}
    for before in range(3):  # base64 of "user:secret" shifts the secret's bits by 0, 2 or 4
        encoded = base64.b64encode(bytes(before) + raw).decode()
        # the characters that depend on nothing but the secret
        core = encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        forms |= {core, core.replace("+", "-").replace("/", "_")} if len(core) >= _SHORTEST else set()
    return sorted(forms - {""}, key=len, reverse=True)


# ---- settings


def secret_problems(settings: Any, key: str) -> list[str]:
    """What in `settings` is a secret, or looks like one: one message per place, none quotes it.

    A secret is a value under a name that speaks of a key, token, secret, password, credential or
    authorization; credentials in a URL; a text of the shape of a well-known key; and what the environment
    holds under such a name. A reference ``os.environ/NAME``, alone or after ``Bearer``, is no secret, but the
    variable must be set.

    Args:
        settings: parameters of a judge: mappings and lists to any depth.
        key: where they stand, such as ``model.judge.params``.
    """
    return list(dict.fromkeys(_problems(settings, key, False, _environment_secrets())))


def _problems(value: Any, key: str, named: bool, known: list[str]) -> Iterator[str]:
    """`named`: a name above `value` speaks of a secret."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _problems(inner, f"{key}.{name}", named or _speaks_of_a_secret(str(name)), known)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _problems(inner, key, named, known)
    elif isinstance(value, str):
        for name in _REFERENCE.findall(value):
            if not os.environ.get(name):
                yield f"{key}: needs {name} in the environment"
        plain = _REFERENCE.sub("", value)
        is_reference = plain != value and _SCHEME.fullmatch(plain)
        if not is_reference and ((named and value) or _is_secret(plain, known)):
            yield f"{key}: {_FIX}"
    elif named and value is not None and not isinstance(value, bool):
        yield f"{key}: {_FIX}"


def resolve(settings: Any) -> Any:
    """A copy of `settings` in which every ``os.environ/NAME`` is the value of that variable.

    For the moment of a call: what is kept (cache keys, ledger, saved config) is made of the references. The
    values count as secrets for `redact` from then on.

    Raises:
        LookupError: naming a variable that is not set.
    """
    if isinstance(settings, Mapping):
        return {name: resolve(inner) for name, inner in settings.items()}
    if isinstance(settings, list | tuple):
        return [resolve(inner) for inner in settings]
    if not isinstance(settings, str):
        return settings
    names = _REFERENCE.findall(settings)
    if missing := [name for name in names if not os.environ.get(name)]:
        raise LookupError(f"os.environ/{missing[0]} is not set in the environment")
    keep_secret(names)
    return _REFERENCE.sub(lambda reference: os.environ[reference.group(1)], settings)


def _speaks_of_a_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    named = bool(words) and (words[-1] in _AT_THE_END or any(map(_ANYWHERE.fullmatch, words)))
    return named and "_".join(words) not in _HARMLESS


def _is_secret(value: str, known: list[str]) -> bool:
    """Does a text hold a known secret, the shape of one, or a URL with a user, a password or a secret parameter?"""
    parameters = _PARAMETER.findall(value) if "://" in value else []
    if _USER.search(value) or any(map(_speaks_of_a_secret, parameters)):
        return True
    return bool(_SHAPES.search(value)) or any(s in value for s in known if not _PUBLIC.match(s))
