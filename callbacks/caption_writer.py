"""Captions of ``predict``, one JSON line each, on disk as soon as they exist."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from balcap.utils.files import append_jsonl, atomic_write, read_jsonl


class CaptionWriter(BasePredictionWriter):
    """Appends ``{"image", "prompt", "caption", "truncated"}`` lines; images that are in the file are not captioned again.

    With several ranks, rank r > 0 writes ``captions.rank<r>.jsonl`` beside it.

    What the captions depend on is kept in ``captions.settings.json``: a file never mixes captions of two models.

    Args:
        path: set from the run folder.

    Attributes:
        settings: by their full names, what the captions depend on; None keeps and compares nothing.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("batch")
        self.path = path
        self.settings: dict[str, Any] | None = None
        self._file: Path | None = None

    def problems(self) -> list[str]:
        """What the captions that are there already were made with, where that is something else."""
        path = Path(self.path or "captions.jsonl")
        kept = path.with_suffix(".settings.json")
        if (
            self.settings is None
            or not kept.is_file()
            or not any(part.stat().st_size for part in _parts(path))
        ):
            return []
        before, now = json.loads(kept.read_text()), json.loads(json.dumps(self.settings))
        return [
            f"{name}: {path} was made with {before.get(name)}, not {value}; choose another folder with --run_dir"
            for name, value in now.items()
            if before.get(name) != value
        ]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        first = Path(self.path or Path(trainer.default_root_dir) / "captions.jsonl")
        first.parent.mkdir(parents=True, exist_ok=True)
        rank = trainer.global_rank
        self._file = first if rank == 0 else first.with_suffix(f".rank{rank}.jsonl")
        _drop_torn_line(self._file)
        if rank == 0 and self.settings is not None:
            with atomic_write(first.with_suffix(".settings.json")) as file:
                json.dump(self.settings, file, indent=2)
        done = {row["image"] for file in _parts(first) for row in read_jsonl(file)}
        if done:
            trainer.datamodule.skip(done)  # type: ignore[attr-defined]
            rank_zero_info(f"{first}: {len(done)} captions are there already, their images are left out")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._file is not None
        append_jsonl(self._file, prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = trainer.datamodule.bad_row_counts()  # type: ignore[attr-defined]
        skipped = ", ".join(f"{n} {cause}" for cause, n in counts.items())
        rank_zero_info(f"captions: {self._file}" + (f"; skipped: {skipped}" if skipped else ""))


def _parts(first: Path) -> list[Path]:
    return [p for p in (first, *first.parent.glob(f"{first.stem}.rank*.jsonl")) if p.exists()]


def _drop_torn_line(file: Path) -> None:
    """Remove what a kill has left of a last line, so that every line of the file is whole."""
    data = file.read_bytes() if file.exists() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)
