"""What a judge has done and what it cost: every call as a row, and the counts of this process.

One SQLite file per run, in the run's folder, shared by the ranks of a machine. It outlives the process: a run
that is continued knows what it has spent. ``python main.py ledger``, ``sqlite3`` and pandas read it.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from balcap.judge.cache import Store, left_over
from balcap.judge.client import Reply
from balcap.utils.redact import redact


@dataclass
class JudgeStats:
    """Counts since the judge was made. Take two snapshots and subtract them to see a step.

    Attributes:
        calls: requests sent to a provider, retries included.
        cache_hits: answers that came from the cache: about a caption or an assertion, not a request.
        failures: task -> items (captions, assertions) that failed for good, each once, however many
            captions of a group share it; `Judgments.failures` counts per caption.
        tokens_in: prompt tokens billed, image tokens included.
        tokens_out: completion tokens billed, reasoning tokens included.
        cost_usd: US dollars, from ``model.judge.prices`` or litellm's price table.
        unpriced_calls: calls that no price is known for; `cost_usd` holds 0 for them.
    """

    calls: int = 0
    cache_hits: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    cost_usd: float = 0.0
    unpriced_calls: int = 0

    def __sub__(self, other: JudgeStats) -> JudgeStats:
        return JudgeStats(**{name: mine - vars(other)[name] for name, mine in vars(self).items()})


class Ledger(Store):
    """A row for every call, and the sum of their dollars over all processes that write the same file.

    Args:
        path: the file; None keeps only the counts of this process.
        stats: where calls are counted; None begins at 0.
        machines: of the job. The first one also counts what ledgers beside it hold of machines that the job has no more;
            None for a process by itself.

    Attributes:
        stats: the counts of this process.
        elsewhere: US dollars that others have spent whose calls are not in this file, as far as is known here; not part of
            `spent`.

    Raises:
        StoreError: if the file cannot be opened or is not a ledger.
    """

    setting, application_id, version = "ledger", 0x62616C6C, 2  # "ball"
    table = (
        "CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY, at REAL NOT NULL, task TEXT NOT NULL,"
        " model TEXT NOT NULL, items INTEGER NOT NULL, attempt INTEGER NOT NULL, outcome TEXT NOT NULL,"
        " tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, tokens_cached INTEGER NOT NULL, usd REAL,"
        " latency_s REAL NOT NULL, pid INTEGER NOT NULL, detail TEXT)"
    )
    insert = f"INSERT INTO calls VALUES (NULL{', ?' * 13})"
    upgrades: ClassVar = {1: "ALTER TABLE calls ADD COLUMN detail TEXT"}

    def __init__(self, path: str | Path | None, stats: JudgeStats | None = None, machines: int | None = None):
        super().__init__(path)
        self.stats = stats or JudgeStats()
        self.elsewhere = 0.0
        self._last_row = 0
        self._read_usd = 0.0
        for file in [] if path is None or machines is None else left_over(path, machines):
            with closing(Ledger(file)) as left:
                self._read_usd += left.spent()

    def add(
        self,
        at: float,
        task: str,
        model: str,
        items: int,
        attempt: int,
        outcome: str,
        reply: Reply,
        latency_s: float,
        detail: str | None = None,
    ) -> None:
        """Record a request to a provider.

        Args:
            at: unix time when it was sent.
            task: kind of judgment.
            model: who was asked, as litellm writes it.
            items: questions that it carried (captions, assertions).
            attempt: 1 for the first, more for repetitions.
            outcome: ``ok``, or the `FailureKind`.
            reply: what it used.
            latency_s: seconds until the answer, or until it was given up.
            detail: the failure's message; None where there is an answer. Kept without secrets (`redact`).
        """
        stats, usd = self.stats, reply.usd or 0.0
        stats.calls += 1
        stats.tokens_in += reply.tokens_in
        stats.tokens_out += reply.tokens_out
        stats.cost_usd += usd
        stats.unpriced_calls += reply.usd is None
        used = (reply.tokens_in, reply.tokens_out, reply.tokens_cached, reply.usd)
        self._write(
            (
                at,
                task,
                model,
                items,
                attempt,
                outcome,
                *used,
                latency_s,
                os.getpid(),
                detail and redact(detail),
            )
        )

    def spent(self) -> float:
        """US dollars of all processes that wrote this file, now and in earlier runs, and of machines that are gone."""
        if self.path is None:
            return self.stats.cost_usd
        query = "SELECT total(usd), max(id) FROM calls WHERE id > ?"
        for usd, last_row in self._run("read", query, [self._last_row]) or ():
            self._read_usd += usd
            self._last_row = last_row or self._last_row
        return self._read_usd + sum(row[9] or 0.0 for row in self._waiting)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._write()
        self.spent()
        super().close()
