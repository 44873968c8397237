"""What ran when: seconds per stage for the metrics, spans for a trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
    """

    BUSY = ("rollout", "update", "sync")
    """Spans in which the trainer's device has work."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.spans: list[Span] = []
        self._began = time.perf_counter()

    def begin(self) -> None:
        """A new step: forget the spans of the last one."""
        self.spans, self._began = [], time.perf_counter()

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
        return out | {"step": time.perf_counter() - self._began}

    def idle_share(self) -> float:
        """Share of the step, in [0, 1], in which the trainer's device had nothing to do."""
        seconds = self.seconds()
        return max(0.0, 1 - sum(seconds.get(name, 0.0) for name in self.BUSY) / max(seconds["step"], 1e-9))
