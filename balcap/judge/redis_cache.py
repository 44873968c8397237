"""Judgments in Redis: one cache for the machines of a cluster. Where one machine is all, the file of `cache.py` does."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from balcap.judge.cache import BUSY_S, JudgmentCache
from balcap.judge.cache import describe as describe_file
from balcap.judge.errors import StoreError
from balcap.utils.redact import redact, secret_problems

logger = logging.getLogger(__name__)
T = TypeVar("T")

SCHEMES = ("redis://", "rediss://", "unix://")
ENVIRONMENT = "os.environ/"
TIMEOUT_S = 2.0
"""Seconds that a server may take. After a failure it is left alone for `BUSY_S`."""
ANSWERS = f"balcap:answers:{JudgmentCache.version}"
"""The hash that holds the answers: key of the question -> its answer's JSON."""


def is_redis(cache: str) -> bool:
    """Whether a ``model.judge.cache`` is a server and not a file: a URL, or ``os.environ/<NAME>``, which holds one."""
    return cache.startswith((*SCHEMES, ENVIRONMENT))


def open_cache(cache: str | None) -> JudgmentCache | RedisCache:
    """What ``model.judge.cache`` names; None keeps nothing. Raises `StoreError` if it cannot be used."""
    return RedisCache(cache) if cache and is_redis(cache) else JudgmentCache(cache)


def describe(cache: str) -> tuple[int, int]:
    """Answers in a cache, and its size in bytes; raises `StoreError` if it cannot be used."""
    if not is_redis(cache):
        return describe_file(cache)
    with contextlib.closing(RedisCache(cache)) as server:
        return server.describe()


class RedisCache:
    """As `JudgmentCache`, in a server that all processes of a job reach.

    What was put is in the server's memory when `put` returns; whether it survives the server's end is the server's
    setting (``appendonly yes``). While the server cannot be reached, nothing is found, and what is put waits.

    Args:
        cache: such as ``redis://host:6379/0``, or ``os.environ/<NAME>`` for a variable that holds a URL, also one with a
            password.

    Raises:
        StoreError: if the server cannot be reached, or holds something else in our place.
    """

    def __init__(self, cache: str) -> None:
        self.name = without_password(cache)
        self._client = _connected(cache)
        self._lock = threading.Lock()
        self._warned = False
        self._waiting: dict[str, str] = {}
        self._retry_at = 0.0

    @staticmethod
    def problem(cache: str) -> str | None:
        """What is wrong with it, worded with its key; None if it works. A password in the config itself is refused: configs,
        reports and model cards are shown to others."""
        if found := secret_problems(cache, "model.judge.cache"):
            return found[0]
        try:
            _connected(cache).close()
        except StoreError as error:
            return str(error)
        return None

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Those of `keys` that are there, with their answers' JSON."""
        if not keys:
            return {}
        with self._lock:
            waiting = {key: self._waiting[key] for key in keys if key in self._waiting}
            away = time.monotonic() < self._retry_at  # each question would wait for it
            found = None if away else self._tried("read", lambda: self._client.hmget(ANSWERS, list(keys)))
        there = {key: text for key, text in zip(keys, found or (), strict=False) if text is not None}
        return waiting | there

    def put(self, key: str, task: str, model: str, answer: str) -> None:
        """Keep `answer`, a JSON text, under `key`; `task` and `model` are not kept."""
        with self._lock:
            self._waiting[key] = answer
            if time.monotonic() >= self._retry_at:
                self._write()

    def describe(self) -> tuple[int, int]:
        """Answers, and their bytes in the server's memory, estimated by it; 0 where it cannot be reached."""
        with self._lock:
            answers = self._tried("read", lambda: self._client.hlen(ANSWERS))
            size = self._tried("read", lambda: self._client.memory_usage(ANSWERS))
        return answers or 0, size or 0

    def close(self) -> None:
        """Write what waits, and close the connection; safe to call twice."""
        with self._lock:
            self._write()
            if self._waiting:
                logger.warning("model.judge.cache: %d answers are not in %s", len(self._waiting), self.name)
                self._waiting.clear()
            self._client.close()

    def _write(self) -> None:
        if not self._waiting:
            return
        if self._tried("write", lambda: self._client.hset(ANSWERS, mapping=self._waiting)) is not None:
            self._waiting.clear()

    def _tried(self, verb: str, ask: Callable[[], T]) -> T | None:
        """What the server says; None after a failure, which is a warning, once."""
        from redis.exceptions import RedisError

        try:
            return ask()
        except RedisError as error:
            self._retry_at = time.monotonic() + BUSY_S
            if not self._warned:
                self._warned = True
                logger.warning("model.judge.cache: cannot %s %s (%s)", verb, self.name, error)
            return None


def without_password(cache: str) -> str:
    """For messages."""
    if cache.startswith(ENVIRONMENT):
        return cache
    parts = urlsplit(cache)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _connected(cache: str) -> Any:
    """A client whose server answers, and holds nothing else in our place."""
    with _unusable_if_it_fails(cache):
        url = cache
        if cache.startswith(ENVIRONMENT):
            name = cache.removeprefix(ENVIRONMENT)
            url = os.environ.get(name, "")
            if not url.startswith(SCHEMES):
                raise StoreError(f"the variable {name} holds no URL such as redis://host:6379/0")
        import redis

        timeouts = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        client: Any = redis.Redis.from_url(url, decode_responses=True, **timeouts)
        if (kind := client.type(ANSWERS)) not in ("none", "hash"):
            raise StoreError(f"its key {ANSWERS} is a {kind} of something else")
        return client


@contextlib.contextmanager
def _unusable_if_it_fails(cache: str) -> Iterator[None]:
    why = ""
    try:
        yield
        return
    except ImportError:
        why = 'the client is not installed: pip install -e ".[redis]"'
    except StoreError as error:
        why = str(error)
    except ValueError:  # its words may quote a part of the password
        why = "it is no URL of a server; a password in it must be percent-encoded"
    except Exception as error:  # redis has several families of errors
        why = redact(str(error)) or type(error).__name__
    message = f"model.judge.cache: {without_password(cache)} cannot be used as the judge's cache ({why}). "
    raise StoreError(f"{message}Start the server, name another one or a file, or set it to null.", why)
