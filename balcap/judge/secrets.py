"""Keys come from the environment, never from a setting: settings stand in YAML files and in saved configs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from balcap.utils.redact import SHAPES, environment_secrets, keep_secret

_REFERENCE = re.compile(r"os\.environ/([A-Za-z_][A-Za-z0-9_]*)")
_SCHEME = re.compile(r"\s*(?:bearer|basic|token)?\s*", re.IGNORECASE)  # what may stand before a reference
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_ANYWHERE = {
    "apikey", "authorization", "bearer", "cookie", "credential", "credentials", "passphrase", "passwd",
    "password", "secret", "secrets",
}  # fmt: skip
_AT_THE_END = {"auth", "jwt", "key", "keys", "token"}  # a token count or a key's name end otherwise
_HARMLESS = {"bos_token", "eos_token", "pad_token", "prompt_cache_key", "stop_token"}
_PUBLIC = re.compile(r"/|~|\w+://(?![^/?#]*@)")  # variables with such values name places, not secrets
_MEND = "keys come from the environment; remove it, or write os.environ/<NAME> for the variable that holds it"


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
    return list(dict.fromkeys(_problems(settings, key, False, environment_secrets())))


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
            yield f"{key}: {_MEND}"
    elif named and value is not None and not isinstance(value, bool):
        yield f"{key}: {_MEND}"


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
    return _REFERENCE.sub(_value, settings) if isinstance(settings, str) else settings


def _value(reference: re.Match[str]) -> str:
    name = reference.group(1)
    if not os.environ.get(name):
        raise LookupError(f"{reference.group()} is not set in the environment")
    keep_secret([name])
    return os.environ[name]


def _speaks_of_a_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    if "_".join(words) in _HARMLESS or not words:
        return False
    return words[-1] in _AT_THE_END or not _ANYWHERE.isdisjoint(words)


def _is_secret(value: str, known: list[str]) -> bool:
    if SHAPES.search(value) or _in_url(value):
        return True
    return any(secret in value for secret in known if not _PUBLIC.match(secret))


def _in_url(value: str) -> bool:
    """Does a URL hold a user, a password, or a parameter named like a secret?"""
    if "://" not in value:
        return False
    try:
        url = urlsplit(value.strip())
        return "@" in url.netloc or any(_speaks_of_a_secret(name) for name, _ in parse_qsl(url.query))
    except ValueError:  # no URL after all
        return False
