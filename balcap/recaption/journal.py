"""What has been answered so far, one JSON object a line: ``<out>.journal.jsonl``.

::

    {"journal": "recaption", "format": 1, "settings": {"judge.model": "openai/gpt-5-mini", …}}
    {"row": 17, "image": "coco/…", "caption": "A tray of …", "model": "openai/gpt-5-mini"}
    {"row": 17, "image": "coco/…", "units": ["There is a tray.", …], "model": "openai/gpt-4o-mini"}
    {"row": 18, "image": "coco/…", "kind": "refused", "reason": "recaption: openai/gpt-5-mini refused …"}

Lines are only ever added, each in one write as soon as its answer is there. A process that is killed leaves
at most half a line behind, which is dropped when the journal is opened again; its answer is in the judge's
cache. Where a row has several lines of one sort, the last one counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: two runs that write one journal are not told from each other there
    fcntl = None  # type: ignore[assignment]

NAME = "recaption"
FORMAT = 1
_HEAD = b'{"journal": "recaption", '


class JournalError(ValueError):
    """The journal cannot be continued; `problems` says what to change, one message each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Quarantined:
    """A row without a caption that could be trained on.

    Attributes:
        row: number in the data set, counted from 0.
        image: as the data set writes it.
        kind: a `balcap.judge.errors.FailureKind`, a cause of `balcap.data`, or ``no_units``.
        reason: for a person.
    """

    row: int
    image: str
    kind: str
    reason: str


class Journal:
    """Captions, units and failures by row. In memory are places in the file, not texts.

    Args:
        path: the file; made if it is missing.
        settings: key -> value of all that answers depend on. A journal of other ones is refused.

    Attributes:
        quarantined: row -> why it has no caption, or no units.

    Raises:
        JournalError: it was written with other settings, is damaged, no journal, or open in another process.
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.quarantined: dict[int, Quarantined] = {}
        self._captions: dict[int, int] = {}
        self._units: dict[int, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115  closed by `close`
        try:
            self._lock()
            self._end = self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self._file.close()
            raise

    def has_caption(self, row: int) -> bool:
        return row in self._captions

    def has_units(self, row: int) -> bool:
        return row in self._units

    def caption(self, row: int) -> tuple[str, str]:
        """Caption and the model that wrote it; KeyError where there is none."""
        line = self._line(self._captions[row])
        return line["caption"], line["model"]

    def units(self, row: int) -> tuple[list[str], str]:
        """Assertions of the caption and the model that found them; KeyError where there are none."""
        line = self._line(self._units[row])
        return line["units"], line["model"]

    def add_caption(self, row: int, image: str, caption: str, model: str) -> None:
        self._add({"row": row, "image": image, "caption": caption, "model": model})

    def add_units(self, row: int, image: str, units: Sequence[str], model: str) -> None:
        self._add({"row": row, "image": image, "units": list(units), "model": model})

    def add_quarantined(self, entry: Quarantined) -> None:
        self._add(asdict(entry))

    def close(self) -> None:
        """Bring everything to the disk and give the file free; safe to call twice."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _add(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        place, self._end = self._end, self._end + len(data)
        self._file.write(data)
        self._file.flush()
        self._index(line, place)

    def _index(self, line: dict[str, Any], place: int) -> None:
        row = line["row"]
        if "kind" in line:
            self.quarantined[row] = Quarantined(row, line["image"], line["kind"], line["reason"])
            return
        self.quarantined.pop(row, None)
        if "caption" in line:
            self._captions[row] = place
            self._units.pop(row, None)  # of an earlier caption
        else:
            self._units[row] = place

    def _line(self, place: int) -> dict[str, Any]:
        self._file.seek(place)
        return json.loads(self._file.readline())

    # ---- opening

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JournalError([f"out: another process is writing {self.path} right now"]) from None
            except OSError:
                pass  # some network file systems know no locks

    def _read(self, settings: dict[str, Any]) -> int:
        """Index what is there, drop a torn end, write the header of a new journal; where the file ends."""
        self._file.seek(0)
        place, torn = 0, None
        for number, data in enumerate(self._file, start=1):
            line = _parsed(data)
            if line is None:
                torn = number if torn is None else torn
            elif torn is not None:
                raise JournalError(
                    [f"out: line {torn} of {self.path} is damaged. Remove it: what it held is asked again"]
                )
            elif number == 1:
                self._check(line, settings)
                place += len(data)
            else:
                self._index(line, place)
                place += len(data)
        if torn == 1:
            self._file.seek(0)
            if not _HEAD.startswith(self._file.read(len(_HEAD))):
                raise self._foreign()
        if torn is not None:
            self._file.truncate(place)
        if place == 0:
            header = {"journal": NAME, "format": FORMAT, "settings": settings}
            place = self._file.write(json.dumps(header).encode() + b"\n")
            self._file.flush()
        return place

    def _check(self, header: dict[str, Any], settings: dict[str, Any]) -> None:
        if header.get("journal") != NAME or header.get("format") != FORMAT:
            raise self._foreign()
        saved = header["settings"]
        changed = [key for key in {**saved, **settings} if saved.get(key) != settings.get(key)]
        if changed:
            raise JournalError(
                [
                    *(
                        f"{key} was {_short(saved.get(key))}, is {_short(settings.get(key))}"
                        for key in changed
                    ),
                    f"out: {self.path} was begun with the settings above. Set them back to go on with it; or "
                    "name another out, or move the journal away, to begin anew (what is in judge.cache is not "
                    "paid for again)",
                ]
            )

    def _foreign(self) -> JournalError:
        advice = "Name another out, or move that file away"
        return JournalError([f"out: {self.path} is no journal of this version of recaption. {advice}"])


def _parsed(data: bytes) -> dict[str, Any] | None:
    """A whole line as an object; None for anything else, such as the half line of a process that was killed."""
    if not data.endswith(b"\n"):
        return None
    try:
        line = json.loads(data)
    except ValueError:
        return None
    whole = isinstance(line, dict) and ("journal" in line or ("row" in line and "image" in line))
    return line if whole else None


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."
