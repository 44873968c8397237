"""Judgments on disk: an answer that was paid for is not paid for again.

The SQLite file only grows while runs use it; ``python main.py cache`` shows what is in it and prunes it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from balcap.judge.errors import StoreError

logger = logging.getLogger(__name__)

BUSY_S = 10.0
"""Seconds that a process waits for another one's transaction."""


class Store:
    """A SQLite file that several processes of a machine write at once, and that survives ``kill -9``.

    What was written is in the file when it returns. A power cut may lose the last rows but not the file.
    Write-ahead logs need shared memory: machines of a cluster use one file each, not one on a network share.

    Args:
        path: the file; it and its folder are made if they are missing. None keeps nothing.

    Attributes:
        setting: the key of its path under ``model.judge``, and what the file is called in messages.
        application_id: tells our file from any other SQLite file.
        version: of the table.
        table: the statement that makes it in an empty file.
        insert: the statement that writes a row.
        upgrades: version -> the statement that makes the table of the next version of it. Only who writes runs it.

    Raises:
        StoreError: if the file cannot be opened, or is something else.
    """

    setting: ClassVar[str]
    application_id: ClassVar[int]
    version: ClassVar[int]
    table: ClassVar[str]
    insert: ClassVar[str]
    upgrades: ClassVar[Mapping[int, str]] = {}

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else node_path(path)
        self._connection = None if self.path is None else self._connect_to_write(self.path)
        self._lock = threading.Lock()
        self._warned = False
        self._waiting: list[tuple[Any, ...]] = []
        """Rows that could not be written yet."""
        self._retry_at = 0.0

    @classmethod
    def _connect_to_write(cls, path: Path) -> sqlite3.Connection:
        connection = cls.connect(path)
        try:
            while cls._version_of(connection) != cls.version:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    if (found := cls._version_of(connection)) in cls.upgrades:  # not yet by another rank
                        connection.execute(cls.upgrades[found])
                        connection.execute(f"PRAGMA user_version = {found + 1}")
        except sqlite3.Error as error:
            connection.close()
            raise cls.unusable(path, str(error)) from None
        return connection

    @classmethod
    def connect(cls, path: Path) -> sqlite3.Connection:
        """A connection to the file, which is made, with its folder, if it is missing; raises `StoreError`."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as on_failure:
                connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
                on_failure.callback(connection.close)
                cls._prepare(connection)
                on_failure.pop_all()
            return connection
        except (OSError, sqlite3.Error) as error:
            raise cls.unusable(path, str(error)) from None

    @classmethod
    def problem(cls, path: str | Path) -> str | None:
        """What is wrong with `path`, worded with its key; None if it works or is not there yet. Makes nothing."""
        file = node_path(path).absolute()
        try:
            if file.exists():
                cls.connect(file).close()
                return None
            folder = next(parent for parent in file.parents if parent.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                raise cls.unusable(file, f"{folder} is not a folder that can be written")
        except StoreError as error:
            return str(error)
        return None

    @classmethod
    def unusable(cls, path: str | Path | None, why: str) -> StoreError:
        """The error for a person."""
        key = f"model.judge.{cls.setting}"
        message = f"{key}: {path} cannot be used as the judge's {cls.setting} ({why}). "
        return StoreError(f"{message}Name another file, move this one away, or set {key} to null.", why)

    @classmethod
    def _prepare(cls, connection: sqlite3.Connection) -> None:
        # The tables first: another rank may finish preparing the file between the two questions.
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application_id = connection.execute("PRAGMA application_id").fetchone()[0]
        if tables == 0 and application_id == 0:
            _write_ahead(connection)
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(cls.table)
                connection.execute(f"PRAGMA application_id = {cls.application_id}")
                connection.execute(f"PRAGMA user_version = {cls.version}")
        elif application_id != cls.application_id:
            raise sqlite3.DatabaseError("it is a database of something else")
        version = cls._version_of(connection)
        if version != cls.version and version not in cls.upgrades:
            raise sqlite3.DatabaseError(f"it has format {version}, this version reads format {cls.version}")
        connection.execute("PRAGMA synchronous = NORMAL")

    @staticmethod
    def _version_of(connection: sqlite3.Connection) -> int:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])

    def _write(self, row: tuple[Any, ...] | None = None) -> None:
        """Write a row, and those that failed before it: a file that is locked for long costs none of them."""
        if self._connection is None:
            return
        self._waiting += [] if row is None else [row]
        if self._waiting and (row is None or time.monotonic() >= self._retry_at):
            if self._run("write", self.insert, self._waiting, many=True) is None:
                self._retry_at = time.monotonic() + BUSY_S
            else:
                self._waiting.clear()

    def close(self) -> None:
        """Write what waits, and close the file; safe to call twice."""
        self._write()
        if self._waiting:
            logger.warning(
                "model.judge.%s: %d rows are not in %s", self.setting, len(self._waiting), self.path
            )
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _run(self, verb: str, sql: str, values: Sequence[Any], many: bool = False) -> list[Any] | None:
        """The rows that a statement gives; None without a file, or after a failure, which is a warning, once.

        With `many`, `values` are those of several runs of the statement.
        """
        with self._lock:
            if self._connection is None:
                return None
            try:
                with self._connection:
                    run = self._connection.executemany if many else self._connection.execute
                    return run(sql, values).fetchall()
            except sqlite3.Error as error:
                self._failed(verb, error)
                return None

    def _failed(self, verb: str, error: sqlite3.Error) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("model.judge.%s: cannot %s %s (%s)", self.setting, verb, self.path, error)


class JudgmentCache(Store):
    """Key -> the validated answer's JSON, and nothing else: no prompts, no captions' images, no keys."""

    setting, application_id, version = "cache", 0x62616C63, 2  # "balc"
    table = (
        "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, task TEXT NOT NULL, model TEXT NOT NULL,"
        " answer TEXT NOT NULL, at REAL NOT NULL DEFAULT 0) WITHOUT ROWID"
    )
    insert = "INSERT OR REPLACE INTO answers (key, task, model, answer, at) VALUES (?, ?, ?, ?, ?)"

    def get_many(self, keys: Sequence[str]) -> dict[str, str]:
        """Those of `keys` that are there, with their answers' JSON.

        Raises:
            StoreError: if the file turns out to be damaged.
        """
        query = "SELECT key, answer FROM answers WHERE key IN (SELECT value FROM json_each(?))"
        waiting = {key: answer for key, _, _, answer, _ in self._waiting if key in keys}
        return waiting | dict(self._run("read", query, [json.dumps(keys)]) or ())

    def put(self, key: str, task: str, model: str, answer: str) -> None:
        """Keep `answer`, a JSON text, under `key`; `task` and `model` are for people who look inside."""
        self._write((key, task, model, answer, time.time()))

    def _failed(self, verb: str, error: sqlite3.Error) -> None:
        if verb == "read" and not isinstance(error, sqlite3.OperationalError):
            raise self.unusable(self.path, str(error)) from None  # damaged: nothing would be remembered
        super()._failed(verb, error)


def describe(path: str | Path) -> tuple[int, int]:
    """Answers in the cache, and its size in bytes, the log that belongs to it included.

    Raises:
        StoreError: if it cannot be used.
    """
    file = node_path(path)
    with contextlib.closing(JudgmentCache.connect(file)) as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0], size_of(file)


def size_of(path: str | Path) -> int:
    """Bytes of a SQLite file with its write-ahead log."""
    parts = (Path(f"{path}{suffix}") for suffix in ("", "-wal"))
    return sum(part.stat().st_size for part in parts if part.exists())


def node_path(path: str | Path) -> Path:
    """`path`, with the number of the machine in its name on all machines of a cluster but the first.

    Reads what torchrun (``GROUP_RANK``) and SLURM (``SLURM_NODEID``) set, or ``NODE_RANK``.
    """
    plain = Path(path)
    for name in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID"):
        node = os.environ.get(name, "")
        if node.isdigit() and int(node):
            return plain.with_name(f"{plain.stem}.node{node}{plain.suffix}")
    return plain


def left_over(path: str | Path, machines: int) -> list[Path]:
    """Files of machines that a job of so many has no more, beside that of its first machine; on the others none."""
    plain, files = Path(path), []
    if node_path(plain) == plain:
        for file in plain.parent.glob(f"{glob.escape(plain.stem)}.node*{plain.suffix}"):
            node = file.stem.rpartition(".node")[2]
            files += [file] if node.isdigit() and int(node) >= machines else []
    return files


def _write_ahead(connection: sqlite3.Connection) -> None:
    # Ranks that start together switch the new file at once; SQLite does not wait by itself for this lock.
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
