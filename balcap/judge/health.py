"""Whether asking on makes sense."""

from __future__ import annotations

from collections import deque

from balcap.judge.errors import FailureKind

LEAST = 8  # failures before anything is concluded
RECENT = 100  # judgments of a kind that count
# Of one image or caption, however many captions it has: they say nothing about the next.
_CONTENT = {"refused", "filtered", "too_long", "cut"}


class Health:
    """The recent judgments that failed, for each kind of judgment: one may have a judge of its own.

    The judge counts as unavailable when more than a share of the recent judgments of a kind failed, or when
    nothing has come for a while: eight failures in a row, of one kind or over all, that are not about what
    was asked.

    Args:
        max_failed_share: in (0, 1]; 1 switches both off.
    """

    def __init__(self, max_failed_share: float):
        self.max_failed_share = max_failed_share
        self._recent: dict[str, deque[bool]] = {}
        self._in_a_row: dict[str, int] = {}
        self._in_a_row_over_all = 0

    def succeeded(self, task: str) -> None:
        """A judgment of this kind came."""
        self._window(task).append(False)
        self._in_a_row[task] = self._in_a_row_over_all = 0

    def failed(self, task: str, kind: FailureKind) -> str | None:
        """A judgment is missing for good; what that says about the judge, None if nothing."""
        recent = self._window(task)
        recent.append(True)
        if kind not in _CONTENT:
            self._in_a_row[task] = self._in_a_row.get(task, 0) + 1
            self._in_a_row_over_all += 1
        if self.max_failed_share >= 1:
            return None
        failures = sum(recent)
        if failures >= LEAST and failures > self.max_failed_share * len(recent):
            return f"{failures} of the last {len(recent)} judgments of the kind {task} failed"
        if (in_a_row := self._in_a_row.get(task, 0)) >= LEAST:
            return f"the last {in_a_row} judgments of the kind {task} failed"
        if self._in_a_row_over_all >= LEAST:
            return f"the last {self._in_a_row_over_all} judgments failed"
        return None

    def _window(self, task: str) -> deque[bool]:
        return self._recent.setdefault(task, deque(maxlen=RECENT))
