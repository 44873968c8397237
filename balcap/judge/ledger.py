"""Every call that a judge was paid for, as a row; and what is left of the budget.

One SQLite file per run, in the run's folder, shared by the ranks of a machine (`balcap.judge.store`). It
outlives the process: a run that is continued knows what it has spent. ``sqlite3`` or pandas read it; the
table is ``calls``.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from balcap.judge.errors import LedgerError
from balcap.judge.store import Format, Statement, Unusable, Writer, node_path, open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One request to a provider.

    Attributes:
        at: unix time when it was sent.
        task: kind of judgment.
        model: who was asked, as litellm writes it.
        items: questions that it carried (captions, assertions).
        attempt: 1 for the first, more for repetitions.
        outcome: ``ok``, or the `FailureKind`.
        tokens_in: prompt tokens billed, image and cached tokens included.
        tokens_out: completion tokens billed, reasoning included.
        tokens_cached: those of `tokens_in` that the provider had in its prefix cache.
        usd: US dollars; None where no price is known. What a provider bills for a call that timed out, it
            tells nobody: 0.
        latency_s: seconds until the answer, or until it was given up.
    """

    at: float
    task: str
    model: str
    items: int
    attempt: int
    outcome: str
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    usd: float | None
    latency_s: float


_COLUMNS = [item.name for item in fields(Call)]
FORMAT = Format(
    name="a ledger of judgments",
    application_id=0x62616C6C,  # "ball"
    version=1,
    tables=(
        "CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY, at REAL NOT NULL, task TEXT NOT NULL,"
        " model TEXT NOT NULL, items INTEGER NOT NULL, attempt INTEGER NOT NULL, outcome TEXT NOT NULL,"
        " tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, tokens_cached INTEGER NOT NULL, usd REAL,"
        " latency_s REAL NOT NULL, pid INTEGER NOT NULL)",
        # What each process has spent: the sum is asked for before every call.
        "CREATE TABLE IF NOT EXISTS spent (session TEXT PRIMARY KEY, usd REAL NOT NULL) WITHOUT ROWID",
    ),
    upgrades={},
)
_ADD = f"INSERT INTO calls ({', '.join(_COLUMNS)}, pid) VALUES ({', '.join('?' * (len(_COLUMNS) + 1))})"
_SPEND = (
    "INSERT INTO spent (session, usd) VALUES (?, ?) ON CONFLICT(session) DO UPDATE SET usd = excluded.usd"
)
_FRESH_S = 0.05  # what other ranks spend is read again after this


class Ledger:
    """Rows of `Call`, and the sum of their dollars over all processes that write the same file.

    Args:
        path: the file; None keeps only the sum of this process.

    Raises:
        LedgerError: if the file cannot be opened or is not a ledger.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(node_path(str(path)))
        self.mine = 0.0
        self._session = uuid.uuid4().hex
        self._elsewhere = 0.0
        self._read_at = -float("inf")
        self._lock = threading.Lock()
        self._warned = False
        self._reader: sqlite3.Connection | None = None
        if self.path is not None:
            self._reader = _open(self.path)
            self._writer = Writer(_open(self.path), _nothing, self._warn)

    def add(self, call: Call) -> None:
        """Book a call; it is on disk a few milliseconds later."""
        self.mine += call.usd or 0.0
        if self._reader is not None:
            row: Statement = (_ADD, (*astuple(call), os.getpid()))
            self._writer.put(row, (_SPEND, (self._session, self.mine)))

    def spent(self) -> float:
        """US dollars of all processes that wrote this file, now and in earlier runs."""
        if self._reader is not None and time.monotonic() - self._read_at > _FRESH_S:
            with self._lock:
                self._read_at = time.monotonic()
                try:
                    found = self._reader.execute(
                        "SELECT total(usd) FROM spent WHERE session != ?", (self._session,)
                    ).fetchone()
                    self._elsewhere = found[0]
                except sqlite3.Error as error:
                    self._warn(error)
        return self._elsewhere + self.mine

    def close(self) -> None:
        """Write what is waiting and close the file; safe to call twice."""
        if self._reader is not None:
            self.spent()
            self._writer.close()
            with self._lock:
                self._reader.close()
                self._reader = None

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("model.judge.ledger: cannot use %s (%s); calls are not booked", self.path, error)


def ledger_problem(path: str | Path) -> str | None:
    """What is wrong with `path` as a ledger, worded with its key; None if it works or is not there yet.

    Makes nothing: a config that is refused leaves no run folder behind.
    """
    file = Path(node_path(str(path)))
    if not file.exists():
        return None
    try:
        _open(file).close()
    except LedgerError as error:
        return str(error)
    return None


def _nothing(batch: Sequence[Statement]) -> None:
    return None


def _open(path: Path) -> sqlite3.Connection:
    try:
        return open_store(path, FORMAT)
    except Unusable as error:
        raise LedgerError(
            f"model.judge.ledger: {path} cannot be used as a ledger ({error}). Name another file, move this "
            "one away, or set model.judge.ledger to null."
        ) from None
