"""What ran when, as one file for a trace viewer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from balcap.trainer.timeline import Span
from balcap.utils.files import atomic_write


class ChromeTrace(Callback):
    """Writes the stages of training steps as Chrome trace events: open the file in https://ui.perfetto.dev.

    One row per rank for the trainer (rollout, judge_wait, update, sync) and one for its judge, whose spans run
    from a batch's first question to its last answer. The file is complete after every step.

    Args:
        steps: how many steps to record, from the first one; 0 writes no file.
        path: where to write; a rank other than 0 appends its number. Set from the run folder.
    """

    def __init__(self, steps: int = 0, path: str | None = None) -> None:
        self.steps, self.path = steps, path
        self._recorded = 0
        self._zero = 0.0
        self._events: list[str] = []

    def problems(self) -> list[str]:
        """What is out of range, with the key to change."""
        return [] if self.steps >= 0 else [f"trace.steps: {self.steps} must be at least 0"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorded >= self.steps or self.path is None:
            return
        spans: list[Span] = pl_module.pipeline.timeline.spans  # type: ignore[union-attr,assignment]
        rank = trainer.global_rank
        if not self._events:
            self._zero = min((span.start for span in spans), default=0.0)
            for tid, track in enumerate(TRACKS):
                name = {"name": "thread_name", "ph": "M", "pid": rank, "tid": tid, "args": {"name": track}}
                self._events.append(json.dumps(name))
        for span in sorted(spans, key=lambda span: span.start):
            event = {
                "name": span.name,
                "ph": "X",
                "pid": rank,
                "tid": TRACKS.index(span.track),
                "ts": round(1e6 * (span.start - self._zero)),
                "dur": round(1e6 * span.seconds),
                "args": {"step": trainer.global_step, "batch": trainer.fit_loop.total_batch_idx},
            }
            self._events.append(json.dumps(event))
        self._recorded += 1
        path = Path(self.path if rank == 0 else f"{self.path}.{rank}")
        with atomic_write(path) as file:
            file.write("[\n" + ",\n".join(self._events) + "\n]\n")


TRACKS = ("trainer", "judge")
