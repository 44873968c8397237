"""`CaptionDataModule`: batches of images for training, validation and prediction."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch.distributed as dist

from balcap.data.bad_rows import BadRowLog
from balcap.data.columns import MALFORMED_COLUMN
from balcap.data.images import BadImage
from balcap.data.json_files import DataError
from balcap.data.layouts import NO_CAPTION, image_paths
from balcap.data.order import Split, select_rows, split_rows, uncaptioned_once
from balcap.data.reader import ImageFolder, RowReader, folder_rows
from balcap.data.settings import DataSettings
from balcap.data.stream import CaptionStream, PlannedBatches, StreamLoader, even_chunks
from balcap.data.table import TEXT_ONLY_CAUSES, Table, load_rows
from balcap.types import CaptionBatch

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class CaptionDataModule(lightning.LightningDataModule):
    """Images with prompts and reference captions, from JSON files in the usual layouts and folders of images.

    Bad rows (missing or broken files, rows without caption, ...) are skipped, listed in ``bad_rows.jsonl``
    and replaced, so that every training batch is full. Rows whose top-level image folder does not exist
    are left out from the start. Training resumes at the exact row.

    The settings are those of `DataSettings`, by name.
    """

    # A rank may get no image to predict; it then waits for the others at the end.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = DataSettings(**settings)
        self.left_out: dict[str, int] = {}
        self._skipped_ids: frozenset[str] = frozenset()
        self._stream: CaptionStream | None = None
        self._state: dict[str, Any] = {}

    def problems(self, stage: str) -> list[str]:
        """What is wrong with the settings, see `DataSettings.problems`."""
        return self.settings.problems(stage)

    def setup(self, stage: str) -> None:
        """Read the rows and split them. `stage` is Lightning's; raises `DataError` if they cannot be used."""
        if self.trainer is not None:
            # Batches hold no tensors. Lightning's half-precision, FSDP and DeepSpeed plugins would look for
            # some, byte by byte in the image files, and refuse the frozen batch.
            self.trainer.precision_plugin.convert_input = _unchanged  # type: ignore[assignment, method-assign]
        if stage in ("fit", "validate"):
            _ = self.split

    def transfer_batch_to_device(
        self, batch: CaptionBatch, device: torch.device, dataloader_idx: int
    ) -> CaptionBatch:
        """Images stay on the host: the policy's processor makes tensors of them."""
        return batch

    @cached_property
    def split(self) -> Split:
        """Which rows are trained on and which are held out."""
        settings, root, table = self.settings, self.root, self.table
        sample_ids, causes = table.column("sample_id"), table.column("problem")
        rows = self._select(sample_ids, root)
        if not len(rows):
            raise DataError(
                f"data.image_root: no row of {settings.data} is left: {', '.join(self.left_out) or 'none'} not "
                f"found under {root} (data.folders={settings.folders})"
            )
        rows = rows[table.data.column("first").to_numpy()[rows] == rows]  # one for each image
        if not settings.require_captions:
            rows = uncaptioned_once(rows, sample_ids, causes)
            causes = ["" if cause == NO_CAPTION else cause for cause in causes]
        bad = Counter(cause for r in rows if (cause := causes[r]))
        good = len(rows) - bad.total() + bad[MALFORMED_COLUMN]
        val_size = settings.val_size
        if good - val_size <= math.ceil(val_size / 8):  # nothing would be left to train on
            val_size = max(1, good // 10) if good > 2 else 0
        if val_size < settings.val_size and good:
            log.warning(
                "data.val_size: %d images are too few to hold out %d; %d are",
                good,
                settings.val_size,
                val_size,
            )
        if not good:
            r = next(r for r in rows.tolist() if causes[r])
            raise DataError(
                f"data.data: none of the {len(rows)} rows of {settings.data} can be used "
                f"({', '.join(f'{cause} {n}' for cause, n in bad.most_common())}). Row {r}: {table[r]['detail']}. "
                "docs/data.md shows the layouts that are read"
            )
        return split_rows(rows, sample_ids, causes, settings.seed, val_size)

    def _select(self, sample_ids: Sequence[str], root: Path) -> np.ndarray:
        """Rows that take part; those whose folder is not on disk are counted and logged."""
        rows, self.left_out = select_rows(sample_ids, root, self.settings.folders, self.settings.max_rows)
        if self._ranks()[0] == 0:
            for folder, count in self.left_out.items():
                log.warning(
                    "folder_not_on_disk: %s/%.100r does not exist, %d rows left out", root, folder, count
                )
        return rows

    @property
    def table(self) -> Table:
        """The rows of `data` as `load_rows` gives them, memory-mapped."""
        return self._source[0]

    @cached_property
    def _source(self) -> tuple[Table, str]:
        settings = self.settings
        if settings.data is None:
            raise DataError("data.data is required")
        return load_rows(settings.data, settings.name, settings.cache_dir, settings.columns or ())

    # ---- training

    def train_dataloader(self) -> StreamLoader:
        """Endless training batches; one pass over the loader is Lightning's epoch."""
        if self._stream is None:
            reader = replace(self.reader(self.table, self.root), held_out=self._held_out())
            self._stream = CaptionStream(reader, self.split.train, self.settings, *self._ranks())
            if self._state:
                self._restore(self._stream)
        return self._loader(self._stream, self.settings.num_workers)

    def _held_out(self) -> frozenset[Path]:
        """The files that are validated."""
        images, files = self.reader(self.table, self.root).images, set()
        for row in (*self.split.val, *self.split.spare):
            for path in image_paths(self.table[row]["sample_id"]):
                with contextlib.suppress(BadImage):
                    files.add(images.locate(path))
        return frozenset(files)

    def taken(self, batch: CaptionBatch) -> None:
        """Say that this batch waits to be trained on, so that no pass of this process reads it again. After a resume it is
        read again, unless it was `consumed`."""
        if self._stream is not None and batch.cursor is not None:
            self._stream.taken(batch.cursor)

    def consumed(self, batch: CaptionBatch) -> None:
        """Say that training on this batch is done: what comes next, and after a resume, is what follows it.

        To be called once per training step, on every rank. Batches that workers have prefetched but that
        nobody trained on are read again.
        """
        if self._stream is not None and batch.cursor is not None:
            self._stream.consumed(batch.cursor)

    def skip_mastered(self, sample_ids: frozenset[str], share: float) -> None:
        """Pass over these images in the passes over the training data that begin from now on.

        Args:
            sample_ids: the same on all ranks. Whoever gives them keeps them for a resumed run: they are no part of the
                state here.
            share: probability that such an image is skipped at a visit, below 1; seed, visit and image decide.
        """
        if self._stream is not None:
            self._stream.mastered, self._stream.skip_share = sample_ids, share

    def state_dict(self) -> dict[str, Any]:
        """Where the training streams of all ranks stand. A collective: Lightning calls it on every rank."""
        if self._stream is None:
            return self._state
        return {"identity": self._identity, **self._stream.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there. Checked and applied once the training stream exists, so that a checkpoint can
        be validated, or predicted with, on other data."""
        self._state = state_dict
        if self._stream is not None:
            self._restore(self._stream)

    def _restore(self, stream: CaptionStream) -> None:
        saved = self._state["identity"]
        if changed := [key for key, value in self._identity.items() if saved.get(key) != value]:
            raise DataError(
                "the checkpoint was trained on other data, or in another order, so it cannot be continued: "
                + "; ".join(f"{key} was {saved.get(key)}, is {self._identity[key]}" for key in changed)
                + ". Restore these, or start a new run from the exported weights."
            )
        stream.restore(self._state)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, by the key that sets it: the images and their order.
        Questions, captions and columns may change."""
        settings, rows, sample_ids = self.settings, self.split.train, self.table.column("sample_id")
        ids = "\n".join(sample_ids[r] for r in rows)
        return {
            "data.seed": settings.seed,
            "data.val_size": settings.val_size,
            "data.folders": settings.folders,
            "data.max_rows": settings.max_rows,
            "data.image_root (rows with their folder on disk)": len(rows),
            "data.data (digest of its images)": hashlib.blake2b(ids.encode(), digest_size=8).hexdigest(),
        }

    # ---- validation and prediction

    def val_dataloader(self) -> StreamLoader | list[StreamLoader]:
        """The held-out images, the same in the same order each time, each on one rank.

        Every rank has the same number of batches: images that do not divide so are left out, at most one
        fewer than there are ranks.
        """
        if not len(self.split.val):
            return []
        rank, world_size = self._ranks()
        rows, size = self.split.val, self.settings.eval_batch_size
        if len(rows) < world_size:
            raise DataError(f"data.val_size={len(rows)} gives some of {world_size} ranks no image")
        if len({len(even_chunks(rows, r, world_size, size)) for r in range(world_size)}) > 1:
            rows = rows[: len(rows) // world_size * world_size]
        chunks, spares = even_chunks(rows, rank, world_size, size), self.split.spare[rank::world_size]
        batches = PlannedBatches(self.reader(self.table, self.root), chunks, spares)
        # One worker, so that any bad image can be replaced by any spare: it needs to know which are used.
        loader = self._loader(batches, min(1, self.settings.num_workers))
        loader.must_yield = True
        return loader

    def predict_dataloader(self) -> StreamLoader:
        """Images of `predict_from` that `skip` does not name, bad ones left out, each on one rank.

        References are empty for a folder. Ranks have the same number of batches where there are enough
        images for that; without FSDP or DeepSpeed it does not matter.
        """
        table, rows, root = self._predict_source
        todo = [row for row in rows.tolist() if table[row]["sample_id"] not in self._skipped_ids]
        chunks = even_chunks(np.array(todo, dtype=int), *self._ranks(), self.settings.eval_batch_size)
        reader = self.reader(table, root, ignored_causes=TEXT_ONLY_CAUSES)
        return self._loader(PlannedBatches(reader, chunks), self.settings.num_workers)

    @cached_property
    def _predict_source(self) -> tuple[Table, np.ndarray, Path]:
        """Rows, which of them take part, and the folder of their images."""
        settings = self.settings
        if settings.predict_from is None:
            raise DataError("data.predict_from is required to predict")
        folder = Path(settings.predict_from).expanduser()
        if folder.is_dir():
            table = folder_rows(folder, settings.link_targets or ())
        else:
            table, _ = load_rows(settings.predict_from, None, settings.cache_dir, settings.columns or ())
            folder = self.root
        sample_ids = table.column("sample_id")
        rows = self._select(sample_ids, folder)
        if not len(rows):
            raise DataError(
                f"data.predict_from: no images in {settings.predict_from} (data.folders={settings.folders})"
            )
        first = {
            sample_ids[row]: row for row in reversed(rows.tolist())
        }  # an image may have several captions
        return table, np.array(sorted(first.values())), folder

    def skip(self, ids: set[str]) -> None:
        """Leave these sample ids out of `predict_dataloader`: they are done already."""
        self._skipped_ids = frozenset(ids)

    def bad_row_counts(self) -> dict[str, int]:
        """Rows left out so far by cause, over all ranks and workers; ``folder_not_on_disk`` for those that
        were left out from the start."""
        counts = BadRowLog(self.settings.run_dir).counts()
        if self.left_out:
            counts["folder_not_on_disk"] = sum(self.left_out.values())
        return counts

    def leave_out(self, sample_id: str, cause: str, detail: str) -> None:
        """List an image that turned out to be of no use after it was read."""
        rows = self._predict_source[0] if self.settings.predict_from else self.table
        BadRowLog(self.settings.run_dir).add(
            rows.column("sample_id").index(sample_id), sample_id, cause, detail
        )

    # ---- shared

    @property
    def root(self) -> Path:
        """The folder that image paths start from."""
        if self.settings.image_root is None:
            raise DataError("data.image_root is required")
        return Path(self.settings.image_root).expanduser()

    def _ranks(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def reader(self, table: Table, root: Path, ignored_causes: frozenset[str] = frozenset()) -> RowReader:
        """Reads single rows of `table`, with their images below `root`."""
        settings = self.settings
        if not settings.require_captions:
            ignored_causes |= {NO_CAPTION}
        images = ImageFolder(root, settings.max_pixels_in_file, settings.link_targets or ())
        return RowReader(table, images, settings, BadRowLog(settings.run_dir), ignored_causes)

    def _loader(self, stream: CaptionStream | PlannedBatches, num_workers: int) -> StreamLoader:
        # Lightning suspects every iterable data set with a length of giving its workers the same data.
        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
        loader = StreamLoader(stream, batch_size=None, num_workers=num_workers)
        loader.report = self._ranks()[0] == 0
        return loader


def _unchanged(batch: Any) -> Any:
    return batch
