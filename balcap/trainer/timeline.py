"""What ran when: seconds per stage for the metrics, spans for a trace."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Attributes:
        name: what, such as ``update``.
        track: who: ``trainer`` is the process that holds the device, ``judge`` waits for the network.
        start, end: seconds of `time.perf_counter`.
    """

    name: str
    track: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """Spans of one training step after the other.

    Args:
        synchronize: called before a span of the trainer ends, so that work queued on a device counts where it
            was queued.

    Attributes:
        spans: of the step so far.
        began: when the step did, in seconds of `time.perf_counter`.
    """

    BUSY = ("rollout", "update", "sync")
    """Spans in which the trainer's device has work."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.spans: list[Span] = []
        self.began = time.perf_counter()

    def begin(self) -> None:
        """A new step: forget the spans of the last one."""
        self.spans, self.began = [], time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record what the trainer does within the block."""
        start = time.perf_counter()
        yield
        self.synchronize()
        self.add(name, "trainer", start, time.perf_counter())

    def add(self, name: str, track: str, start: float, end: float) -> None:
        """Record what ran elsewhere; it may have begun in an earlier step."""
        self.spans.append(Span(name, track, start, end))

    def seconds(self) -> dict[str, float]:
        """Name -> seconds in this step, ``step`` for all of it so far."""
        out: dict[str, float] = {}
        for span in self.spans:
            out[span.name] = out.get(span.name, 0.0) + span.seconds
        return out | {"step": time.perf_counter() - self.began}

    def idle_share(self) -> float:
        """Share of the step, in [0, 1], in which the trainer's device had nothing to do."""
        seconds = self.seconds()
        return max(0.0, 1 - sum(seconds.get(name, 0.0) for name in self.BUSY) / max(seconds["step"], 1e-9))


def merged(intervals: Iterable[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float]]:
    """Union of intervals (start, end), in order; those that are at most `gap` apart become one."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if out and start - out[-1][1] <= gap:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


def innermost(intervals: Iterable[tuple[float, float]]) -> int:
    """How many intervals (start, end) hold no other one; any two of them are nested or apart, as calls of a thread are."""
    ordered = sorted(intervals, key=lambda interval: (interval[0], -interval[1]))
    return sum(following[0] >= end for (_, end), following in pairwise([*ordered, (math.inf, math.inf)]))
