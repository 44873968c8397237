"""The calls to judges that a run's ledger holds, summed for reading."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class TaskCalls:
    """Calls of one kind of judgment to one model.

    Attributes:
        task, model: which.
        calls: requests, retries included; `failed` of them gave no answer.
        items: captions or assertions that they asked about.
        tokens_in, tokens_out, tokens_cached: as billed.
        usd: US dollars, of the calls whose price is known.
        median_s, p95_s: latency in seconds.
    """

    task: str
    model: str
    calls: int
    failed: int
    items: int
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    usd: float
    median_s: float
    p95_s: float


@dataclass(frozen=True)
class Failure:
    """What providers answered instead of a judgment: its kind, their words without secrets, how often."""

    task: str
    outcome: str
    words: str
    calls: int


@dataclass(frozen=True)
class Calls:
    """All calls of a run.

    Attributes:
        tasks: by kind of judgment and model, the dearest first.
        failures: the most frequent first.
        latencies: seconds of up to 5,000 calls, by task.
        at: for up to 500 calls in order: hours since the first, and dollars until then.
    """

    tasks: list[TaskCalls]
    failures: list[Failure]
    latencies: dict[str, list[float]] = field(default_factory=dict)
    at: list[tuple[float, float]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Calls:
        """Of a ledger.

        Raises:
            sqlite3.Error: it is none.
        """
        with closing(sqlite3.connect(path)) as connection:
            return cls._of(connection)

    @classmethod
    def _of(cls, connection: sqlite3.Connection) -> Calls:
        columns = {row[1] for row in connection.execute("PRAGMA table_info(calls)")}
        words = "coalesce(detail, '')" if "detail" in columns else "''"
        latencies: dict[str, list[float]] = {}
        pairs: dict[tuple[str, str], list[float]] = {}
        for task, model, seconds in connection.execute("SELECT task, model, latency_s FROM calls"):
            pairs.setdefault((task, model), []).append(seconds)
            latencies.setdefault(task, []).append(seconds)
        tasks = [
            TaskCalls(*row, *(float(x) for x in np.quantile(pairs[row[0], row[1]], [0.5, 0.95])))
            for row in connection.execute(
                "SELECT task, model, count(*), sum(outcome != 'ok'), sum(items), sum(tokens_in), sum(tokens_out),"
                " sum(tokens_cached), total(usd) FROM calls GROUP BY task, model ORDER BY total(usd) DESC, count(*) DESC"
            )
        ]
        failures = [
            Failure(*row)
            for row in connection.execute(
                f"SELECT task, outcome, {words}, count(*) AS n FROM calls WHERE outcome != 'ok'"
                " GROUP BY 1, 2, 3 ORDER BY n DESC LIMIT 50"
            )
        ]
        spent, first, at = 0.0, None, []
        for when, usd in connection.execute("SELECT at, coalesce(usd, 0) FROM calls ORDER BY at"):
            first = when if first is None else first
            spent += usd
            at.append(((when - first) / 3600, spent))
        every = max(1, len(at) // 500)
        return cls(
            tasks, failures, {t: s[:: max(1, len(s) // 5000)] for t, s in latencies.items()}, at[::every]
        )

    @property
    def usd(self) -> float:
        """US dollars of all calls whose price is known."""
        return sum(task.usd for task in self.tasks)

    @property
    def calls(self) -> int:
        """Requests, retries included."""
        return sum(task.calls for task in self.tasks)

    @property
    def failed(self) -> int:
        """Requests that gave no answer."""
        return sum(task.failed for task in self.tasks)
