"""``python main.py cache`` and ``python main.py ledger``: what the files of a judge hold."""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from balcap.judge.cache import JudgmentCache, Store, size_of
from balcap.judge.errors import StoreError
from balcap.judge.ledger import Ledger
from balcap.judge.redis_cache import describe, is_redis, without_password

_ANSWERS = """
SELECT task, model, printf('%,d', count(*)) AS answers,
    printf('%.1f', total(length(answer) + length(key)) / 1e6) AS MB,
    date(nullif(min(at), 0), 'unixepoch', 'localtime') AS first,
    date(nullif(max(at), 0), 'unixepoch', 'localtime') AS last
FROM answers GROUP BY task, model ORDER BY task, model
"""

_CALLS = """
SELECT task, model, outcome, printf('%,d', count(*)) AS calls, printf('%,d', sum(items)) AS items,
    printf('%,d', sum(tokens_in)) AS tokens_in, printf('%,d', sum(tokens_cached)) AS cached,
    printf('%,d', sum(tokens_out)) AS tokens_out, printf('%.4f', total(usd)) AS "$",
    printf('%,d', sum(usd IS NULL)) AS "no price", printf('%.1f', avg(latency_s)) AS s,
    printf('%.1f', max(latency_s)) AS s_max
FROM calls GROUP BY task, model, outcome ORDER BY task, model, outcome
"""


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
        path: the file, or the server (``redis://host:6379/0``), which is only shown.
        older_than_days: delete answers that are older.
        task: delete only answers of this kind of judgment.
        model: delete only answers of this model.
        max_mb: delete the oldest answers until the rest takes about so many megabytes.
    """
    if is_redis(path):
        if any(value is not None for value in (older_than_days, task, model, max_mb)):
            raise SystemExit(
                f"path: {without_password(path)} is a server, which drops answers by its own settings (maxmemory)"
            )
        try:
            answers, size = describe(path)
        except StoreError as error:
            raise SystemExit(
                f"path: {without_password(path)} cannot be read as a judge's cache ({error.why})"
            ) from None
        print(f"{without_password(path)}: {answers:,} answers, about {size / 1e6:,.1f} MB")
        return
    oldest = None if older_than_days is None else time.time() - 86400 * older_than_days
    chosen = {"task = ?": task, "model = ?": model}
    doomed = {"at < ?": oldest, "size > ?": None if max_mb is None else max_mb * 1e6}
    with closing(_open(path, JudgmentCache)) as connection:
        if any(value is not None for value in (chosen | doomed).values()):
            before = size_of(path) / 1e6
            deleted = _prune(connection, chosen, doomed)
            after = size_of(path) / 1e6
            print(f"deleted {deleted:,} answers; {before:,.1f} MB before, {after:,.1f} MB now")
        _show(f"{path}, {size_of(path) / 1e6:,.1f} MB", connection.execute(_ANSWERS))


def _prune(
    connection: sqlite3.Connection, chosen: dict[str, str | None], doomed: dict[str, float | None]
) -> int:
    """Delete, of the answers that meet all conditions of `chosen`, those that meet one of `doomed`; how many.

    Conditions whose value is None are left out; no condition is met by all. ``size`` is that of an answer and of
    all that are newer.
    """
    where = " AND ".join(condition for condition, value in chosen.items() if value is not None) or "1"
    which = " OR ".join(condition for condition, value in doomed.items() if value is not None) or "1"
    values = [value for value in (chosen | doomed).values() if value is not None]
    size = "sum(length(answer) + length(key) + length(task) + length(model) + 8)"
    sized = f"SELECT key, at, {size} OVER (ORDER BY at DESC, key) AS size FROM answers WHERE {where}"
    statement = f"DELETE FROM answers WHERE key IN (SELECT key FROM ({sized}) WHERE {which})"
    with connection:
        deleted = connection.execute(statement, values).rowcount
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return deleted


def ledger(path: str) -> None:
    """Show what a run's judge has cost, per task, model and outcome, and what failed calls were answered with.

    Args:
        path: the ledger, or the run folder that it is in.
    """
    file = Path(path) / "judge_ledger.sqlite" if Path(path).is_dir() else Path(path)
    with closing(_open(str(file), Ledger)) as connection:
        calls, usd = connection.execute("SELECT count(*), total(usd) FROM calls").fetchone()
        _show(f"{file}: {calls:,} calls, ${usd:,.4f}", connection.execute(_CALLS))
        if failures := failure_words(connection):
            _table("the most frequent words of failures", ("outcome", "calls", "words"), failures, {1})


def failure_words(connection: sqlite3.Connection, most: int = 3) -> list[tuple[str, int, str]]:
    """What failed calls of a ledger were answered with: outcome, calls, words; the most frequent of each outcome first.

    Words that differ only in those with digits in them (seconds to wait, numbers of requests) count as the same, and
    one of them is shown. Ledgers of version 1 hold none.

    Args:
        connection: to the ledger.
        most: for each outcome.
    """
    columns = [row[1] for row in connection.execute("PRAGMA table_info(calls)")]
    query = "SELECT outcome, detail, count(*) FROM calls WHERE detail IS NOT NULL GROUP BY outcome, detail"
    counts: Counter[tuple[str, str]] = Counter()
    shown: dict[tuple[str, str], str] = {}
    for outcome, words, calls in connection.execute(query) if "detail" in columns else ():
        alike = outcome, re.sub(r"\S*\d\S*", "", words)
        counts[alike] += calls
        shown.setdefault(alike, words)
    frequent = [(alike[0], calls, shown[alike]) for alike, calls in counts.most_common()]
    outcomes = dict.fromkeys(outcome for outcome, *_ in frequent)
    return [row for outcome in outcomes for row in [r for r in frequent if r[0] == outcome][:most]]


def run_cache(args: Sequence[str]) -> None:
    """``python main.py cache``."""
    auto_cli(cache, args=list(args), as_positional=True)


def run_ledger(args: Sequence[str]) -> None:
    """``python main.py ledger``."""
    auto_cli(ledger, args=list(args), as_positional=True)


def _open(path: str, store: type[Store]) -> sqlite3.Connection:
    if not Path(path).exists():
        raise SystemExit(f"path: {path} does not exist")
    try:
        return store.connect(Path(path))
    except StoreError as error:
        raise SystemExit(f"path: {path} cannot be read as a judge's {store.setting} ({error.why})") from None


def _show(title: str, rows: sqlite3.Cursor) -> None:
    """The rows as a table under the names of their columns, two of which are texts."""
    names = [name for name, *_ in rows.description]
    _table(title, names, rows, set(range(2, len(names))))


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[object]], numbers: set[int]) -> None:
    table = Table(title=title)
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number in numbers else "left")
    for row in rows:
        table.add_row(*("–" if value is None else escape(str(value)) for value in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
