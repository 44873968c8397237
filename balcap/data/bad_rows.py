"""`bad_rows.jsonl`: every row that was left out, once, with the reason.

One JSON object a line: ``{"row": 17, "image": "coco/…", "cause": "missing_file", "detail": "…"}``. All ranks
and all data workers of a run write to the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from pathlib import Path

from balcap.utils.errors import UserError
from balcap.utils.files import append_jsonl


class TooManyBadRows(UserError):
    """More than ``data.max_bad_share`` of the rows read so far are bad: the set-up is wrong, not the data."""


class BadRowLog:
    """Appends bad rows to a file shared by processes, each row once.

    What other processes, or this run before it was resumed, have listed is read back under the file's lock
    before each append, so that a row met again in a later epoch is not listed again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "bad_rows.jsonl"
        self._seen: dict[tuple[int, str], str] = {}
        self._offset = 0

    def add(self, row: int, image: str, cause: str, detail: str) -> bool:
        """List the row; False if it is listed already."""
        if (row, image) in self._seen:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            # Network file systems may refuse locks; the worst that follows is a row listed twice.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            self.total()
            if (row, image) in self._seen:
                return False
            append_jsonl(self.path, [{"row": row, "image": image, "cause": cause, "detail": detail}])
        return True

    def counts(self) -> dict[str, int]:
        """Number of bad rows by cause, over all processes, most frequent first."""
        self.total()
        return dict(Counter(self._seen.values()).most_common())

    def first(self) -> str:
        """One of them for a person, with its number and what is wrong; empty where there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entry = json.loads(lines[0]) if lines else None
        return f"row {entry['row']}, {entry['image']}: {entry['detail']}" if entry else ""

    def total(self) -> int:
        """Number of bad rows, over all processes: reads what was appended since the last call."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # somebody emptied the file
                self._offset, self._seen = 0, {}
            file.seek(self._offset)
            new = file.read()
            end = new.rfind(b"\n") + 1  # a process that was killed may have left half a line behind
            for line in new[:end].splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self._seen[entry["row"], entry["image"]] = entry["cause"]
            self._offset += end
        return len(self._seen)

    def summary(self) -> str:
        """One line: ``12 bad rows (missing_file 10, truncated_image 2), listed in runs/a/bad_rows.jsonl``."""
        counts = self.counts()
        causes = ", ".join(f"{cause} {n}" for cause, n in counts.items())
        return f"{sum(counts.values())} bad rows ({causes}), listed in {self.path}"
