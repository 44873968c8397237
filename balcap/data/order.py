"""The order in which rows are trained on: pure functions of seed, shard and position.

N rows are dealt to S = ranks x workers shards. In epoch e, shard s reads rows s, s + S, s + 2S, … of a
permutation that only the seed and e determine, and then goes on with epoch e + 1. So a position, the number
of rows a shard has read, says all that is needed to continue it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


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
