"""What ran when, as one file for a trace viewer."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from balcap.trainer.timeline import Span, innermost, merged
from balcap.utils.files import atomic_write

log = logging.getLogger(__name__)

TRACKS = ("trainer", "judge", "device")
GAP_S = 20e-6
"""Kernels that are at most so far apart are one event of the trace."""
MOST_EVENTS = 10_000
"""Events of the device in one step, beyond which they are merged further."""


class ChromeTrace(Callback):
    """Writes the stages of training steps as Chrome trace events: open the file in https://ui.perfetto.dev.

    One row per rank for the trainer (rollout, judge_wait, update, sync), one for its judge, whose spans run from a
    batch's first question to its last answer, and one for its device, empty on a CPU: kernels and copies, as one event
    where there are at most 20 microseconds between them. The file is complete after every step.

    torch's profiler runs in these steps, which are slower by that. They log two more metrics, of this rank:
    ``time/device_busy``, the share of the step in [0, 1] in which a kernel or a copy ran on the device (not on a CPU, which
    runs the program as well), and ``time/operators``, how many ATen operators the host issued in the update: those that
    called no other one, views included.

    Args:
        steps: how many steps to record, from the first one; 0 writes no file.
        path: where to write; a rank other than 0 appends its number. Set from the run folder.
    """

    def __init__(self, steps: int = 0, path: str | None = None) -> None:
        self.steps, self.path = steps, path
        self._recorded = 0
        self._zero = 0.0
        self._events: list[str] = []
        self._profile: StepProfile | None = None

    def problems(self) -> list[str]:
        """What is out of range, with the key to change."""
        return [] if self.steps >= 0 else [f"trace.steps: {self.steps} must be at least 0"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._recorded < self.steps and self.path is not None:
            self._profile = StepProfile()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is None or self.path is None:
            return
        timeline: Any = pl_module.pipeline.timeline  # type: ignore[union-attr]
        spans: list[Span] = timeline.spans
        recorded, self._profile = self._profile, None
        step = Span("step", "trainer", timeline.began, time.perf_counter())
        recorded.stop()
        if updates := [span for span in spans if span.name == "update"]:
            pl_module.log_dict(recorded.metrics(step, updates), batch_size=1)
        if not recorded.kernels and pl_module.device.type == "cuda":
            log.warning(
                "trace.steps: the profiler saw nothing of the device, so there is no time/device_busy; its permissions "
                "(CUPTI) may be missing"
            )
        rank = trainer.global_rank
        if not self._events:
            self._zero = min((span.start for span in spans), default=0.0)
            for tid, track in enumerate(TRACKS):
                name = {"name": "thread_name", "ph": "M", "pid": rank, "tid": tid, "args": {"name": track}}
                self._events.append(json.dumps(name))
        counts = {"step": trainer.global_step, "batch": trainer.fit_loop.total_batch_idx}
        for span in sorted([*spans, *recorded.device_spans()], key=lambda span: span.start):
            event = {
                "name": span.name,
                "ph": "X",
                "pid": rank,
                "tid": TRACKS.index(span.track),
                "ts": round(1e6 * (span.start - self._zero)),
                "dur": round(1e6 * span.seconds),
                "args": counts,
            }
            self._events.append(json.dumps(event))
        self._recorded += 1
        path = Path(self.path if rank == 0 else f"{self.path}.{rank}")
        with atomic_write(path) as file:
            file.write("[\n" + ",\n".join(self._events) + "\n]\n")


class StepProfile:
    """What torch's profiler sees from now until it is stopped; times are seconds of `time.perf_counter`.

    Attributes:
        kernels: (start, end) of what ran on the device, in any order.
        operators: thread -> (start, end) of its ATen operators.
    """

    _MARK = "balcap: the time now"

    def __init__(self) -> None:
        if not torch.cuda.is_available():  # the profiler says so once more, in lines of its own
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self.kernels: list[tuple[float, float]] = []
        self.operators: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._profile = profile()
        self._profile.start()
        for _ in range(3):  # the profiler has a clock of its own; the first call is slow
            with record_function(self._MARK):
                self._now = time.perf_counter()

    def stop(self) -> None:
        """Stop, and read what was seen."""
        self._profile.stop()
        # The profiler's own list of events takes a minute to build where a step has a million of them.
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        then = max(event.start_ns() for event in events if event.name() == self._MARK)
        for event in events:
            interval = tuple(self._now + 1e-9 * (ns - then) for ns in (event.start_ns(), event.end_ns()))
            if event.device_type() != DeviceType.CPU:
                if not event.is_user_annotation():
                    self.kernels.append(interval)  # type: ignore[arg-type]
            elif event.name().startswith("aten::"):
                self.operators[event.start_thread_id()].append(interval)  # type: ignore[arg-type]

    def metrics(self, step: Span, updates: Sequence[Span]) -> dict[str, float]:
        """``time/operators``, and ``time/device_busy`` where anything ran on a device; see `ChromeTrace`.

        Args:
            step: all of it.
            updates: of the step.
        """
        issued = sum(
            innermost(one for one in calls if any(span.start <= one[0] < span.end for span in updates))
            for calls in self.operators.values()
        )
        metrics = {"time/operators": float(issued)}
        if self.kernels:
            parts = [(max(start, step.start), min(end, step.end)) for start, end in merged(self.kernels)]
            busy = sum(max(0.0, end - start) for start, end in parts)
            metrics["time/device_busy"] = busy / step.seconds
        return metrics

    def device_spans(self) -> list[Span]:
        """What ran on the device, at most `MOST_EVENTS`."""
        gap, parts = GAP_S, merged(self.kernels, GAP_S)
        while len(parts) > MOST_EVENTS:
            gap *= 2
            parts = merged(parts, gap)
        return [Span("kernels", "device", start, end) for start, end in parts]
