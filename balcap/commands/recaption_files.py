"""What a recaption run reads and writes beside the judge's cache.

``<out>``                    the ShareGPT4V file, written at the end, whole or not at all
``<out>.quarantine.jsonl``   rows without a caption that can be used, and why
``<out>.settings.json``      what the answers depend on: a run with other settings is refused
``<out>.ledger.sqlite``      what was paid (`balcap.judge`)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from balcap.data.prompt import prompt_for
from balcap.data.sharegpt4v import PLACEHOLDER, normalise

REMEMBERED = frozenset(("refused", "filtered", "invalid", "cut", "too_long", "rejected"))
"""Causes that cost a call to find out: the next run asks again only with ``retry_quarantined``."""


@dataclass(frozen=True)
class QuarantinedRow:
    """A row without a caption that could be trained on.

    Attributes:
        row: number in the data set, counted from 0.
        image: as the data set writes it.
        kind: kind of a `balcap.judge.JudgeFailure`, a cause of `balcap.data`, or ``no_units``.
        reason: for a person.
    """

    row: int
    image: str
    kind: str
    reason: str


class Quarantine(dict[int, QuarantinedRow]):
    """Row -> why it has no caption; on disk as soon as it is added.

    Args:
        path: the file, which an earlier run may have left. Half a line at its end, of a process that was
            killed, is dropped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = QuarantinedRow(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self[row.row] = row

    def add(self, row: QuarantinedRow) -> None:
        """List the row, in place of what was listed for it before."""
        self[row.row] = row
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def write(self) -> None:
        """Write the file anew, in the order of the rows; no file where nothing is listed."""
        if self:
            replace_file(self.path, (json.dumps(asdict(self[row])) + "\n" for row in sorted(self)))
        else:
            self.path.unlink(missing_ok=True)


class AnsweredRows:
    """Row -> its caption and units, in an unnamed file: a data set's captions are too many for the memory."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by `close`
        self._offsets: dict[int, int] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, row: int, caption: str, units: Sequence[str] | None) -> None:
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps([caption, units]).encode() + b"\n")
        self._offsets[row] = offset

    def get(self, row: int) -> tuple[str, list[str] | None]:
        """Caption and units; KeyError where there are none."""
        self._file.seek(self._offsets[row])
        caption, units = json.loads(self._file.readline())
        return caption, units

    def close(self) -> None:
        self._file.close()


@contextmanager
def claim(path: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the settings file of an `out` while a run works on it; written by the first run.

    Args:
        path: the file.
        settings: key -> value of all that answers depend on.

    Raises:
        ConfigError: the file was written with other settings, by something else, or another process holds it.
    """
    with open(path, "a+", encoding="utf-8") as file:
        _lock(file)
        file.seek(0)
        text, new = file.read(), json.dumps({"recaption": settings}, indent=2)
        if not text:
            file.write(new + "\n")
            file.flush()
            os.fsync(file.fileno())
        elif changed := _changed(path, text, json.loads(new)["recaption"]):
            raise config_error(changed)
        yield


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs on one file are not noticed there
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise config_error([f"out: another process is working with {file.name} right now"]) from None
    except OSError:
        pass  # some network file systems know no locks


def _changed(path: Path, text: str, settings: dict[str, Any]) -> list[str]:
    """What differs between the settings file and `settings`, one message each; empty for nothing."""
    try:
        saved = json.loads(text)["recaption"]
    except (ValueError, KeyError, TypeError):
        return [f"out: {path} was not written by recaption. Name another out, or move that file away"]
    changed = [
        f"{key} was {_short(saved.get(key))}, is {_short(settings.get(key))}"
        for key in {**saved, **settings}
        if saved.get(key) != settings.get(key)
    ]
    advice = (
        f"out: {path} was begun with the settings above. Set them back to go on; or name another out, or move "
        "that file away, to begin anew (what is in judge.cache is not paid for again)"
    )
    return [*changed, advice] if changed else []


def _short(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def config_error(problems: list[str]) -> Exception:
    """A `ConfigError` with these problems."""
    from balcap.cli import ConfigError  # imports Lightning

    return ConfigError(problems)  # type: ignore[return-value]  # a SystemExit


def output_row(
    raw: dict[str, Any],
    caption: tuple[str, str],
    units: tuple[list[str], str] | None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    keep_original: bool = True,
) -> dict[str, Any]:
    """A row of the data set with its new caption; other keys stay as they are.

    Args:
        raw: the row as it was.
        caption: the new caption, and the model that wrote it.
        units: the assertions of the new caption, and the model that found them; None to write none.
        prompts, seed: as `balcap.data.prompt.prompt_for`.
        keep_original: store the caption that is replaced as ``original_caption``.
    """
    flat = normalise(raw, 0)
    new = {key: value for key, value in raw.items() if key not in ("reference_units", "units_model")}
    turns = raw.get("conversations") or ()
    human = next((turn.get("value") for turn in turns if str(turn.get("from")) == "human"), None)
    if prompts or not human or PLACEHOLDER not in human:
        human = f"{PLACEHOLDER}\n{prompt_for(flat['sample_id'], flat['question'], prompts, seed)}"
    new["conversations"] = [{"from": "human", "value": human}, {"from": "gpt", "value": caption[0]}]
    if keep_original:
        new["original_caption"] = flat["caption"]
    new["caption_model"] = caption[1]
    if units is not None:
        new["reference_units"], new["units_model"] = units
    return new


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a JSON array, one row a line, whole or not at all; the number of rows."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        yield "["
        for row in rows:
            yield (",\n" if number else "\n") + json.dumps(row, ensure_ascii=False)
            number += 1
        yield "\n]\n"

    replace_file(path, lines())
    return number


def replace_file(path: Path, texts: Iterable[str]) -> None:
    """Write through a file beside `path`: a reader sees the old or the new file, whole."""
    partial = path.with_name(f"{path.name}.part")
    # Half of a surrogate pair is legal in JSON but not in UTF-8: "replace".
    with open(partial, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
