"""SQLite files that several processes of a machine write at once, and that survive ``kill -9``.

Write-ahead log: readers and a writer do not wait for each other, and a process that is killed at any moment
leaves a usable file. Write-ahead logs need shared memory: machines of a cluster use one file each, not one
on a network share (`node_path`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUSY_S = 30.0
Statement = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Format:
    """What a file is.

    Attributes:
        name: what it is called in messages, such as "a cache of judgments".
        application_id: tells our file from any other SQLite file.
        version: of the tables.
        tables: statements that make them in an empty file.
        upgrades: version -> statements that bring a file of that version to the next.
    """

    name: str
    application_id: int
    version: int
    tables: tuple[str, ...]
    upgrades: dict[int, tuple[str, ...]]


class Unusable(Exception):
    """The file cannot serve; the message says why."""


def open_store(path: Path, form: Format) -> sqlite3.Connection:
    """A connection to the file, which is made, with its folder, if it is missing.

    Raises:
        Unusable: if it cannot be opened, or is something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"its folder cannot be made: {error.strerror}") from None
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
        _prepare(connection, form)
    except (sqlite3.Error, Unusable) as error:
        if connection is not None:
            connection.close()
        raise Unusable(str(error)) from None
    return connection


def _prepare(connection: sqlite3.Connection, form: Format) -> None:
    # The tables first: another rank may finish preparing the file between the two questions.
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    if tables == 0 and found == 0:
        _write_ahead(connection)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for statement in form.tables:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {form.application_id}")
            connection.execute(f"PRAGMA user_version = {form.version}")
    elif found != form.application_id:
        raise Unusable("it is a database of something else")
    _upgrade(connection, form)
    connection.execute("PRAGMA synchronous = NORMAL")


def _upgrade(connection: sqlite3.Connection, form: Format) -> None:
    if connection.execute("PRAGMA user_version").fetchone()[0] in form.upgrades:
        with connection:
            connection.execute("BEGIN IMMEDIATE")  # one rank upgrades, the others then find it done
            while (version := connection.execute("PRAGMA user_version").fetchone()[0]) in form.upgrades:
                for statement in form.upgrades[version]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != form.version:
        raise Unusable(f"it has format {version}, this version of balcap reads format {form.version}")


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


def node_path(path: str) -> str:
    """`path`, with the number of the machine in its name on all machines of a cluster but the first.

    Reads what torchrun (``GROUP_RANK``) and SLURM (``SLURM_NODEID``) set, or ``NODE_RANK``.
    """
    for name in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID"):
        node = os.environ.get(name, "")
        if node.isdigit() and int(node):
            plain = Path(path)
            return str(plain.with_name(f"{plain.stem}.node{node}{plain.suffix}"))
    return path


class Writer:
    """Commits statements in a thread: what has gathered while the last commit was running goes in one.

    An answer is safe from ``kill -9`` of the process a few milliseconds after `put`. A power cut may lose
    the last commits but not the file.

    Args:
        connection: used by the writer alone.
        written: called with the statements that were committed, or given up, in order.
        failed: called with the error when a commit fails.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        written: Callable[[Sequence[Statement]], None],
        failed: Callable[[sqlite3.Error], None],
    ):
        self._connection = connection
        self._written, self._failed = written, failed
        self._lock = threading.Lock()
        self._waiting: list[Statement] = []
        self._writing = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="balcap-judge-store")

    def put(self, *statements: Statement) -> None:
        """Queue statements that belong into one transaction; returns at once."""
        with self._lock:
            self._waiting += statements
            if not self._writing:
                self._writing = True
                self._thread.submit(self._write)

    def close(self) -> None:
        """Write what is waiting; safe to call twice."""
        self._thread.shutdown(wait=True)
        self._connection.close()

    def _write(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._writing = False
                    return
            try:
                with self._connection:
                    for sql, values in batch:
                        self._connection.execute(sql, values)
            except sqlite3.Error as error:
                self._failed(error)
            self._written(batch)
