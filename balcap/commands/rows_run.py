"""One run over all rows of a data set: rows in, rows with what a judge says of them out, each paid for once.

A run remembers nothing by itself. Every answer is in the judge's cache as soon as it comes; the same command
asks about every row again and gets what is there from the cache, at no cost.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

from balcap.commands.rows_files import Quarantine, QuarantinedRow, claim, plan_rows, write_out
from balcap.commands.rows_settings import RowsSettings, own_keys
from balcap.data.images import BadImage
from balcap.data.layouts import image_paths
from balcap.data.reader import ImageFolder
from balcap.data.table import load_rows
from balcap.judge import BudgetSpent

REMEMBERED = frozenset(("refused", "filtered", "invalid", "cut", "too_long", "rejected"))
"""Failures that cost a call to find out: the next run asks again only with ``retry_quarantined``."""

PASSING = frozenset(("limited", "timeout", "server", "connection", "denied", "stopped"))
"""Failures that say nothing about the row: the next run asks again."""

GRACE_S = 5.0
"""Seconds that answers under way get to arrive after Ctrl-C."""

POLL_S = 0.5
"""Seconds between two looks at how far the run is."""

PLAIN_EVERY_S = 15.0
"""Seconds between two lines of progress where stdout is not a terminal, which shows one line that changes."""


class RowsRun(ABC):
    """One run, and what its command says of itself: `ask_chunk` and `new_row`. `run` is what is called.

    Rows are worked on in chunks. At most twice as many rows as there are calls at once hold their image in memory.

    Attributes:
        done: what is said of rows that have their answer.
        chunk: rows that are worked on together.
        rows: that are asked about.
        bad: row -> why it cannot be.
        same: further rows of an image -> its first row.
        unsettled: those of `rows` that have neither their answer nor a place in quarantine yet.
        quarantine: rows without an answer, with the reason.
        answered: rows with their answer, as JSON: lists of short texts would take twice the memory.
        answers: of the judge, that those consist of.
        missed: rows whose answer did not come, for a reason that passes; and those that the provider would not
            take: whether that is the row's fault or, for instance, the key's, is known when the run ends.
        signal: that ends the run; None while there is none.
    """

    done: str
    chunk = 1

    def __init__(self, settings: RowsSettings) -> None:
        assert settings.judge is not None
        self.settings, self.judge = settings, settings.judge
        self.images = ImageFolder(
            str(settings.image_root), settings.max_pixels_in_file, settings.link_targets or ()
        )
        self.table, self.digest = load_rows(str(settings.data), settings.name, settings.cache_dir)
        self.rows, self.bad, self.same = plan_rows(settings, self.table)
        self.answered: dict[int, str] = {}
        self.answers = 0
        self.missed: dict[int, QuarantinedRow] = {}
        self.signal: int | None = None

    @abstractmethod
    async def ask_chunk(self, rows: Sequence[int]) -> None:
        """Ask about some rows: each is settled, or given up. Nothing more is asked once the run `is_ending`."""

    @abstractmethod
    def new_row(self, row: int, raw: Any) -> dict[str, Any] | None:
        """What is written of a row of the data set, once all are settled; None for nothing."""

    @property
    def total(self) -> int:
        """Rows that are to have an answer."""
        return len(self.rows) + len(self.bad)

    def run(self) -> tuple[int, str]:
        """Ask about all rows, then write what can be written.

        Returns:
            Exit status: 0 if it is done or the budget is spent, else not 0; and a message for a person.

        Raises:
            DataError: the data set has changed meanwhile.
            ConfigError: `out` was begun with other settings, or another process works on it.
            StoreError: a cache or ledger of the judge cannot be used.
            OSError: a file cannot be written.
        """
        settings = self.settings
        with claim(
            settings.beside_out("settings.json"), settings.command, settings.identity(self.digest)
        ) as is_first:
            self._plan(is_first)
            try:
                self._ask_all()
                return self._finish()
            finally:
                self.judge.close()

    def _plan(self, is_first: bool) -> None:
        """Which rows are asked about: not those that an earlier run has put into quarantine at a price, unless
        that is wanted."""
        self.quarantine = Quarantine(self.settings.beside_out("quarantine.jsonl"))
        earlier = {} if is_first else self.quarantine.read()  # the first: of a run with other settings
        paid = {row: earlier[row] for row in self.rows if row in earlier and earlier[row].kind in REMEMBERED}
        skipped = {} if self.settings.retry_quarantined else paid
        self.unsettled = dict.fromkeys(row for row in self.rows if row not in skipped)
        self.quarantine.update(paid | self.bad)
        self.quarantine.write()

    # ---- asking

    def _ask_all(self) -> None:
        """Ask until all rows are done or something ends the run; say now and then how far it is."""
        seconds, end = (POLL_S, "\r") if sys.stdout.isatty() else (PLAIN_EVERY_S, "\n")
        with _signals(self._interrupt):
            asking, shown = self.judge.submit(self._ask_rows()), -math.inf
            while self.signal is None and not wait([asking], timeout=POLL_S).done:
                if time.monotonic() - shown >= seconds:
                    done, spent = self.total - len(self.unsettled), self.judge.stats().cost_usd
                    line = f"{done}/{self.total} rows  ${spent:.2f}  {len(self.quarantine)} quarantined"
                    print(line, end=end, flush=True)
                    shown = time.monotonic()
            if self.signal is not None:
                wait([asking], timeout=GRACE_S)
            if not asking.cancel():
                asking.result()  # raises what went wrong

    def _interrupt(self, number: int, _: Any) -> None:
        self.signal = number

    async def _ask_rows(self) -> None:
        most = 2 * self.judge.limits.slots
        size = min(most, self.chunk)
        todo, slots = list(self.unsettled), asyncio.Semaphore(most // size)
        try:
            async with asyncio.TaskGroup() as tasks:
                for start in range(0, len(todo), size):
                    await slots.acquire()
                    if self.is_ending():
                        break
                    asking = tasks.create_task(self.ask_chunk(todo[start : start + size]))
                    asking.add_done_callback(lambda _: slots.release())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    def is_ending(self) -> bool:
        """Nothing more is asked. A partial file is to hold all that the cache knows, so all rows are asked for."""
        return self.signal is not None or (self.judge.stopped is not None and not self.settings.partial)

    async def read_images(self, row: int) -> tuple[bytes, ...] | None:
        """The files of a row's images; None where one cannot be used, and the row is given up."""
        try:
            paths = image_paths(self.table[row]["sample_id"])
            read = [await asyncio.to_thread(self.images.read, path) for path in paths]
        except BadImage as bad:
            self.give_up(row, bad.cause, bad.detail)
            return None
        return tuple(file for file, _ in read)

    def settle(self, row: int, answer: Any, answers: int) -> None:
        """The row has its answer, which consists of so many of the judge's."""
        self.answered[row] = json.dumps(answer)
        self.answers += answers
        self.quarantine.pop(row, None)
        del self.unsettled[row]

    def give_up(self, row: int, kind: str, reason: str) -> None:
        """The row gets no answer in this run, nor, unless the reason passes or it is wanted, in later ones."""
        entry = QuarantinedRow(row, self.table[row]["sample_id"], kind, own_keys(reason))
        if kind in PASSING or kind == "rejected":
            self.missed[row] = entry
        else:
            self._add_to_quarantine(entry)

    def _add_to_quarantine(self, entry: QuarantinedRow) -> None:
        self.quarantine.add(entry)
        del self.unsettled[entry.row]

    # ---- the end

    def _finish(self) -> tuple[int, str]:
        """Write the files; exit status and message."""
        # More answers than the cache held: somebody was asked, and did answer.
        was_answered = self.answers > self.judge.stats().cache_hits
        if was_answered and self.judge.stopped is None and self.signal is None:
            for entry in self.missed.values():
                if entry.kind == "rejected":  # others were not: it is the row
                    self._add_to_quarantine(entry)
        self.quarantine.write()
        # An interrupted run has not seen all rows: it must not shrink a file that an earlier one wrote.
        whole = not self.unsettled or (self.settings.partial and self.signal is None)
        written = whole and bool(self.answered)
        if written:
            write_out(self.settings, self.new_row, self.digest)
        status, why = self._status(written)
        return status, f"{self._summary(written)}\n{why}".strip()

    def _status(self, written: bool) -> tuple[int, str]:
        """Exit status, and why the run is not done."""
        if not self.unsettled:
            why = f"out: {self.settings.out} was not written, since no row has an answer."
            return (0, "") if written else (1, why)
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            return 128 + self.signal, f"Stopped by {name}; the same command goes on from here."
        if (stopped := self.judge.stopped) is not None:
            status = 0 if isinstance(stopped, BudgetSpent) else 1
            return status, f"{own_keys(str(stopped))}. The same command goes on from here."
        left = [entry for row, entry in self.missed.items() if row in self.unsettled]
        why = f"Left since ({_kinds(left)}), the last one: {left[-1].reason}. The same command asks again"
        return 1, why + ("." if self.settings.partial else "; --partial true writes what is there.")

    def _summary(self, written: bool) -> str:
        """``2,990 of 3,000 rows are captioned (data/new.json); 10 in quarantine (…); $1.20 in this run.``"""
        where = f" ({self.settings.out})" if written else ""
        parts = [f"{len(self.answered):,} of {self.total:,} rows {self.done}{where}"]
        if self.quarantine:
            kinds = _kinds(self.quarantine.values())
            parts.append(f"{len(self.quarantine):,} in quarantine ({kinds}: {self.quarantine.path})")
        if self.unsettled:
            parts.append(f"{len(self.unsettled):,} left for the next run")
        stats = self.judge.stats()
        parts.append(f"${stats.cost_usd:.2f} in this run")
        if stats.unpriced_calls:
            parts.append(f"{stats.unpriced_calls:,} calls have no known price (judge.prices)")
        return "; ".join(parts) + "."


def _kinds(entries: Iterable[QuarantinedRow]) -> str:
    """``refused 8, missing_file 4``."""
    return ", ".join(f"{kind} {count:,}" for kind, count in Counter(e.kind for e in entries).most_common())


@contextmanager
def _signals(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handle`."""
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
