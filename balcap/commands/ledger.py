"""``python main.py cache`` and ``python main.py ledger``: what the files of a judge hold."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balcap.judge.cache import JudgmentCache, Store, size_of
from balcap.judge.errors import StoreError
from balcap.judge.ledger import Ledger


def cache(
    path: str = "runs/judge_cache.sqlite",
    older_than_days: float | None = None,
    task: str | None = None,
    model: str | None = None,
    max_mb: float | None = None,
) -> None:
    """Show what a cache of judgments holds; with any of the filters, delete from it first.

    Safe while runs use it: they ask again for what is gone.

    Args:
        path: the file.
        older_than_days: delete answers that are older.
        task: delete only answers of this kind of judgment.
        model: delete only answers of this model.
        max_mb: delete the oldest answers until the rest takes about so many megabytes.
    """
    connection = _open(path, JudgmentCache)
    before = size_of(path) / 1e6
    deleted = prune(connection, older_than_days, task, model, max_mb)
    if deleted is not None:
        print(f"deleted {deleted:,} answers; {before:,.1f} MB before, {size_of(path) / 1e6:,.1f} MB now")
    rows = connection.execute(
        "SELECT task, model, count(*), total(length(answer) + length(key)) / 1e6, min(at), max(at) FROM answers"
        " GROUP BY task, model ORDER BY task, model"
    ).fetchall()
    _table(
        f"{path}, {size_of(path) / 1e6:,.1f} MB",
        ("task", "model", "answers", "MB", "first", "last"),
        [(*row[:2], f"{row[2]:,}", f"{row[3]:,.1f}", _day(row[4]), _day(row[5])) for row in rows],
    )
    connection.close()


def prune(
    connection: sqlite3.Connection,
    older_than_days: float | None = None,
    task: str | None = None,
    model: str | None = None,
    max_mb: float | None = None,
) -> int | None:
    """Delete as `cache` says; the number of answers that went, None if nothing was asked for."""
    oldest = None if older_than_days is None else time.time() - 86400 * older_than_days
    filters = [
        (c, v) for c, v in (("task = ?", task), ("model = ?", model), ("at < ?", oldest)) if v is not None
    ]
    if not filters and max_mb is None:
        return None
    where, values = (
        " AND ".join(condition for condition, _ in filters) or "1",
        [value for _, value in filters],
    )
    deleted = 0
    with connection:
        if oldest is not None or max_mb is None:
            deleted = connection.execute(f"DELETE FROM answers WHERE {where}", values).rowcount
            where, values = "1", []
        if max_mb is not None:
            size = "sum(length(answer) + length(key) + length(task) + length(model) + 8)"
            newest_first = (
                f"SELECT key, {size} OVER (ORDER BY at DESC, key) AS total FROM answers WHERE {where}"
            )
            deleted += connection.execute(
                f"DELETE FROM answers WHERE key IN (SELECT key FROM ({newest_first}) WHERE total > ?)",
                [*values, max_mb * 1e6],
            ).rowcount
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return deleted


def ledger(path: str) -> None:
    """Show what a run's judge has cost, per task, model and outcome.

    Args:
        path: the ledger, or the run folder that it is in.
    """
    file = Path(path) / "judge_ledger.sqlite" if Path(path).is_dir() else Path(path)
    connection = _open(str(file), Ledger)
    rows = connection.execute(
        "SELECT task, model, outcome, count(*), sum(items), sum(tokens_in), sum(tokens_cached), sum(tokens_out),"
        " sum(usd), sum(usd IS NULL), avg(latency_s), max(latency_s) FROM calls GROUP BY task, model, outcome"
        " ORDER BY task, model, outcome"
    ).fetchall()
    calls, usd = sum(row[3] for row in rows), sum(row[8] or 0.0 for row in rows)
    _table(
        f"{file}: {calls:,} calls, ${usd:,.4f}",
        [
            "task",
            "model",
            "outcome",
            "calls",
            "items",
            "tokens_in",
            "cached",
            "tokens_out",
            "$",
            "s",
            "s_max",
        ],
        [
            (
                *row[:3],
                *(f"{value:,}" for value in row[3:8]),
                f"{row[8] or 0:,.4f}" + (f" ({row[9]} without price)" if row[9] else ""),
                f"{row[10]:.1f}",
                f"{row[11]:.1f}",
            )
            for row in rows
        ],
    )
    connection.close()


def run_cache(args: Sequence[str]) -> None:
    """``python main.py cache``."""
    _run(cache, args)


def run_ledger(args: Sequence[str]) -> None:
    """``python main.py ledger``."""
    _run(ledger, args)


def _run(command: Any, args: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    auto_cli(command, args=list(args), as_positional=True)


def _open(path: str, store: type[Store]) -> sqlite3.Connection:
    if not Path(path).exists():
        raise SystemExit(f"path: {path} does not exist")
    try:
        return store.connect(Path(path))
    except StoreError as error:
        raise SystemExit(f"path: {path} cannot be read as a judge's {store.setting} ({error.why})") from None


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at)) if at else "–"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
