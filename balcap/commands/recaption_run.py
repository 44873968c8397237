"""One recaption run: rows in, captions and what they assert out, each paid for once.

A run remembers nothing by itself. Every answer is in the judge's cache as soon as it comes; the same command
asks about every row again and gets what is there from the cache, at no cost.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

from balcap.commands.recaption_files import (
    Quarantine,
    QuarantinedRow,
    claim,
    output_row,
    plan_rows,
    write_rows,
)
from balcap.commands.recaption_settings import RecaptionSettings, asked_model, own_keys
from balcap.data.images import BadImage
from balcap.data.json_files import DataError
from balcap.data.reader import ImageFolder, prompt_for
from balcap.data.table import load_rows, raw_rows
from balcap.judge import BudgetSpent, Decompose, JudgeFailure, Recaption, StoreError
from balcap.utils.errors import RunStopped

REMEMBERED = frozenset(("refused", "filtered", "invalid", "cut", "too_long", "rejected"))
"""Failures that cost a call to find out: the next run asks again only with ``retry_quarantined``."""

PASSING = frozenset(("limited", "timeout", "server", "connection", "denied", "stopped"))
"""Failures that say nothing about the row: the next run asks again."""

GRACE_S = 5.0
"""Seconds that answers under way get to arrive after Ctrl-C."""

PLAIN_EVERY_S = 15.0
"""Seconds between two lines of progress where stdout is not a terminal."""


class RecaptionRun:
    """One run. `run` is all there is to call.

    Rows are worked on in chunks of as many captions as one call decomposes. At most twice as many rows as there
    are calls at once hold their image in memory.

    Attributes:
        rows: that can be captioned.
        todo: those of `rows` that this run asks about, judge or cache.
        unsettled: those of `todo` that have neither their caption nor a place in quarantine yet.
        quarantine: rows without a caption, with the reason.
        answered: rows with their caption and units, as JSON: lists of short texts would take twice the memory.
        missed: rows whose answer did not come, for a reason that passes.
        rejected: rows that the provider would not take. Whether that is the row's fault or, for instance, the
            key's, is known when the run ends.
        answers: of judges and their caches, in this run.
        signal: that ends the run; None while there is none.
    """

    def __init__(self, settings: RecaptionSettings) -> None:
        assert settings.judge is not None
        self.settings, self.judge = settings, settings.judge
        self.decomposer = settings.decompose_judge or settings.judge
        self.images = ImageFolder(
            str(settings.image_root), settings.max_pixels_in_file, settings.link_targets or ()
        )
        self.table, self.digest = load_rows(str(settings.data), settings.name, settings.cache_dir)
        self.rows, self._bad = plan_rows(settings, self.table)
        self.answered: dict[int, str] = {}
        self.missed: dict[int, QuarantinedRow] = {}
        self.rejected: dict[int, QuarantinedRow] = {}
        self.answers = 0
        self.signal: int | None = None

    def run(self) -> tuple[int, str]:
        """Ask about all rows, then write what can be written.

        Returns:
            Exit status: 0 if it is done or the budget is spent, else not 0; and a message for a person.

        Raises:
            DataError: the data set has changed meanwhile.
            ConfigError: `out` was begun with other settings, or another process works on it.
            StoreError: a cache or ledger of a judge cannot be used.
            OSError: a file cannot be written.
        """
        settings = self.settings
        with claim(settings.beside_out("settings.json"), settings.identity(self.digest)) as is_first:
            self._plan(is_first)
            try:
                self._ask_all()
                return self._finish()
            finally:
                for judge in settings.judges().values():
                    judge.close()

    def _plan(self, is_first: bool) -> None:
        """Which rows are asked about: not those that an earlier run has put into quarantine at a price, unless
        that is wanted."""
        self.quarantine = Quarantine(self.settings.beside_out("quarantine.jsonl"))
        earlier = {} if is_first else self.quarantine.read()  # the first: of a run with other settings
        for row in self.rows:
            if row in earlier and earlier[row].kind in REMEMBERED:
                self.quarantine[row] = earlier[row]
        skipped = set() if self.settings.retry_quarantined else set(self.quarantine)
        self.todo = [row for row in self.rows if row not in skipped]
        self.unsettled = set(self.todo)
        self.quarantine |= {entry.row: entry for entry in self._bad}
        self.quarantine.write()

    # ---- asking

    def _ask_all(self) -> None:
        """Ask until all rows are done or something ends the run."""
        with _signals(self._interrupt), _progress(len(self.rows) + len(self._bad)) as show:
            asking = self.judge.submit(self._ask_rows())
            while self.signal is None and not wait([asking], timeout=0.5).done:
                show(self)
            if self.signal is not None:
                wait([asking], timeout=GRACE_S)
            if not asking.cancel():
                asking.result()  # raises what went wrong
            show(self, final=True)

    def _interrupt(self, number: int) -> None:
        self.signal = number

    async def _ask_rows(self) -> None:
        size = 1
        if self.settings.decompose:
            size = (self.decomposer.settings.per_call or {}).get(Decompose.name, Decompose.per_call)
        size = max(1, min(size, 2 * self.judge.settings.concurrency))
        chunks = iter([self.todo[start : start + size] for start in range(0, len(self.todo), size)])
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(2 * self.judge.settings.concurrency // size):
                    workers.create_task(self._work(chunks))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    async def _work(self, chunks: Iterator[Sequence[int]]) -> None:
        for rows in chunks:
            if self._is_ending():
                return
            await self._ask_chunk(rows)

    def _is_ending(self) -> bool:
        """Nothing more is asked. A partial file is to hold all that the cache knows, so all rows are asked for."""
        if self.signal is not None:
            return True
        return not self.settings.partial and any(judge.stopped for judge in self.settings.judges().values())

    async def _ask_chunk(self, rows: Sequence[int]) -> None:
        asked = zip(rows, await asyncio.gather(*map(self._caption, rows)), strict=True)
        captions = {row: caption for row, caption in asked if caption is not None}
        if not self.settings.decompose:
            for row, caption in captions.items():
                self._settle(row, caption, None)
        elif captions and not self._is_ending():
            answers = await self.decomposer.ask(Decompose, list(captions.values()))
            for (row, caption), units in zip(captions.items(), answers, strict=True):
                self._decomposed(row, caption, units)

    async def _caption(self, row: int) -> str | None:
        """The row's new caption; None where there is none."""
        if self._is_ending():
            return None
        flat, settings = self.table[row], self.settings
        try:
            image, _ = await asyncio.to_thread(self.images.read, flat["sample_id"])
        except BadImage as bad:
            self._give_up(row, bad.cause, own_keys(bad.detail))
            return None
        question = prompt_for(flat["sample_id"], flat["question"], settings.prompts or (), settings.seed)
        (answer,) = await self.judge.ask(Recaption, [question], image=image)
        if isinstance(answer, JudgeFailure):
            self._give_up(row, answer.kind, own_keys(str(answer)))
            return None
        self.answers += 1
        return answer

    def _decomposed(self, row: int, caption: str, units: list[str] | JudgeFailure) -> None:
        if isinstance(units, JudgeFailure):
            key = "decompose_judge" if self.settings.decompose_judge else "judge"
            self._give_up(row, units.kind, own_keys(str(units), key))
            return
        self.answers += 1
        if units:
            self._settle(row, caption, units)
        else:
            self._give_up(row, "no_units", "the new caption asserts nothing")

    def _settle(self, row: int, caption: str, units: list[str] | None) -> None:
        self.answered[row] = json.dumps([caption, units])
        self.quarantine.pop(row, None)
        self.unsettled.discard(row)

    def _give_up(self, row: int, kind: str, reason: str) -> None:
        entry = QuarantinedRow(row, self.table[row]["sample_id"], kind, reason)
        if kind in PASSING:
            self.missed[row] = entry
        elif kind == "rejected":
            self.rejected[row] = entry
        else:
            self._add_to_quarantine(entry)

    def _add_to_quarantine(self, entry: QuarantinedRow) -> None:
        self.quarantine.add(entry)
        self.unsettled.discard(entry.row)

    def dollars(self) -> float:
        """Spent by this run."""
        return sum(judge.stats().cost_usd for judge in self.settings.judges().values())

    # ---- the end

    def _finish(self) -> tuple[int, str]:
        """Write the files; exit status and message."""
        settings, judges = self.settings, self.settings.judges()
        stopped = [(key, judge.stopped) for key, judge in judges.items() if judge.stopped]
        paid = self.answers - sum(judge.stats().cache_hits for judge in judges.values())
        if paid > 0 and not stopped and self.signal is None:
            for entry in self.rejected.values():  # others were answered: it is the row
                self._add_to_quarantine(entry)
        else:
            self.missed |= self.rejected
        self.quarantine.write()
        # An interrupted run has not seen all rows: it must not shrink a file that an earlier one wrote.
        whole = not self.unsettled or (settings.partial and self.signal is None)
        written = self._write() if whole else None
        return self._status(written, stopped)

    def _status(self, written: int | None, stopped: list[tuple[str, RunStopped]]) -> tuple[int, str]:
        status, why = 0, ""
        if not self.unsettled and not written:
            status, why = 1, f"out: {self.settings.out} was not written, since no row has a caption."
        elif self.unsettled and self.signal is not None:
            name = signal.Signals(self.signal).name
            status, why = 128 + self.signal, f"Stopped by {name}; the same command goes on from here."
        elif self.unsettled and stopped:
            key, reason = stopped[0]
            status = 0 if isinstance(reason, BudgetSpent) else 1
            why = f"{own_keys(str(reason), key)}. The same command goes on from here."
        elif self.unsettled:
            *_, last = self.missed.values()
            status, why = 1, f"Left since ({_kinds(self.missed.values())}), the last one: {last.reason}. "
            why += "The same command asks again"
            why += "." if self.settings.partial else "; --partial true writes what is there."
        return status, f"{self._summary(written)}\n{why}".strip()

    def _write(self) -> int:
        """Write `out`; the number of its rows. Nothing is written where there is none.

        Raises:
            DataError: the data set is another one than when the run began.
        """
        settings = self.settings
        if not self.answered:
            return 0
        rows, digest = raw_rows(str(settings.data), settings.name, settings.cache_dir)
        if digest != self.digest:
            raise DataError(
                f"data: {settings.data} has changed while its rows were captioned. Put back what it was and "
                "run the same command: nothing is paid for again"
            )
        models = asked_model(self.judge, Recaption), asked_model(self.decomposer, Decompose)

        def new_rows() -> Iterator[dict[str, Any]]:
            for row, raw in enumerate(rows):
                if row in self.answered:
                    caption, units = json.loads(self.answered[row])
                    decomposed = None if units is None else (units, models[1])
                    prompts, keep = settings.prompts or (), settings.keep_original
                    yield output_row(raw, (caption, models[0]), decomposed, prompts, settings.seed, keep)

        return write_rows(settings.out_path, new_rows())

    def _summary(self, written: int | None) -> str:
        """``2,990 of 3,000 rows are captioned (data/new.json); 10 in quarantine (…); $1.20 in this run.``"""
        where = f" ({self.settings.out})" if written else ""
        total = len(self.rows) + len(self._bad)
        parts = [f"{len(self.answered):,} of {total:,} rows are captioned{where}"]
        if self.quarantine:
            kinds = _kinds(self.quarantine.values())
            parts.append(f"{len(self.quarantine):,} in quarantine ({kinds}: {self.quarantine.path})")
        if self.unsettled:
            parts.append(f"{len(self.unsettled):,} left for the next run")
        parts.append(f"${self.dollars():.2f} in this run")
        if unpriced := sum(judge.stats().unpriced_calls for judge in self.settings.judges().values()):
            parts.append(f"{unpriced:,} calls have no known price (judge.prices)")
        return "; ".join(parts) + "."


