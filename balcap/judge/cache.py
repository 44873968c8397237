"""Judgments on disk: an answer that was paid for is not paid for again.

One SQLite file, shared by the processes of a machine: write-ahead log, so readers and a writer do not wait
for each other, and a process that is killed at any moment leaves a usable file. Write-ahead logs need
shared memory: machines of a cluster use one file each, not one on a network share.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from balcap.judge.errors import CacheError

logger = logging.getLogger(__name__)

APPLICATION_ID = 0x62616C63  # "balc": tells our file from any other SQLite file
SCHEMA_VERSION = 1
_BUSY_S = 30.0


class JudgmentCache:
    """Key -> the validated answer's JSON, and nothing else: no prompts, no captions' images, no keys.

    `put` returns at once; a thread commits what has gathered while the last commit was running, so an
    answer is safe from ``kill -9`` of the process a few milliseconds later. A power cut may lose the last
    commits but not the file.

    Args:
        path: the file; it and its folder are made if they are missing. None keeps nothing.

    Raises:
        CacheError: if the file cannot be opened or is not a cache of judgments.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[str, str, str]] = {}
        self._writing = False
        self._warned = False
        self._reader: sqlite3.Connection | None = None
        if self.path is not None:
            self._reader = _open(self.path)
            self._writer = _open(self.path)
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="balcap-judge-cache")

    def get(self, key: str) -> str | None:
        """The answer's JSON, or None.

        Raises:
            CacheError: if the file turns out to be damaged.
        """
        if self._reader is None:
            return None
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is not None:
                return waiting[2]
            try:
                row = self._reader.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            except sqlite3.OperationalError as error:
                self._warn("read", error)
                return None
            except sqlite3.DatabaseError as error:
                raise _unusable(self.path, str(error)) from None
        return None if row is None else row[0]

    def put(self, key: str, task: str, model: str, answer: str) -> None:
        """Keep `answer`, a JSON text, under `key`; `task` and `model` are for people who look inside."""
        if self._reader is None:
            return
        with self._lock:
            self._waiting[key] = (task, model, answer)
            if not self._writing:
                self._writing = True
                self._thread.submit(self._write)

    def close(self) -> None:
        """Write what is waiting and close the file; safe to call twice."""
        if self._reader is None:
            return
        self._thread.shutdown(wait=True)
        self._writer.close()
        with self._lock:
            self._reader.close()
            self._reader = None

    def _write(self) -> None:
        while True:
            with self._lock:
                batch = dict(self._waiting)
                if not batch:
                    self._writing = False
                    return
            try:
                with self._writer:
                    self._writer.executemany(
                        "INSERT OR REPLACE INTO answers (key, task, model, answer) VALUES (?, ?, ?, ?)",
                        [(key, *row) for key, row in batch.items()],
                    )
            except sqlite3.Error as error:
                self._warn("write", error)
            with self._lock:
                for key, row in batch.items():
                    if self._waiting.get(key) is row:
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
        _open(Path(path)).close()
    except CacheError as error:
        return str(error)
    return None


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, f"its folder cannot be made: {error.strerror}") from None
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
        _prepare(connection)
    except (sqlite3.Error, CacheError) as error:
        if connection is not None:
            connection.close()
        raise _unusable(path, str(error)) from None
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    # The tables first: another rank may finish preparing the file between the two questions.
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    if tables == 0 and found == 0:
        _write_ahead(connection)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, task TEXT NOT NULL,"
                " model TEXT NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif found != APPLICATION_ID:
        raise CacheError("it is a database of something else")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise CacheError(f"it has format {version}, this version of balcap reads format {SCHEMA_VERSION}")
    connection.execute("PRAGMA synchronous = NORMAL")


def _write_ahead(connection: sqlite3.Connection) -> None:
    # Ranks that start together switch the new file at once; SQLite does not wait by itself for this lock.
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _unusable(path: str | os.PathLike[str] | None, why: str) -> CacheError:
    return CacheError(
        f"model.judge.cache: {path} cannot be used as a cache of judgments ({why}). "
        "Name another file, move this one away, or set model.judge.cache to null."
    )
