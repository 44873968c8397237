"""What a command over all rows of a data set reads and writes beside the judge's cache.

``<out>``                    the new rows, written at the end, whole or not at all
``<out>.quarantine.jsonl``   rows without an answer that can be used, and why
``<out>.settings.json``      what the answers depend on: a run with other settings is refused
``<out>.ledger.sqlite``      what was paid (`balcap.judge`)
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from balcap.commands.rows_settings import RowsSettings
from balcap.config import ConfigError
from balcap.data.json_files import DataError
from balcap.data.order import select_rows
from balcap.data.table import TEXT_ONLY_CAUSES, raw_rows
from balcap.utils.files import append_jsonl, atomic_write, read_jsonl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuarantinedRow:
    """A row without an answer that could be trained on.

    Attributes:
        row: number in the data set, counted from 0.
        image: as the data set writes it.
        kind: kind of a `balcap.judge.JudgeFailure`, a cause of `balcap.data`, or one of the command's own.
        reason: for a person.
    """

    row: int
    image: str
    kind: str
    reason: str


class Quarantine(dict[int, QuarantinedRow]):
    """Row -> why it has no answer; on disk as soon as it is added."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def read(self) -> dict[int, QuarantinedRow]:
        """What is on disk."""
        return {line["row"]: QuarantinedRow(**line) for line in read_jsonl(self.path)}

    def add(self, entry: QuarantinedRow) -> None:
        """List the row, in place of what was listed for it before."""
        self[entry.row] = entry
        append_jsonl(self.path, [asdict(entry)])

    def write(self) -> None:
        """Write the file anew, in the order of the rows; no file where nothing is listed."""
        if not self:
            self.path.unlink(missing_ok=True)
            return
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(asdict(self[row])) + "\n" for row in sorted(self))


@contextmanager
def claim(path: Path, command: str, settings: dict[str, Any]) -> Iterator[bool]:
    """Hold the settings file of an `out` while a run works on it. Yields whether this is the first run, which
    writes it.

    Args:
        path: the file.
        command: whose run it is.
        settings: key -> value of all that answers depend on.

    Raises:
        ConfigError: the file was written with other settings, by something else, or another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError([f"out: another process is working with {path} right now"]) from None
        except OSError:
            pass  # a file system that knows no locks
        file.seek(0)
        text = file.read()
        if not text:
            json.dump({command: settings}, file, indent=2)
            file.flush()
        elif problems := _changed(path, text, command, json.loads(json.dumps(settings))):
            raise ConfigError(problems)
        yield not text


def _changed(path: Path, text: str, command: str, settings: dict[str, Any]) -> list[str]:
    """What differs between a settings file and `settings`, one message each; empty for nothing."""
    try:
        saved = dict(json.loads(text)[command])
    except (ValueError, KeyError, TypeError):
        return [f"out: {path} was not written by {command}. Name another out, or move that file away"]
    problems = [
        f"{key} was {json.dumps(saved.get(key)):.100}, is {json.dumps(settings.get(key)):.100}"
        for key in saved | settings
        if saved.get(key) != settings.get(key)
    ]
    if problems:
        problems.append(
            f"out: {path} was begun with the settings above. Set them back to go on; or name another out, or "
            "move that file away, to begin anew (what is in judge.cache is not paid for again)"
        )
    return problems


def plan_rows(
    settings: RowsSettings, table: Any
) -> tuple[list[int], dict[int, QuarantinedRow], dict[int, int]]:
    """The rows that are asked about, in the order of the data set; those that cannot be, with the reason; and of further
    rows of an image the first one.

    A missing caption or question is no fault here.

    Raises:
        DataError: none is left.
    """
    root = Path(settings.image_root or "").expanduser()
    sample_ids, causes = table.column("sample_id"), table.column("problem")
    chosen, missing = select_rows(sample_ids, root, settings.folders, settings.max_rows)
    for folder, count in missing.items():
        log.warning("folder_not_on_disk: %s/%s does not exist, %d rows left out", root, folder, count)
    if not len(chosen):
        raise DataError(
            f"image_root: no row of {settings.data} is left: {', '.join(missing) or 'none'} not found under "
            f"{root} (folders={settings.folders})"
        )
    first: dict[str, int] = {}
    bad: dict[int, QuarantinedRow] = {}
    same: dict[int, int] = {}
    for row in map(int, chosen):
        image, cause = sample_ids[row], causes[row]
        if cause and cause not in TEXT_ONLY_CAUSES:
            bad[row] = QuarantinedRow(row, image, cause, table[row]["detail"])
        elif first.setdefault(image, row) != row:
            same[row] = first[image]
    return list(first.values()), bad, same


def write_out(
    settings: RowsSettings, new_row: Callable[[int, Any], dict[str, Any] | None], digest: str
) -> None:
    """Write ``<out>``, whole or not at all.

    Args:
        settings: of the run.
        new_row: a row's number and the row as it was -> what is written of it, None for nothing.
        digest: of the data set as it was when the run began.

    Raises:
        DataError: the data set is another one now.
    """
    rows, digest_now = raw_rows(str(settings.data), settings.name, settings.cache_dir)
    if digest_now != digest:
        raise DataError(
            f"data: {settings.data} has changed while the judge was asked about its rows. Put back what it was and "
            "run the same command: nothing is paid for again"
        )
    new = (new_row(row, raw) for row, raw in enumerate(rows))
    write_rows(settings.out_path, (row for row in new if row is not None))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON array, one row a line, whole or not at all."""
    # Half of a surrogate pair is legal in JSON but not in UTF-8: "replace".
    with atomic_write(path, errors="replace") as file:
        file.write("[\n")
        for number, row in enumerate(rows):
            file.write((",\n" if number else "") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