def _kinds(entries: Iterable[QuarantinedRow]) -> str:
    """``refused 8, missing_file 4``."""
    return ", ".join(f"{kind} {count:,}" for kind, count in Counter(e.kind for e in entries).most_common())


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., None]]:
    """Shows how far the rows of a run are, what they cost, and how many are in quarantine: a bar in a terminal,
    elsewhere a line now and then.

    Yields ``show(run, final=False)``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, refresh_per_second=4, disable=not sys.stdout.isatty())
    task, last = bar.add_task("", total=total), -math.inf

    def show(run: RecaptionRun, final: bool = False) -> None:
        nonlocal last
        done = total - len(run.unsettled)
        spent = f"${run.dollars():.2f}  {len(run.quarantine)} quarantined"
        bar.update(task, completed=done, description=spent)
        if bar.disable and (final or time.monotonic() - last >= PLAIN_EVERY_S):
            last = time.monotonic()
            print(f"{done}/{total} rows  {spent}", flush=True)

    with bar:
        yield show


@contextmanager
def _signals(handle: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handle`; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: handle(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run(settings: RecaptionSettings) -> tuple[int, str]:
    """A run, see `RecaptionRun.run`; its errors are messages for who typed the command (SystemExit)."""
    try:
        return RecaptionRun(settings).run()
    except (DataError, StoreError) as error:
        raise SystemExit(own_keys(str(error))) from None
    except OSError as error:
        raise SystemExit(
            f"out: cannot write {error.filename or settings.out} ({error.strerror}). What was paid for is kept: "
            "run the same command once there is room, and a folder that you may write to"
        ) from None
    except KeyboardInterrupt:  # before the first question
        raise SystemExit(128 + signal.SIGINT) from None
