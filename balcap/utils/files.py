"""Files that survive a kill at any moment: whole files replaced at once, and JSON lines that are appended."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """A file to write to, which takes the place of `path` when the block ends: readers see the old or the new one.

    If the block raises, `path` stays as it is. Libraries that want a path may write to ``file.name``.

    Args:
        path: where the file goes; its folder is made if it is missing.
        mode: ``w`` or ``wb``.
        options: of `open`, such as ``newline``; the encoding is UTF-8 unless given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with open(partial, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def file_state(path: str | Path) -> list[Any]:
    """Name, bytes and time of a file's last change: what tells it from another without reading it."""
    status = os.stat(path)
    return [Path(path).name, status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` when the block ends.

    If the block raises, `path` stays as it is. A kill between the two renames leaves the old folder beside it.

    Args:
        path: where the folder goes; what was there before is deleted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    old = new.with_suffix(".old")
    new.mkdir()
    try:
        yield new
        put_in_place(new, path, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def put_in_place(new: Path, path: Path, old: Path) -> None:
    """Let the folder `new` take the place of `path`, a file or a folder, which is called `old` until it is deleted."""
    for file in new.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
    remove(old)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    with contextlib.suppress(OSError):  # what is to be there is there
        remove(old)


def remove(path: str | Path) -> None:
    """Delete a file, or a folder with all that is in it, if there is one."""
    path = Path(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def append_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Append `rows`, one JSON object a line, in one write; a line that a kill has cut short stays by itself.

    Args:
        path: the file; made with its folder if it is missing.
        rows: what JSON can hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + data)


def read_jsonl(path: str | Path) -> list[Any]:
    """The rows of a file of JSON lines, ``[]`` if there is none. Lines that a kill has cut short are left out."""
    data, rows = Path(path).read_bytes() if Path(path).exists() else b"", []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def whole_rows(metrics_csv: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a file of metrics, without rows that a kill or a full disk has cut short."""
    lines = metrics_csv.read_text(errors="replace").splitlines(keepends=True)
    reader = csv.DictReader(line for line in lines if line.endswith("\n") and "\0" not in line)
    columns = list(reader.fieldnames or [])
    # DictReader fills up what a row lacks with None, and collects what it has too many under None.
    rows = [row for row in reader if None not in row and None not in row.values()]
    return columns, [row for row in rows if row.get("step", "").isdigit()]
