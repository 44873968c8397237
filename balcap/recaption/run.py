"""One run: rows in, captions and what they assert out, each paid for once.

Rows are worked on in chunks of as many captions as one call decomposes. At most twice as many rows as there
are calls at once hold their image in memory; the others wait as numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from balcap.data.images import BadImage
from balcap.data.reader import ImageFolder, prompt_for
from balcap.data.sharegpt4v import DataError, load_rows, raw_rows
from balcap.judge import BudgetSpent, Judge, JudgeFailure
from balcap.judge.tasks import Decompose
from balcap.judge.tasks.recaption import Recaption
from balcap.recaption.checks import own_keys
from balcap.recaption.journal import Journal, Quarantined
from balcap.recaption.output import append_quarantined, output_row, write_quarantine, write_rows
from balcap.recaption.plan import asked_model, identity, plan_rows
from balcap.recaption.progress import RecaptionProgress
from balcap.recaption.settings import Outcome, Recaptioner

PASSING = frozenset(("limited", "timeout", "server", "connection", "denied", "stopped"))
"""Failures that say nothing about the row: the next run asks again."""

GRACE_S = 5.0
"""Seconds that answers under way get to arrive after Ctrl-C."""

READERS = 4
"""Threads that read images and check that they can be decoded."""


class Run:
    """One run. `run` is all there is to call.

    Attributes:
        todo: rows that this run asks about.
        unsettled: those of `todo` that have neither their caption nor a place in quarantine yet.
        listed: rows in quarantine, with the reason.
        missed: rows whose answer did not come, for a reason that passes.
        rejected: rows that the provider would not take. Whether that is the row's fault or, for instance, the
            key's, is known when the run ends.
        answers: that judges gave in this run.
        signal: that ends the run; None while there is none.
    """

    def __init__(self, settings: Recaptioner) -> None:
        assert settings.judge is not None
        assert settings.data is not None
        assert settings.image_root is not None
        self.settings, self.judge = settings, settings.judge
        self.decomposer = settings.decompose_judge or settings.judge
        self.images = ImageFolder(
            settings.image_root, settings.max_pixels_in_file, settings.link_targets or ()
        )
        self.table, self.digest = load_rows(settings.data, settings.name, settings.cache_dir)
        self.plan = plan_rows(settings, self.table)
        self.journal = Journal(settings.files.journal, identity(settings, self.digest))
        known = self.journal.quarantined
        self.listed = {entry.row: entry for entry in self.plan.bad}
        self.listed |= {row: known[row] for row in self.plan.rows if row in known}
        asked_again = set(known) if settings.retry_quarantined else set()
        self.todo = [
            row
            for row in self.plan.rows
            if row in asked_again or not (row in known or self._is_complete(row))
        ]
        self.unsettled = set(self.todo)
        self.missed: dict[int, Quarantined] = {}
        self.rejected: dict[int, Quarantined] = {}
        self.answers = 0
        self.signal: int | None = None
        self.progress = RecaptionProgress(len(self.plan), len(self.plan) - len(self.todo), self._dollars)

    def run(self) -> Outcome:
        """Ask about what is to do, then write what can be written."""
        try:
            write_quarantine(self.settings.files.quarantine, self.listed.values())
            if self.todo:
                with self.progress, ThreadPoolExecutor(READERS, "balcap-images") as self.readers:
                    asyncio.run(self._work())
            return self._finish()
        finally:
            for judge in self._judges().values():
                judge.close()
            self.journal.close()

    # ---- asking

    async def _work(self) -> None:
        """Feed rows until all are done or something ends the run; nothing is under way when it returns."""
        interrupted = asyncio.Event()

        def interrupt(number: int) -> None:
            self.signal = number
            interrupted.set()

        with _signals(interrupt):
            feeding = asyncio.create_task(self._feed())
            ending = asyncio.create_task(interrupted.wait())
            while not feeding.done() and not ending.done():
                await asyncio.wait({feeding, ending}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                self._show()
            if ending.done():
                await asyncio.wait({feeding}, timeout=GRACE_S)
            ending.cancel()
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await feeding

    async def _feed(self) -> None:
        size = 1
        if self.settings.decompose:
            size = (self.decomposer.settings.per_call or {}).get(Decompose.name, Decompose.per_call)
        size = max(1, min(size, 2 * self.judge.settings.concurrency))
        places = asyncio.Semaphore(2 * self.judge.settings.concurrency // size)
        try:
            async with asyncio.TaskGroup() as chunks:
                for start in range(0, len(self.todo), size):
                    await places.acquire()
                    if self._is_stopping():
                        break
                    chunk = chunks.create_task(self._chunk(self.todo[start : start + size]))
                    chunk.add_done_callback(lambda _: places.release())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None

    def _is_stopping(self) -> bool:
        return self.signal is not None or any(judge.stopped for judge in self._judges().values())

    async def _chunk(self, rows: Sequence[int]) -> None:
        found = await asyncio.gather(*(self._caption(row) for row in rows))
        captions = {row: caption for row, caption in zip(rows, found, strict=True) if caption is not None}
        if not self.settings.decompose:
            for row in captions:
                self._settle(row)
        elif captions and not self._is_stopping():
            answers = await self.decomposer.ask(Decompose, list(captions.values()))
            for row, units in zip(captions, answers, strict=True):
                self._decomposed(row, units)

    async def _caption(self, row: int) -> str | None:
        """The row's caption: from the journal, or asked for and journalled; None where there is none."""
        if self.journal.has_caption(row):
            return self.journal.caption(row)[0]
        if self._is_stopping():
            return None
        flat, settings = self.table[row], self.settings
        image = flat["sample_id"]
        try:
            data = await asyncio.get_running_loop().run_in_executor(self.readers, self._read, image)
        except BadImage as bad:
            self._quarantine(Quarantined(row, image, bad.cause, own_keys(bad.detail)), keep=False)
            return None
        question = prompt_for(image, flat["question"], settings.prompts or (), settings.seed)
        (answer,) = await self.judge.ask(Recaption, [question], image=data)
        if isinstance(answer, JudgeFailure):
            self._failed(row, answer, "judge")
            return None
        self.answers += 1
        self.journal.add_caption(row, image, answer, asked_model(self.judge, Recaption))
        return answer

    def _read(self, image: str) -> bytes:
        return self.images.read(image)[0]

    def _decomposed(self, row: int, units: list[str] | JudgeFailure) -> None:
        image = self.table[row]["sample_id"]
        if isinstance(units, JudgeFailure):
            self._failed(row, units, "decompose_judge" if self.settings.decompose_judge else "judge")
        elif not units:
            self._quarantine(Quarantined(row, image, "no_units", "the new caption asserts nothing"))
        else:
            self.answers += 1
            self.journal.add_units(row, image, units, asked_model(self.decomposer, Decompose))
            self._settle(row)

    # ---- what became of a row

    def _is_complete(self, row: int) -> bool:
        return self.journal.has_caption(row) and (not self.settings.decompose or self.journal.has_units(row))

    def _settle(self, row: int) -> None:
        self.unsettled.discard(row)
        self.listed.pop(row, None)
        self._show()

    def _failed(self, row: int, failure: JudgeFailure, judge: str) -> None:
        entry = Quarantined(row, self.table[row]["sample_id"], failure.kind, own_keys(str(failure), judge))
        if failure.kind in PASSING:
            self.missed[row] = entry
        elif failure.kind == "rejected":
            self.rejected[row] = entry
        else:
            # An image that cannot be sent costs nothing to look at again, and may have been repaired then.
            self._quarantine(entry, keep=failure.kind != "image")

    def _quarantine(self, entry: Quarantined, keep: bool = True) -> None:
        """List the row; `keep` it in the journal too, so that only `retry_quarantined` asks again."""
        if keep:
            self.journal.add_quarantined(entry)
        self.listed[entry.row] = entry
        append_quarantined(self.settings.files.quarantine, entry)
        self.unsettled.discard(entry.row)
        self._show()

    def _judges(self) -> dict[str, Judge]:
        """The judges by their keys, each once."""
        judges = {"judge": self.judge}
        return judges if self.decomposer is self.judge else {**judges, "decompose_judge": self.decomposer}

    def _dollars(self) -> float:
        return sum(judge.stats().cost_usd for judge in self._judges().values())

    def _show(self) -> None:
        self.progress.done = len(self.plan) - len(self.unsettled)
        self.progress.quarantined = len(self.listed)
        self.progress.show()

    # ---- the end

    def _finish(self) -> Outcome:
        """Write the files; how the run ended."""
        settings = self.settings
        stopped = [(key, judge.stopped) for key, judge in self._judges().items() if judge.stopped]
        if self.answers and not stopped and self.signal is None:
            for entry in self.rejected.values():  # others were answered: it is the row
                self._quarantine(entry)
        else:
            self.missed |= self.rejected
        write_quarantine(settings.files.quarantine, self.listed.values())
        written = self._write() if settings.partial or not self.unsettled else None
        status, why = 0, ""
        if self.signal is not None and self.unsettled:
            name = signal.Signals(self.signal).name
            status, why = 128 + self.signal, f"Stopped by {name}; the same command goes on from here."
        elif stopped and self.unsettled:
            key, reason = stopped[0]
            status = 0 if isinstance(reason, BudgetSpent) else 1
            why = f"{own_keys(str(reason), key)}. The same command goes on from here."
        elif self.unsettled:
            status, why = 1, self._why_left()
        elif written is None:
            status, why = 1, f"out: {settings.out} was not written, since no row has a caption."
        message = "\n".join(filter(None, (self._summary(written), why)))
        return Outcome(status, message, written, len(self.listed), len(self.unsettled))

    def _write(self) -> int | None:
        """Write `out`; the number of its rows, None where there is nothing to write.

        Raises:
            DataError: the data set is another one than when the run began.
        """
        settings = self.settings
        done = {row for row in self.plan.rows if row not in self.listed and self._is_complete(row)}
        if not done:
            return None
        rows, digest = raw_rows(str(settings.data), settings.name, settings.cache_dir)
        if digest != self.digest:
            raise DataError(
                f"data: {settings.data} has changed while its rows were captioned. Put back what it was and "
                "run the same command: nothing is asked again"
            )
        units = self.journal.units if settings.decompose else lambda row: None
        new = (
            output_row(
                raw,
                self.journal.caption(row),
                units(row),
                settings.prompts or (),
                settings.seed,
                settings.keep_original,
            )
            for row, raw in enumerate(rows)
            if row in done
        )
        return write_rows(settings.files.out, new)

    def _summary(self, written: int | None) -> str:
        """``2,990 of 3,000 rows are captioned (data/new.json); 10 in quarantine (…); $1.20 in this run.``"""
        captioned = len(self.plan) - len(self.unsettled | self.listed.keys())
        where = f" ({self.settings.out})" if written else ""
        parts = [f"{captioned:,} of {len(self.plan):,} rows are captioned{where}"]
        if self.listed:
            quarantine = self.settings.files.quarantine
            parts.append(f"{len(self.listed):,} in quarantine ({_kinds(self.listed.values())}: {quarantine})")
        if self.unsettled:
            parts.append(f"{len(self.unsettled):,} left for the next run")
        parts.append(f"${self._dollars():.2f} in this run")
        if unpriced := sum(judge.stats().unpriced_calls for judge in self._judges().values()):
            parts.append(f"{unpriced:,} calls have no known price (judge.prices)")
        return "; ".join(parts) + "."

    def _why_left(self) -> str:
        why = f"Left for the next run ({_kinds(self.missed.values())}), the last one since: "
        why += next(reversed(self.missed.values())).reason + ". "
        if self.settings.partial:
            return why + "The same command asks again."
        return why + (
            f"out: {self.settings.out} was not written. The same command asks again; --partial true writes "
            "what is there."
        )


def _kinds(entries: Iterable[Quarantined]) -> str:
    """``refused 8, missing_file 4``."""
    return ", ".join(f"{kind} {count:,}" for kind, count in Counter(e.kind for e in entries).most_common())


@contextlib.contextmanager
def _signals(handle: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handle` on the running event loop; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {
        number: signal.signal(number, lambda found, _: loop.call_soon_threadsafe(handle, found))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
