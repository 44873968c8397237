"""The bar of a run: rows, pace, dollars. Plain lines where stdout is not a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn


class RecaptionProgress:
    """Shows how far the rows are; a context manager around the run.

    Args:
        total: rows that take part, those that earlier runs have settled included.
        done: rows that earlier runs have settled.
        dollars: US dollars that this run has spent so far.
        plain_every_s: seconds between two plain lines.
    """

    def __init__(
        self, total: int, done: int, dollars: Callable[[], float], plain_every_s: float = 15.0
    ) -> None:
        self.total, self.done, self.quarantined = total, done, 0
        self.plain_every_s = plain_every_s
        self._dollars = dollars
        self._before, self._start, self._last_line = done, time.monotonic(), -math.inf
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("Captions"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, refresh_per_second=4)
            self._bar_id = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> RecaptionProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show(final=True)
        if self._bar is not None:
            self._bar.stop()

    def show(self, final: bool = False) -> None:
        """Move the bar; or print a line, if `final` or the last one is old enough."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar_id, completed=self.done, description=self.status(now))
        elif final or now - self._last_line >= self.plain_every_s:
            self._last_line = now
            print(self.status(now), flush=True)

    def status(self, now: float) -> str:
        """``120/3000 captions  4.1 rows/s  0:11:42 left  $0.12 of about $2.97  3 quarantined``.

        The projection is what this run has spent per row that it has settled, for the rows that are left.
        """
        fresh, left = self.done - self._before, self.total - self.done
        seconds, dollars = now - self._start, self._dollars()
        parts = [f"{self.done}/{self.total} rows"]
        if fresh and seconds > 0:
            pace = fresh / seconds
            parts += [f"{pace:.1f} rows/s", f"{timedelta(seconds=round(left / pace))} left"]
            parts.append(f"${dollars:.2f} of about ${dollars * (1 + left / fresh):.2f}")
        else:
            parts.append(f"${dollars:.2f}")
        return "  ".join([*parts, f"{self.quarantined} quarantined"])
