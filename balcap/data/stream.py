"""Batches for training, without end and resumable to the row, and batches for validation and prediction.

Training: each data worker of each rank plays one shard (`balcap.data.order`). Bad rows are skipped and their
places filled from the rows behind them, so that every batch of every rank has `batch_size` images. A rank's
batch number b comes from its shard ``b % workers``, the order in which `DataLoader` asks its workers.

The stream's position counts the batches that were *consumed*, not what workers have prefetched: each batch
carries a `Cursor`, and whoever has trained on it hands the cursor back. A pass begins behind the batches that were *taken*,
of which one may still wait for its judgments.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from balcap.data.bad_rows import TooManyBadRows
from balcap.data.json_files import DataError
from balcap.data.order import common_position, image_hash, positions_from, read_order, rows_per_epoch
from balcap.data.reader import RowReader, Sample, to_batch
from balcap.data.settings import DataSettings
from balcap.types import CaptionBatch, Cursor

log = logging.getLogger(__name__)

LEAST_ROWS_READ = 50
"""The share of bad rows is not judged on fewer rows than this."""

LONGEST_SEARCH = 1000
"""So many bad rows one after another, or all there are, mean that there is no good one."""


class CaptionStream(IterableDataset[CaptionBatch]):
    """Endless, shuffled, sharded stream of full batches; one pass yields ``len(stream)`` of them.

    Args:
        reader: reads rows.
        rows: table indices of the rows to train on.
        settings: batch size, seed of the order, `num_workers` that will read the stream (0: this process), and
            `max_bad_share`, of the rows that this rank has read.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(
        self, reader: RowReader, rows: np.ndarray, settings: DataSettings, rank: int = 0, world_size: int = 1
    ) -> None:
        self.reader, self.rows, self.settings = reader, rows, settings
        self.rank, self.world_size = rank, world_size
        self.workers = max(1, settings.num_workers)
        self.positions = [0] * self.workers  # rows that each of this rank's shards has read
        self.batches = 0
        self._taken: tuple[list[int], int] | None = (
            None  # positions and batches, of what is not consumed yet too
        )
        self.mastered: frozenset[str] = frozenset()
        self.skip_share = 0.0
        # (worker, [rows read, bad ones]): each worker writes its own line, everybody reads.
        self._counts = torch.zeros(self.workers, 2, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Batches per rank in one pass over the rows, at least 1: Lightning's epoch."""
        return max(1, len(self.rows) // (self.settings.batch_size * self.world_size))

    def __iter__(self) -> Iterator[CaptionBatch]:
        info = get_worker_info()
        worker = info.id if info else 0
        positions, batches = self._taken or (self.positions, self.batches)
        # Workers are asked in the order 0, 1, …: after b batches, worker 0 must play shard b % workers.
        shard = (batches + worker) % self.workers
        position = positions[shard]
        shards, first = self.world_size * self.workers, self.rank * self.workers
        order = read_order(len(self.rows), self.settings.seed, shards, first + shard, position)
        per_epoch = rows_per_epoch(len(self.rows), shards, first + shard)
        for number in range(batches + worker, batches + len(self), self.workers):
            samples: list[Sample] = []
            bad_in_a_row = skipped = 0
            while len(samples) < self.settings.batch_size:
                row, visit = int(self.rows[next(order)]), position // per_epoch
                position += 1
                if self._skips(row, visit):
                    skipped += 1
                    continue
                sample = self.reader.read(row, visit)
                self._counts[worker, 0] += 1
                if sample is None:
                    bad_in_a_row += 1
                    self._counts[worker, 1] += 1
                    self._check_share(bad_in_a_row)
                else:
                    bad_in_a_row = 0
                    samples.append(sample)
            yield to_batch(samples, Cursor(shard, position, number + 1, skipped))

    def _skips(self, row: int, visit: int) -> bool:
        """Whether a row of a mastered image is passed over at this visit: see `CaptionDataModule.skip_mastered`."""
        if not self.mastered:
            return False
        sample_id = self.reader.table[row]["sample_id"]
        drawn = image_hash(self.settings.seed, f"{visit}\0{sample_id}") / 2**64
        return sample_id in self.mastered and drawn < self.skip_share

    def taken(self, cursor: Cursor) -> None:
        """Whoever trains has the batch with this cursor: further passes of this process begin behind it."""
        positions, _ = self._taken or (self.positions, 0)
        self._taken = (
            [*positions[: cursor.shard], cursor.position, *positions[cursor.shard + 1 :]],
            cursor.batches,
        )

    def consumed(self, cursor: Cursor) -> None:
        """Training on the batch with this cursor is done: the stream goes on behind it."""
        self.positions[cursor.shard] = cursor.position
        self.batches = cursor.batches
        if self._taken and self._taken[1] <= self.batches:
            self._taken = None

    def state(self) -> dict[str, Any]:
        """Where the streams of all ranks stand, plain numbers. A collective: call it on every rank."""
        positions = [self.positions]
        if dist.is_available() and dist.is_initialized() and self.world_size > 1:
            positions = [[] for _ in range(self.world_size)]
            dist.all_gather_object(positions, self.positions)
        return {
            "world_size": self.world_size,
            "num_workers": self.workers,
            "positions": [list(p) for p in positions],
            "batches": self.batches,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, over the same rows in the same order.

        Exact for the same number of ranks and of workers, whatever the batch size. Otherwise training goes on
        from the last place that all shards had reached: no row is left out, some rows of that epoch come
        again.
        """
        self.batches, self._taken = state["batches"], None
        if (state["world_size"], state["num_workers"]) == (self.world_size, self.workers):
            self.positions = list(state["positions"][self.rank])
            return
        positions = [p for rank in state["positions"] for p in rank]
        rows, first = len(self.rows), self.rank * self.workers
        place = common_position(rows, positions)
        continued = positions_from(rows, self.world_size * self.workers, place)
        self.positions = continued[first : first + self.workers]
        if self.rank == 0:
            again = max(0, sum(positions) - place) if rows >= len(positions) else 0
            log.warning(
                f"the checkpoint was written with {state['world_size']} rank(s) of {state['num_workers']} "
                f"data worker(s), this run has {self.world_size} of {self.workers}: the order continues from "
                f"row {place % rows} of epoch {place // rows}, the last place that all shards had reached; no "
                f"image is left out, about {again} come again (same ranks and data.num_workers: none)"
            )

    def rows_read(self) -> tuple[int, int]:
        """Rows read by this rank since the process started, and how many of them were bad."""
        read, bad = self._counts.sum(0).tolist()
        return read, bad

    def _check_share(self, bad_in_a_row: int) -> None:
        read, bad = self.rows_read()
        too_many = read >= LEAST_ROWS_READ and bad > self.settings.max_bad_share * read
        # Without a single good row the search would never end, whatever share is allowed.
        if too_many or bad_in_a_row >= max(LONGEST_SEARCH, len(self.rows)):
            raise TooManyBadRows(self.stop_message())

    def stop_message(self) -> str:
        """Why `TooManyBadRows` stops the run, and what to do."""
        read, bad = self.rows_read()
        allowed = f"data.max_bad_share={self.settings.max_bad_share} allows"
        finding = f"{bad} of the {read} rows read so far are bad, more than {allowed}"
        if bad == read:
            finding = f"none of the {read} rows read so far can be used"
        return (
            f"{finding}: {self.reader.bad_rows.summary()}. Check data.image_root and data.folders if files "
            "are missing; repair or remove what is listed; or raise data.max_bad_share."
        )


@dataclass(eq=False)
class PlannedBatches(IterableDataset[CaptionBatch]):
    """The same batches in the same order each time, for validation and prediction.

    A bad row is replaced by the next of `spares`; when these run out, its batch gets smaller, and a batch
    that has nothing left is not yielded.

    Attributes:
        reader: reads rows.
        chunks: table indices of each batch of this rank.
        spares: table indices to fall back on. Each worker has its own share of them.
    """

    reader: RowReader
    chunks: Sequence[np.ndarray]
    spares: np.ndarray | Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[CaptionBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        spares = iter(self.spares[worker::workers])
        for chunk in self.chunks[worker::workers]:
            samples = []
            for index in chunk:
                sample = self.reader.read(int(index))
                while sample is None and (spare := next(spares, None)) is not None:
                    sample = self.reader.read(int(spare))
                if sample is not None:
                    samples.append(sample)
            if samples:
                yield to_batch(samples)


def even_chunks(rows: np.ndarray, rank: int, world_size: int, batch_size: int) -> list[np.ndarray]:
    """The rank's share ``rows[rank::world_size]`` in batches, as many batches on every rank as can be.

    A forward pass under FSDP is a collective, so a rank with fewer batches would leave the others waiting.
    Shares differ by at most one row; each is cut into as many batches as the largest share needs, of sizes
    that differ by at most one. A rank whose share has fewer rows than that has fewer batches.
    """
    share = rows[rank::world_size]
    largest = len(rows[::world_size])
    number = min(-(-largest // batch_size), len(share))
    return np.array_split(share, number) if number else []


class StreamLoader(DataLoader[CaptionBatch]):
    """`DataLoader` of one of the streams above: reports bad rows, and fails with a plain message."""

    report = True
    """Whether this process logs; one rank is enough."""

    must_yield = False
    """Whether a pass without a single batch is an error."""

    def __iter__(self) -> Iterator[CaptionBatch]:  # type: ignore[override]
        stream: Any = self.dataset
        bad_rows = stream.reader.bad_rows
        reported = bad_rows.total()
        iterator, empty = super().__iter__(), True
        try:
            for batch in iterator:
                empty = False
                if self.report and bad_rows.total() >= max(1, 2 * reported):  # seen early, never a flood
                    reported = bad_rows.total()
                    log.warning("skipped %s", bad_rows.summary())
                yield batch
        except TooManyBadRows:
            # What arrives from a worker has its traceback inside the message.
            raise TooManyBadRows(stream.stop_message()) from None
        finally:
            # An iterator that an exception keeps alive would be collected late, and its workers then waited
            # for 5 seconds each.
            if shutdown := getattr(iterator, "_shutdown_workers", None):
                shutdown()
        if self.must_yield and empty:
            raise DataError(f"data.val_size: none of the images held out can be used: {bad_rows.summary()}")
        if self.report and bad_rows.total() > reported:
            log.warning("skipped %s", bad_rows.summary())

    def state_dict(self) -> dict[str, Any]:
        """Empty. Lightning takes a loader with this method to be resumable and does not warn; what there is
        to save lies with all ranks, and `CaptionDataModule.state_dict` gathers it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""
