"""The captions that a run has logged, as columns: Parquet in, NumPy and Arrow out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

PARTS = ("precision", "recall", "linguistic")


@dataclass(frozen=True)
class Captions:
    """Some captions of a run: ``N`` rows of the rollout log (`callbacks.rollout_log.rollout_table`).

    Attributes:
        table: ``[N]`` rows.
    """

    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> Any:
        """``[N]`` numbers as float64, NaN where missing."""
        if name not in self.table.column_names:
            return np.full(len(self), np.nan)
        return self.table[name].cast("float64").to_numpy(zero_copy_only=False).astype(float)

    def texts(self, name: str) -> list[str]:
        """``[N]`` texts."""
        return self.table[name].to_pylist()

    @cached_property
    def length_ratio(self) -> np.ndarray:
        """``[N]`` caption tokens per reference token; NaN without a reference."""
        reference = self.column("reference_length")
        return self.column("length") / np.where(reference > 0, reference, np.nan)

    @property
    def judged(self) -> bool:
        """Whether there is a judgment of any of them, or no column that would tell."""
        names = set(self.table.column_names) & {"true", "covered", "clarity"}
        return not names or any(self.table[name].null_count < len(self) for name in names)

    def values(self, name: str) -> np.ndarray:
        """``[N]`` of a reward by its name, of ``b_capscore`` or of ``length_ratio``; NaN where missing."""
        if name == "length_ratio":
            return self.length_ratio
        if name == "b_capscore":
            import torch

            from balcap.rewards import b_capscore

            return b_capscore(*(torch.from_numpy(self.column(f"reward/{part}")) for part in PARTS)).numpy()
        return self.column(f"reward/{name}")

    def scores(self, name: str) -> dict[str, float]:
        """Image -> mean of a value over its captions; without those that are missing."""
        totals: dict[str, list[float]] = {}
        for image, value in zip(self.texts("sample_id"), self.values(name).tolist(), strict=True):
            if value == value:
                totals.setdefault(image, []).append(value)
        return {image: sum(values) / len(values) for image, values in totals.items()}

    def rows(self, places: Any) -> list[dict[str, Any]]:
        """Some rows as plain Python values."""
        return self.table.take(np.asarray(places, dtype=np.int64)).to_pylist()


@dataclass(frozen=True)
class Rollouts:
    """All captions that a run has logged.

    Attributes:
        folder: of the Parquet files.
        train: captions of training steps; None where none were logged.
        validations: step -> captions of that validation, in order of steps.
        unreadable: files that could not be read.
    """

    folder: Path
    train: Captions | None
    validations: Mapping[int, Captions]
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Rollouts:
        """Read a folder, which may be empty or missing."""
        tables: dict[str, list[pa.Table]] = {}
        unreadable = []
        for path in sorted(folder.glob("*.parquet")):
            stage = path.name.split("-")[0]
            try:
                tables.setdefault(stage, []).append(_read(path))
            except (OSError, ValueError) as error:  # pyarrow's errors are among them
                unreadable.append(f"{path.name}: {error}")
        train = _together(tables.get("train", []))
        held_out = _together(tables.get("val", []) or tables.get("validate", []))
        validations = {} if held_out is None else _by_step(held_out)
        return cls(folder, None if train is None else Captions(train), validations, unreadable)

    @property
    def ends(self) -> tuple[Captions | None, Captions | None]:
        """The first and the last validation; (None, last) where there is only one, (None, None) without."""
        steps = list(self.validations.values())
        if len(steps) < 2:
            return None, steps[0] if steps else None
        return steps[0], steps[-1]

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Of the rewards that the files hold."""
        some = [self.train, *self.validations.values()]
        names = [name for captions in some if captions is not None for name in captions.table.column_names]
        return tuple(dict.fromkeys(name.split("/", 1)[1] for name in names if name.startswith("reward/")))


def _read(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read()
    missing = {"sample_id", "caption", "step", "length", "reference_length"} - set(table.column_names)
    if missing:
        raise ValueError(f"not a rollout log: {', '.join(sorted(missing))} are missing")
    return table


def _together(tables: list[pa.Table]) -> pa.Table | None:
    import pyarrow as pa

    # A run that went on with other rewards has files with other columns: what a file lacks is null.
    return pa.concat_tables(tables, promote_options="default").combine_chunks() if tables else None


def _by_step(table: pa.Table) -> dict[int, Captions]:
    import pyarrow.compute as pc

    steps = sorted(table["step"].unique().to_pylist())
    return {step: Captions(table.filter(pc.equal(table["step"], step))) for step in steps}
