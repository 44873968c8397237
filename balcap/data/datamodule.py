"""`CaptionDataModule`: batches of images for training, validation and prediction."""

from __future__ import annotations

import hashlib
import logging
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch.distributed as dist

from balcap.data import checks, resume
from balcap.data.bad_rows import BadRowLog
from balcap.data.files import ImageFolder, folder_rows
from balcap.data.images import MAX_PIXELS
from balcap.data.reader import RowReader, Table
from balcap.data.sharegpt4v import TEXT_ONLY_CAUSES, DataError, column, load_rows
from balcap.data.split import Split, select_rows, split_rows
from balcap.data.stream import CaptionStream, PlannedBatches, StreamLoader, even_chunks
from balcap.types import CaptionBatch

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class CaptionDataModule(lightning.LightningDataModule):
    """Images with prompts and reference captions, from ShareGPT4V JSON and folders of images.

    Bad rows (missing or broken files, rows without caption, ...) are skipped, listed in ``bad_rows.jsonl``
    and replaced, so that every training batch is full. Rows whose top-level image folder does not exist
    are left out from the start. Training resumes at the exact row.

    Args:
        data: ShareGPT4V rows: path of a ``.json`` or ``.jsonl`` file, or a hub id such as
            ``Lin-Chen/ShareGPT4V``. Rows may hold what their caption asserts, as ``reference_units``; the
            judge is then not asked for it. Required unless predicting.
        image_root: folder that the image paths in the rows start from. Only files below it are read, since
            images are sent to the judge.
        name: configuration of a hub data set, such as ``ShareGPT4V``.
        batch_size: images per rank and training step.
        val_size: images held out for validation, over all ranks; one spare for every eight of them is held
            out too, to stand in for unreadable ones. 0 for no validation.
        val_batch_size: images per rank and step of validation and prediction; null for `batch_size`.
        folders: use only images below these folders of `image_root`, such as ``coco/train2017``; null for
            all.
        prompts: instructions, of which every image keeps the one that its path and `seed` pick; null for the
            row's own question.
        num_workers: processes per rank that read images for training and prediction; 0 reads in the main
            process.
        seed: of the order, the validation split and the choice among `prompts`.
        max_rows: use only the first this many rows that are left after `folders`; null for all.
        max_bad_share: stop when more than this share of the rows read so far is bad, in (0, 1]; judged from
            50 rows on.
        max_pixels_in_file: width x height up to which an image is decoded, a guard against decompression
            bombs.
        link_targets: folders outside `image_root` that symbolic links in it may lead to.
        run_dir: folder in which ``bad_rows.jsonl`` is written.
        predict_from: what to caption with ``predict``: a folder of images, searched recursively, or a
            ShareGPT4V JSON file whose images are in `image_root`.
        cache_dir: folder for the table made from the JSON; null for the Hugging Face cache.
    """

    # A rank may get no image to predict; it then waits for the others at the end.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        data: str | None = None,
        image_root: str | None = None,
        name: str | None = None,
        batch_size: int = 8,
        val_size: int = 256,
        val_batch_size: int | None = None,
        folders: list[str] | None = None,
        prompts: list[str] | None = None,
        num_workers: int = 2,
        seed: int = 0,
        max_rows: int | None = None,
        max_bad_share: float = 0.2,
        max_pixels_in_file: int = MAX_PIXELS,
        link_targets: list[str] | None = None,
        run_dir: str = ".",
        predict_from: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.image_root = image_root
        self.name = name
        self.batch_size = batch_size
        self.val_size = val_size
        self.val_batch_size = val_batch_size
        self.folders = folders
        self.prompts = prompts
        self.num_workers = num_workers
        self.seed = seed
        self.max_rows = max_rows
        self.max_bad_share = max_bad_share
        self.max_pixels_in_file = max_pixels_in_file
        self.link_targets = link_targets
        self.run_dir = run_dir
        self.predict_from = predict_from
        self.cache_dir = cache_dir
        self.left_out: dict[str, int] = {}
        self._skipped_ids: frozenset[str] = frozenset()
        self._stream: CaptionStream | None = None
        self._state: dict[str, Any] = {}

    def problems(self, stage: str) -> list[str]:
        """What is wrong with the settings, without reading the data.

        Args:
            stage: ``fit``, ``validate`` or ``predict``.

        Returns:
            One message per problem, each naming the key to change; empty if all is well.
        """
        return checks.problems(self, stage)

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
        table, _ = self._source
        sample_ids, causes, root = column(table, "sample_id"), column(table, "problem"), self._root
        rows, self.left_out = select_rows(sample_ids, root, self.folders, self.max_rows)
        self._report_left_out(root)
        split = split_rows(rows, sample_ids, causes, self.seed, self.val_size)
        if not len(rows):
            raise DataError(
                f"data.image_root: no row of {self.data} is left: "
                f"{', '.join(self.left_out) or 'none'} not found under {root} (data.folders={self.folders})"
            )
        if not len(split.train) or len(split.val) < self.val_size:
            raise DataError(
                f"data.val_size={self.val_size} leaves no image to train on: {len(rows)} rows are there, of "
                f"which {sum(not causes[r] for r in rows)} are good"
            )
        return split

    @cached_property
    def _source(self) -> tuple[Any, str]:
        if self.data is None:
            raise DataError("data.data is required")
        return load_rows(self.data, self.name, self.cache_dir)

    def _report_left_out(self, root: Path) -> None:
        if self._ranks()[0] == 0:
            for folder, count in self.left_out.items():
                log.warning("folder_not_on_disk: %s/%s does not exist, %d rows left out", root, folder, count)

    # ---- training

    def train_dataloader(self) -> StreamLoader:
        """Endless training batches; one pass over the loader is Lightning's epoch."""
        if self._stream is None:
            rank, world_size = self._ranks()
            self._stream = CaptionStream(
                self._reader(self._source[0], self._root),
                self.split.train,
                batch_size=self.batch_size,
                seed=self.seed,
                rank=rank,
                world_size=world_size,
                num_workers=self.num_workers,
                max_bad_share=self.max_bad_share,
            )
            if self._state:
                resume.restore(self._stream, self._state, self._identity)
        return self._loader(self._stream, self.num_workers)

    def consumed(self, batch: CaptionBatch) -> None:
        """Say that training on this batch is done: what comes next, and after a resume, is what follows it.

        To be called once per training step, on every rank. Batches that workers have prefetched but that
        nobody trained on are read again.
        """
        if self._stream is not None and batch.cursor is not None:
            self._stream.consumed(batch.cursor)

    def state_dict(self) -> dict[str, Any]:
        """Where the training streams of all ranks stand. A collective: Lightning calls it on every rank."""
        if self._stream is None:
            return self._state
        return resume.capture(self._stream, self._identity)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there. Checked and applied once the training stream exists, so that a checkpoint can
        be validated, or predicted with, on other data."""
        self._state = state_dict
        if self._stream is not None:
            resume.restore(self._stream, state_dict, self._identity)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        table, digest = self._source
        rows, sample_ids = self.split.train, column(table, "sample_id")
        ids = "\n".join(sample_ids[r] for r in rows)
        return {
            "data.seed": self.seed,
            "data.val_size": self.val_size,
            "data.folders": self.folders,
            "data.max_rows": self.max_rows,
            "data.data (digest of its content)": digest,
            "data.image_root (rows with their folder on disk)": len(rows),
            "data.data (digest of its images)": hashlib.blake2b(ids.encode(), digest_size=8).hexdigest(),
        }

    # ---- validation and prediction

    def val_dataloader(self) -> StreamLoader | list[StreamLoader]:
        """The held-out images, the same in the same order each time, each on one rank.

        Every rank has the same number of batches: images that do not divide so are left out, at most one
        fewer than there are ranks.
        """
        if self.val_size == 0:
            return []
        rank, world_size = self._ranks()
        rows, size = self.split.val, self._eval_batch_size
        if len(rows) < world_size:
            raise DataError(f"data.val_size={self.val_size} gives some of {world_size} ranks no image")
        if len({len(even_chunks(rows, r, world_size, size)) for r in range(world_size)}) > 1:
            rows = rows[: len(rows) // world_size * world_size]
        batches = PlannedBatches(
            self._reader(self._source[0], self._root),
            even_chunks(rows, rank, world_size, size),
            self.split.spare[rank::world_size],
        )
        # One worker, so that any bad image can be replaced by any spare: it needs to know which are used.
        return self._loader(batches, min(1, self.num_workers))

    def predict_dataloader(self) -> StreamLoader:
        """Images of `predict_from` that `skip` does not name, bad ones left out, each on one rank.

        References are empty for a folder. Ranks have the same number of batches where there are enough
        images for that; without FSDP or DeepSpeed it does not matter.
        """
        table, rows, root = self._predict_source
        todo = [int(r) for r in rows if table[int(r)]["sample_id"] not in self._skipped_ids]
        rank, world_size = self._ranks()
        chunks = even_chunks(np.asarray(todo, dtype=np.int64), rank, world_size, self._eval_batch_size)
        reader = self._reader(table, root, forgiven=TEXT_ONLY_CAUSES)
        return self._loader(PlannedBatches(reader, chunks), self.num_workers)

    @cached_property
    def _predict_source(self) -> tuple[Table, np.ndarray, Path]:
        """Rows, which of them take part, and the folder of their images."""
        if self.predict_from is None:
            raise DataError("data.predict_from is required to predict")
        folder = Path(self.predict_from).expanduser()
        if folder.is_dir():
            table: Any = folder_rows(folder)
            sample_ids = [row["sample_id"] for row in table]
        else:
            table, _ = load_rows(self.predict_from, cache_dir=self.cache_dir)
            sample_ids, folder = column(table, "sample_id"), self._root
        rows, self.left_out = select_rows(sample_ids, folder, self.folders, self.max_rows)
        self._report_left_out(folder)
        if not len(rows):
            raise DataError(
                f"data.predict_from: no images in {self.predict_from} (data.folders={self.folders})"
            )
        return table, rows, folder

    def skip(self, ids: set[str]) -> None:
        """Leave these sample ids out of `predict_dataloader`: they are done already."""
        self._skipped_ids = frozenset(ids)

    def bad_row_counts(self) -> dict[str, int]:
        """Rows left out so far by cause, over all ranks and workers; ``folder_not_on_disk`` for those that
        were left out from the start."""
        counts = BadRowLog(self.run_dir).counts()
        if self.left_out:
            counts["folder_not_on_disk"] = sum(self.left_out.values())
        return counts

    # ---- shared

    @property
    def _root(self) -> Path:
        if self.image_root is None:
            raise DataError("data.image_root is required")
        return Path(self.image_root).expanduser()

    @property
    def _eval_batch_size(self) -> int:
        return self.val_batch_size or self.batch_size

    def _ranks(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def _reader(self, table: Table, root: Path, forgiven: frozenset[str] = frozenset()) -> RowReader:
        return RowReader(
            table=table,
            images=ImageFolder(root, self.max_pixels_in_file, self.link_targets or ()),
            bad_rows=BadRowLog(self.run_dir),
            seed=self.seed,
            prompts=self.prompts or (),
            forgiven=forgiven,
        )

    def _loader(self, stream: CaptionStream | PlannedBatches, num_workers: int) -> StreamLoader:
        # Lightning suspects every iterable data set with a length of giving its workers the same data.
        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")
        loader = StreamLoader(stream, batch_size=None, num_workers=num_workers)
        loader.report = self._ranks()[0] == 0
        return loader


def _unchanged(batch: Any) -> Any:
    return batch
