"""The folder of a run: one process at a time, and one run."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from balcap.utils.errors import UserError


def holds_fit(folder: str | Path) -> bool:
    """Whether a fit has begun in this folder, whatever its loggers are."""
    return any((Path(folder) / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints"))


def write_problem(folder: str | Path) -> str | None:
    """Why nothing can be written in a folder that may not be there yet, or None."""
    there = next(
        parent for parent in (Path(folder).absolute(), *Path(folder).absolute().parents) if parent.exists()
    )
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"


@contextlib.contextmanager
def in_use(folder: str | Path) -> Iterator[None]:
    """Hold a folder against other processes; the system lets it go when this one ends, however it does.

    Raises:
        UserError: a process that is alive holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        # lockf, not flock: the lock is of this process, and workers that outlive it by seconds do not keep it.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"run_dir: {folder} is in use by {file.read() or 'another process'}; wait for it to end, or choose "
                "another folder with --run_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
