"""Checkpoints that each rank writes its part of: folders of torch's distributed checkpoint, as Lightning's
``ModelParallelStrategy`` writes them with ``save_distributed_checkpoint: true``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from balcap.utils.files import put_in_place, remove

#: What Lightning writes last, of all that is no tensor.
_REST = "meta.pt"


def is_folder(path: str | Path) -> bool:
    """Whether a path is that of such a checkpoint, or of what a kill has left of one."""
    path = Path(path)
    return path.is_dir() and ((path / _REST).exists() or (path / ".metadata").exists())


def read_folder(path: str | Path, device: str = "cpu") -> dict[str, Any]:
    """The checkpoint as one dictionary, whole, as one file would hold it; without the other ranks.

    Weights and state of the optimizer are read by torch's distributed checkpoint, which unpickles: load only folders that
    you trust. The rest is plain data.

    Args:
        path: of the folder.
        device: ``cpu``, or ``meta`` for tensors without their data.

    Raises:
        Exception: of many kinds, where the folder is not whole.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint._traverse import set_element
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = Path(path)
    checkpoint: dict[str, Any] = torch.load(path / _REST, map_location=device, weights_only=True)
    reader = FileSystemReader(path)
    metadata = reader.read_metadata()
    for stored in metadata.storage_data.values():
        if (path / stored.relative_path).stat().st_size < stored.offset + stored.length:
            raise EOFError(f"{stored.relative_path} is cut short")
    flat: dict[str, Any] = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype, device=device)
        if isinstance(kind, TensorStorageMetadata)
        else None
        for name, kind in metadata.state_dict_metadata.items()
    }
    if device != "meta":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            load(flat, storage_reader=reader, no_dist=True)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        set_element(nested, metadata.planner_data[name], value)
    optimizers = sorted(name for name in nested if name.startswith("optimizer_"))
    checkpoint["state_dict"] = nested.get("state_dict", {})
    checkpoint["optimizer_states"] = [nested[name] for name in optimizers]
    return checkpoint


@contextmanager
def replaced(path: str | Path, trainer: Any) -> Iterator[Path]:
    """Where all ranks write a folder, which takes the place of `path` when the block ends. A collective.

    At any moment one of ``X.ckpt``, ``X.ckpt.part`` and ``X.ckpt.old`` is whole, if one was before.

    Args:
        path: of the checkpoint, the same on all ranks.
        trainer: whose ranks write.
    """
    path = Path(path)
    part, old = (path.with_name(f"{path.name}.{end}") for end in ("part", "old"))
    if trainer.is_global_zero:
        remove(part)
    trainer.strategy.barrier()
    try:
        yield part
    except BaseException:
        if trainer.is_global_zero:
            remove(part)
        raise
    if trainer.is_global_zero:
        put_in_place(part, path, old)
    trainer.strategy.barrier()
