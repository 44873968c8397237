"""What a recaption run reads and writes beside the judge's cache.

``<out>``                    the ShareGPT4V file, written at the end, whole or not at all
``<out>.quarantine.jsonl``   rows without a caption that can be used, and why
``<out>.settings.json``      what the answers depend on: a run with other settings is refused
``<out>.ledger.sqlite``      what was paid (`balcap.judge`)
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from balcap.commands.recaption_settings import RecaptionSettings
from balcap.config import ConfigError
from balcap.data.json_files import DataError
from balcap.data.layouts import LAYOUT_KEYS, PLACEHOLDER, image_paths, normalise
from balcap.data.order import select_rows
from balcap.data.reader import prompt_for
from balcap.data.table import TEXT_ONLY_CAUSES, raw_rows
from balcap.judge import Decompose, Recaption
from balcap.utils.files import append_jsonl, atomic_write, read_jsonl

log = logging.getLogger(__name__)


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
    """Row -> why it has no caption; on disk as soon as it is added."""

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
def claim(path: Path, settings: dict[str, Any]) -> Iterator[bool]:
    """Hold the settings file of an `out` while a run works on it. Yields whether this is the first run, which
    writes it.

    Args:
        path: the file.
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
            json.dump({"recaption": settings}, file, indent=2)
            file.flush()
        elif problems := _changed(path, text, json.loads(json.dumps(settings))):
            raise ConfigError(problems)
        yield not text


def _changed(path: Path, text: str, settings: dict[str, Any]) -> list[str]:
    """What differs between a settings file and `settings`, one message each; empty for nothing."""
    try:
        saved = dict(json.loads(text)["recaption"])
    except (ValueError, KeyError, TypeError):
        return [f"out: {path} was not written by recaption. Name another out, or move that file away"]
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


def plan_rows(settings: RecaptionSettings, table: Any) -> tuple[list[int], dict[int, QuarantinedRow]]:
    """The rows that can be captioned, in the order of the data set; and those that cannot.

    A missing caption or question is no fault here, a second row of an image is.

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
    for row in map(int, chosen):
        image, cause = sample_ids[row], causes[row]
        if cause and cause not in TEXT_ONLY_CAUSES:
            bad[row] = QuarantinedRow(row, image, cause, table[row]["detail"])
        elif first.setdefault(image, row) != row:
            why = f"row {first[image]} has the same image"
            bad[row] = QuarantinedRow(row, image, "duplicate_image", why)
    return list(first.values()), bad


def output_row(
    raw: dict[str, Any], caption: str, units: Sequence[str], settings: RecaptionSettings
) -> dict[str, Any]:
    """A row of the data set in ShareGPT4V's layout, with its new caption, and the old one as ``original_caption``;
    other keys stay.

    Args:
        raw: the row as it was.
        caption: the new caption.
        units: what it asserts.
        settings: which question the row was asked, and who answered.
    """
    flat = normalise(raw, 0)
    paths = image_paths(flat["sample_id"])
    turns = raw.get("conversations") or ()
    human = next((turn.get("value") for turn in turns if str(turn.get("from")) == "human"), None)
    if settings.prompts or not human or PLACEHOLDER not in human:
        asked = prompt_for(flat["sample_id"], flat["question"], settings.prompts or (), settings.seed)
        human = asked if PLACEHOLDER in asked else f"{PLACEHOLDER * len(paths)}\n{asked}"
    return {
        **{key: value for key, value in raw.items() if key not in LAYOUT_KEYS},
        "image": paths if len(paths) > 1 else paths[0],
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": caption}],
        "original_caption": "\n".join(flat["captions"]),
        "caption_model": settings.asked_model(Recaption),
        "reference_units": units,
        "units_model": settings.asked_model(Decompose),
    }


def write_out(settings: RecaptionSettings, answered: Mapping[int, str], digest: str) -> None:
    """Write ``<out>``, whole or not at all.

    Args:
        settings: of the run.
        answered: row -> its caption and what that asserts, as JSON.
        digest: of the data set as it was when the run began.

    Raises:
        DataError: the data set is another one now.
    """
    rows, digest_now = raw_rows(str(settings.data), settings.name, settings.cache_dir)
    if digest_now != digest:
        raise DataError(
            f"data: {settings.data} has changed while its rows were captioned. Put back what it was and "
            "run the same command: nothing is paid for again"
        )
    answers = ((raw, json.loads(answered[row])) for row, raw in enumerate(rows) if row in answered)
    write_rows(
        settings.out_path, (output_row(raw, caption, units, settings) for raw, (caption, units) in answers)
    )


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON array, one row a line, whole or not at all."""
    # Half of a surrogate pair is legal in JSON but not in UTF-8: "replace".
    with atomic_write(path, errors="replace") as file:
        file.write("[\n")
        for number, row in enumerate(rows):
            file.write((",\n" if number else "") + json.dumps(row, ensure_ascii=False))
        file.write("\n]\n")
