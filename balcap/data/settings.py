"""`DataSettings`: where the images and captions are and how they are read, checked before anything is read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from balcap.data.images import MAX_PIXELS, PILLOW_MAX_PIXELS

STAGES = ("fit", "validate", "predict")

SHAREGPT4V_KEYS = ("id", "image", "conversations")
"""Keys of a row of ShareGPT4V itself; every other key can be a column."""


@dataclass(frozen=True)
class DataSettings:
    """Settings of `CaptionDataModule`.

    Args:
        data: images with captions: path of a ``.json`` or ``.jsonl`` file, or a hub id such as
            ``Lin-Chen/ShareGPT4V``. ShareGPT4V's rows and the other usual layouts are read
            (`balcap.data.layouts`). Rows may hold what their caption asserts, as ``reference_units``; the
            judge is then not asked for it. Required unless predicting.
        image_root: folder that the image paths in the rows start from. Only files below it are read, since
            images are sent to the judge.
        name: configuration of a hub data set, such as ``ShareGPT4V``.
        batch_size: images per rank and training step.
        val_size: images held out for validation, over all ranks; one spare for every eight of them is held
            out too, to stand in for unreadable ones. 0 for no validation. A data set that is too small for it
            holds out a tenth of its images instead.
        val_batch_size: images per rank and step of validation and prediction; null for `batch_size`.
        folders: use only images below these folders of `image_root`, such as ``coco/train2017``; null for
            all.
        columns: further keys of the rows that batches carry as `CaptionBatch.extras`, such as
            ``questions``. The values of one column are of one JSON kind; rows without it get None.
        references: where an image has several captions: ``union`` makes one reference of all, ``one`` takes
            them in turn, one at each visit (validation always sees the same).
        require_captions: whether a row without a caption is bad. False trains on such rows, with rewards that need no
            reference.
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
            file like `data` whose images are in `image_root`.
        cache_dir: folder for the table made from the JSON; null for the Hugging Face cache.
    """

    data: str | None = None
    image_root: str | None = None
    name: str | None = None
    batch_size: int = 8
    val_size: int = 256
    val_batch_size: int | None = None
    folders: list[str] | None = None
    columns: list[str] | None = None
    references: Literal["union", "one"] = "union"
    require_captions: bool = True
    prompts: list[str] | None = None
    num_workers: int = 2
    seed: int = 0
    max_rows: int | None = None
    max_bad_share: float = 0.2
    max_pixels_in_file: int = MAX_PIXELS
    link_targets: list[str] | None = None
    run_dir: str = "."
    predict_from: str | None = None
    cache_dir: str | None = None

    @property
    def eval_batch_size(self) -> int:
        """Images per rank and step of validation and prediction."""
        return self.val_batch_size or self.batch_size

    def problems(self, stage: str) -> list[str]:
        """What is wrong with the settings for this stage, without reading the data or reaching a network.

        Args:
            stage: ``fit``, ``validate`` or ``predict``.

        Returns:
            One message per problem, each beginning with the key to change; empty if all is well.
        """
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}")
        problems = self._number_problems() + self._column_problems() + prompt_problems(self.prompts)
        if stage != "predict":
            problems += source_problems(self.data)
        elif self.predict_from is None:
            wanted = "a folder of images, or a JSON file of rows"
            return [*problems, f"data.predict_from is required to predict: {wanted}"]
        elif Path(self.predict_from).expanduser().is_dir():
            return problems
        else:
            problems += _file_problems(self.predict_from, "data.predict_from", "a file or folder")
        return problems + folder_problems(self.image_root, self.folders, self.link_targets)

    def _number_problems(self) -> list[str]:
        limit = f"1 .. {PILLOW_MAX_PIXELS}, Pillow's own limit"
        rules = {
            "batch_size must be >= 1": self.batch_size >= 1,
            "val_size must be >= 0": self.val_size >= 0,
            "val_batch_size must be >= 1 or null": self.val_batch_size is None or self.val_batch_size >= 1,
            "num_workers must be >= 0": self.num_workers >= 0,
            "seed must be >= 0": self.seed >= 0,
            "max_rows must be >= 1 or null": self.max_rows is None or self.max_rows >= 1,
            "max_bad_share must be in (0, 1]": 0 < self.max_bad_share <= 1,
            f"max_pixels_in_file must be in {limit}": 1 <= self.max_pixels_in_file <= PILLOW_MAX_PIXELS,
        }
        values = {rule: getattr(self, rule.split()[0]) for rule in rules}
        # NaN fails every comparison; infinity would pass the open ones.
        return [
            f"data.{rule} (it is {values[rule]})"
            for rule, holds in rules.items()
            if not holds or values[rule] == math.inf
        ]

    def _column_problems(self) -> list[str]:
        return [
            f"data.columns: {key!r} is a key of ShareGPT4V itself, which batches hold anyway; leave it out"
            for key in SHAREGPT4V_KEYS
            if key in (self.columns or ())
        ]


def prompt_problems(prompts: Sequence[str] | None, prefix: str = "data.") -> list[str]:
    """What is wrong with a choice of prompts; `prefix` goes before the names of the settings."""
    if prompts is None or (prompts and all(prompt.strip() for prompt in prompts)):
        return []
    return [f"{prefix}prompts must hold at least one prompt and no empty one; null asks the row's question"]


def source_problems(data: str | None, prefix: str = "data.") -> list[str]:
    """What is wrong with the name of a data set, as `balcap.data.table.load_rows` takes it."""
    if data is None:
        wanted = "a .json or .jsonl file of images and captions, or a hub id such as owner/name"
        return [f"{prefix}data is required: {wanted}"]
    hub_id = r"(?!.*\.jsonl?$)[a-z0-9][\w.-]*/[a-z0-9][\w.-]*"  # and no relative path to a JSON file
    if re.fullmatch(hub_id, data, re.IGNORECASE) and not Path(data).expanduser().is_dir():
        return []
    return _file_problems(data, f"{prefix}data", "a file, nor does it look like a hub id (owner/name)")


def folder_problems(
    image_root: str | None,
    folders: Sequence[str] | None,
    link_targets: Sequence[str] | None,
    prefix: str = "data.",
) -> list[str]:
    """What is wrong with the folders that images are read from."""
    if image_root is None:
        return [f"{prefix}image_root is required: the folder that the image paths of the data set start from"]
    root = Path(image_root).expanduser()
    if not root.is_dir():
        why = "is not a folder" if root.exists() else "does not exist"
        return [f"{prefix}image_root: {image_root} {why}"]
    return [
        f"{prefix}folders: {folder} does not exist under {prefix}image_root={image_root}"
        for folder in folders or ()
        if not (root / folder.strip("/")).is_dir()
    ] + [
        f"{prefix}link_targets: {target} does not exist"
        for target in link_targets or ()
        if not Path(target).expanduser().is_dir()
    ]


def _file_problems(value: str, key: str, wanted: str) -> list[str]:
    path = Path(value).expanduser()
    if path.is_file():
        return []
    if path.is_dir():
        return [f"{key}: {value} is a folder; name the .json or .jsonl file in it"]
    return [f"{key}: {value} is not {wanted}"]
