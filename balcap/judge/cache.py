"""Judgments on disk: an answer that was paid for is not paid for again.

One SQLite file, shared by the processes of a machine (`balcap.judge.store`). It only grows while runs use
it; ``python main.py cache`` shows what is in it and prunes it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from balcap.judge.errors import CacheError
from balcap.judge.store import Format, Statement, Unusable, Writer, node_path, open_store

logger = logging.getLogger(__name__)

FORMAT = Format(
    name="a cache of judgments",
    application_id=0x62616C63,  # "balc"
    version=2,
    tables=(
        "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, task TEXT NOT NULL, model TEXT NOT NULL,"
        " answer TEXT NOT NULL, at REAL NOT NULL DEFAULT 0) WITHOUT ROWID",
    ),
    upgrades={1: ("ALTER TABLE answers ADD COLUMN at REAL NOT NULL DEFAULT 0",)},
)
_PUT = "INSERT OR REPLACE INTO answers (key, task, model, answer, at) VALUES (?, ?, ?, ?, ?)"
_AT_ONCE = 500  # keys per query; SQLite takes 999 in its older versions


class JudgmentCache:
    """Key -> the validated answer's JSON, and nothing else: no prompts, no captions' images, no keys.

    `put` returns at once; what it was given can be read at once, and is on disk a few milliseconds later.

    Args:
        path: the file; it and its folder are made if they are missing. None keeps nothing.

    Raises:
        CacheError: if the file cannot be opened or is not a cache of judgments.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(node_path(str(path)))
        self._lock = threading.Lock()
        self._waiting: dict[str, str] = {}
        self._warned = False
        self._reader: sqlite3.Connection | None = None
        if self.path is not None:
            self._reader = _open(self.path)
            self._writer = Writer(_open(self.path), self._written, lambda error: self._warn("write", error))

    def get(self, key: str) -> str | None:
        """The answer's JSON, or None; errors as `get_many`."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Those of `keys` that are there, with their answers' JSON.

        Raises:
            CacheError: if the file turns out to be damaged.
        """
        found: dict[str, str] = {}
        if self._reader is None:
            return found
        with self._lock:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                try:
                    rows = self._reader.execute(
                        f"SELECT key, answer FROM answers WHERE key IN ({marks})", tuple(some)
                    ).fetchall()
                except sqlite3.OperationalError as error:
                    self._warn("read", error)
                    rows = []
                except sqlite3.DatabaseError as error:
                    raise _unusable(self.path, str(error)) from None
                found.update(rows)
            found.update((key, self._waiting[key]) for key in keys if key in self._waiting)
        return found

    def put(self, key: str, task: str, model: str, answer: str) -> None:
        """Keep `answer`, a JSON text, under `key`; `task` and `model` are for people who look inside."""
        if self._reader is None:
            return
        with self._lock:
            self._waiting[key] = answer
        self._writer.put((_PUT, (key, task, model, answer, time.time())))

    def close(self) -> None:
        """Write what is waiting and close the file; safe to call twice."""
        if self._reader is None:
            return
        self._writer.close()
        with self._lock:
            self._reader.close()
            self._reader = None

    def _written(self, batch: Sequence[Statement]) -> None:
        with self._lock:
            for _, (key, _, _, answer, _) in batch:
                if self._waiting.get(key) is answer:
                    del self._waiting[key]

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "model.judge.cache: cannot %s %s (%s); judgments that are not stored are asked again",
                what,
                self.path,
                error,
            )


def cache_problem(path: str | Path) -> str | None:
    """What is wrong with `path` as a cache, worded with its key; None if it works. Makes its folder."""
    try:
        _open(Path(node_path(str(path)))).close()
    except CacheError as error:
        return str(error)
    return None


def describe(path: str | Path) -> tuple[int, int]:
    """Answers in the file, and its size in bytes, the log that belongs to it included.

    Raises:
        CacheError: if it cannot be used.
    """
    file = Path(node_path(str(path)))
    connection = _open(file)
    try:
        answers = connection.execute("SELECT count(*) FROM answers").fetchone()[0]
    finally:
        connection.close()
    sizes = (Path(f"{file}{suffix}") for suffix in ("", "-wal"))
    return answers, sum(part.stat().st_size for part in sizes if part.exists())


def _open(path: Path) -> sqlite3.Connection:
    try:
        return open_store(path, FORMAT)
    except Unusable as error:
        raise _unusable(path, str(error)) from None


def _unusable(path: str | os.PathLike[str] | None, why: str) -> CacheError:
    return CacheError(
        f"model.judge.cache: {path} cannot be used as a cache of judgments ({why}). "
        "Name another file, move this one away, or set model.judge.cache to null."
    )
