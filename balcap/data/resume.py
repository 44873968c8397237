"""What a checkpoint says about the data stream, and what continuing from it means."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from balcap.data.order import common_position, positions_from
from balcap.data.sharegpt4v import DataError
from balcap.data.stream import CaptionStream

log = logging.getLogger(__name__)


def capture(stream: CaptionStream, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of all ranks' streams, plain numbers and strings. A collective: call it on every rank.

    Args:
        stream: of this rank.
        identity: by key of the settings, what must be the same for the order to be the same.
    """
    positions = [stream.positions]
    if dist.is_available() and dist.is_initialized() and stream.world_size > 1:
        positions = [[] for _ in range(stream.world_size)]
        dist.all_gather_object(positions, stream.positions)
    return {
        "identity": identity,
        "world_size": stream.world_size,
        "num_workers": stream.workers,
        "positions": [list(p) for p in positions],
        "batches": stream.batches,
    }


def restore(stream: CaptionStream, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Continue where `state` was captured.

    Exact for the same number of ranks and of workers, whatever the batch size. Otherwise training goes on
    from the last place that all shards had reached: no row is left out, some rows of that epoch come again.

    Raises:
        DataError: the rows or their order are others than those of the checkpoint.
    """
    _check_identity(state["identity"], identity)
    stream.batches = state["batches"]
    flat = [p for rank in state["positions"] for p in rank]
    if (state["world_size"], state["num_workers"]) == (stream.world_size, stream.workers):
        stream.positions = list(state["positions"][stream.rank])
        return
    rows, shards = len(stream.rows), stream.world_size * stream.workers
    place = common_position(rows, flat)
    first = stream.rank * stream.workers
    stream.positions = positions_from(rows, shards, place)[first : first + stream.workers]
    if stream.rank == 0:
        log.warning(
            "the checkpoint was written with %d rank(s) of %d data worker(s), this run has %d of %d: the "
            "order continues from row %d of epoch %d, the last place that all shards had reached; no image "
            "is left out, about %d come again (same ranks and data.num_workers: none)",
            state["world_size"],
            state["num_workers"],
            stream.world_size,
            stream.workers,
            place % rows,
            place // rows,
            _rows_again(sum(flat), place, rows, len(flat)),
        )


def _rows_again(read: int, place: int, rows: int, shards: int) -> int:
    return max(0, read - place) if rows >= shards else 0


def _check_identity(saved: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in now if saved.get(key) != now[key]]
    if changed:
        raise DataError(
            "the checkpoint was trained on other rows or in another order, so it cannot be continued: "
            + "; ".join(f"{key} was {saved.get(key)}, is {now[key]}" for key in changed)
            + ". Restore these, or start a new run from the exported weights."
        )
