"""Which rows take part, which images are held out for validation, and the order in which rows are trained on.

Pure functions; only `select_rows` looks for folders. For the order, N rows are dealt to S = ranks x workers
shards. In epoch e, shard s reads rows s, s + S, s + 2S, … of a permutation that only the seed and e determine,
and then goes on with epoch e + 1. So a position, the number of rows a shard has read, says all that is needed to
continue it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from balcap.data.columns import MALFORMED_COLUMN
from balcap.data.layouts import NO_CAPTION, image_paths


def image_hash(seed: int, sample_id: str) -> int:
    """64 bits that depend on nothing but the seed and the sample: the same on every machine and rank."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{sample_id}".encode(), digest_size=8).digest(), "big")


def select_rows(
    sample_ids: Sequence[str], image_root: Path, folders: Sequence[str] | None, max_rows: int | None
) -> tuple[np.ndarray, dict[str, int]]:
    """Rows that take part, in the order of the file.

    Args:
        sample_ids: image or images (`image_paths`) of every row, "" where a row has none.
        image_root: folder that the images are relative to.
        folders: keep only rows whose images are all below one of these, such as ``coco/train2017``; None keeps all.
        max_rows: keep only the first this many of what is left.

    Returns:
        Row indices; and the number of rows left out because their top-level folder does not exist, by
        folder. People usually have only some of the image folders: that is no fault of the rows.
    """
    below = None if folders is None else tuple(folder.strip("/") + "/" for folder in folders)
    root = str(image_root).rstrip("/") + "/"
    exists: dict[str, bool] = {}
    missing: Counter[str] = Counter()
    kept = []
    for index, sample_id in enumerate(sample_ids):
        names = [path.removeprefix(root) for path in image_paths(sample_id)]
        if below is not None and not all(name.startswith(below) for name in names):
            continue
        # Paths that leave image_root are bad rows, to be listed as such when they are read.
        parts = (name.partition("/") for name in names)
        tops = [top for top, _, rest in parts if rest and top not in ("", "..")]
        exists.update((top, os.path.isdir(root + top)) for top in tops if top not in exists)
        if absent := [top for top in tops if not exists[top]]:
            missing[absent[0]] += 1
        else:
            kept.append(index)
    return np.asarray(kept[:max_rows], dtype=np.int64), dict(missing.most_common())


def uncaptioned_once(rows: np.ndarray, sample_ids: Sequence[str], causes: Sequence[str]) -> np.ndarray:
    """The rows, without those of cause ``no_caption`` whose image another row has: one with a caption, or an earlier one.

    Args:
        rows: row indices.
        sample_ids: of every row of the file.
        causes: likewise, why it is bad, or "".
    """
    seen = {sample_ids[row] for row in rows if not causes[row]}
    kept = []
    for row in rows:
        if causes[row] == NO_CAPTION:
            if sample_ids[row] in seen:
                continue
            seen.add(sample_ids[row])
        kept.append(row)
    return np.asarray(kept, dtype=np.int64)


@dataclass(frozen=True)
class Split:
    """Row indices.

    Attributes:
        train: in the order of the file, bad rows included.
        val: held out, in the order in which they are validated.
        spare: held out too, and validated in place of `val` rows whose file turns out to be bad.
    """

    train: np.ndarray
    val: np.ndarray
    spare: np.ndarray


def split_rows(
    rows: np.ndarray, sample_ids: Sequence[str], problems: Sequence[str], seed: int, val_size: int
) -> Split:
    """Hold out the `val_size` images with the smallest `image_hash`, and one spare for every eight.

    What is guaranteed: the split depends on the seed, `val_size` and the set of good images alone, not on
    the order of the rows, the files on disk, or the machine. Images that are added never move an image from
    training into validation (they may take the place of a validation image, which then is trained on);
    images that are removed never move one that was held out into training. Columns change nothing: a row
    that is only bad for a malformed column counts as good here, but comes last among what is held out.

    A `val_size` that leaves nothing to train on gives an empty `train`.
    """
    if val_size == 0:
        nothing = np.empty(0, dtype=np.int64)
        return Split(train=rows, val=nothing, spare=nothing)
    good = [r for r in rows.tolist() if problems[r] in ("", MALFORMED_COLUMN)]
    hashed = ((image_hash(seed, sample_ids[r]), sample_ids[r], r) for r in good)
    by_hash = [r for *_, r in heapq.nsmallest(val_size + math.ceil(val_size / 8), hashed)]
    held_out = np.asarray(sorted(by_hash, key=lambda r: bool(problems[r])), dtype=np.int64)
    return Split(train=rows[~np.isin(rows, held_out)], val=held_out[:val_size], spare=held_out[val_size:])


def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers ``0 .. rows - 1`` in the order of this epoch."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def rows_per_epoch(rows: int, shards: int, shard: int) -> int:
    """How many rows the shard reads per epoch; all of them if there are fewer rows than shards."""
    return rows if rows < shards else len(range(shard, rows, shards))


def read_order(rows: int, seed: int, shards: int, shard: int, position: int) -> Iterator[int]:
    """Row numbers that the shard reads from `position` on, without end.

    With fewer rows than shards there is nothing to deal out: every shard then reads all rows, each
    starting at another one.
    """
    per_epoch = rows_per_epoch(rows, shards, shard)
    epoch, start = divmod(position, per_epoch)
    while True:
        order = permutation(rows, seed, epoch)
        order = np.roll(order, -shard) if rows < shards else order[shard::shards]
        yield from map(int, order[start:])
        epoch, start = epoch + 1, 0


def common_position(rows: int, positions: Sequence[int]) -> int:
    """How far the shards have come together: rows counted along the permutations, all epochs.

    Every row before this place has been read by its shard; the rows that some shards have read beyond it
    are read again when training continues from here with another number of shards.
    """
    shards = len(positions)
    places = []
    for shard, position in enumerate(positions):
        epoch, index = divmod(position, rows_per_epoch(rows, shards, shard))
        places.append(epoch * rows + (0 if rows < shards else min(shard + shards * index, rows)))
    return min(places)


def positions_from(rows: int, shards: int, place: int) -> list[int]:
    """Positions of `shards` shards that continue from a common place; the inverse of `common_position`."""
    epoch, within = divmod(place, rows)
    return [
        epoch * rows_per_epoch(rows, shards, s) + (0 if rows < shards else len(range(s, within, shards)))
        for s in range(shards)
    ]
