"""From the journal to files that others read: the ShareGPT4V file, and the list of rows that are not in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from balcap.data.reader import prompt_for
from balcap.data.sharegpt4v import PLACEHOLDER, normalise
from balcap.recaption.journal import Quarantined


def output_row(
    raw: dict[str, Any],
    caption: tuple[str, str],
    units: tuple[list[str], str] | None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    keep_original: bool = True,
) -> dict[str, Any]:
    """A row of the data set with its new caption; keys that are nobody's business here stay as they are.

    Args:
        raw: the row as it was.
        caption: the new caption, and the model that wrote it.
        units: the assertions of the new caption, and the model that found them; None to write none.
        prompts, seed: as `balcap.data.reader.prompt_for`.
        keep_original: store the caption that is replaced as ``original_caption``.
    """
    flat = normalise(raw, 0)
    new = {key: value for key, value in raw.items() if key not in ("reference_units", "units_model")}
    human = next((turn.get("value") for turn in raw.get("conversations") or () if _is_human(turn)), None)
    if prompts or not human or PLACEHOLDER not in human:
        human = f"{PLACEHOLDER}\n{prompt_for(flat['sample_id'], flat['question'], prompts, seed)}"
    new["conversations"] = [{"from": "human", "value": human}, {"from": "gpt", "value": caption[0]}]
    if keep_original:
        new["original_caption"] = flat["caption"]
    new["caption_model"] = caption[1]
    if units is not None:
        new["reference_units"], new["units_model"] = units
    return new


def _is_human(turn: dict[str, Any]) -> bool:
    return str(turn.get("from")) == "human"


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

    _replace(path, lines())
    return number


def write_quarantine(path: Path, entries: Iterable[Quarantined]) -> None:
    """Write the list anew, in the order of the rows; no file where there is nothing to list."""
    found = sorted(entries, key=lambda entry: entry.row)
    if found:
        _replace(path, (json.dumps(asdict(entry)) + "\n" for entry in found))
    else:
        path.unlink(missing_ok=True)


def append_quarantined(path: Path, entry: Quarantined) -> None:
    """Add a row while the run goes on; `write_quarantine` puts it in its place."""
    with open(path, "a") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def _replace(path: Path, texts: Iterable[str]) -> None:
    """Write through a file beside `path`, so that whoever reads `path` sees the old or the new one, whole."""
    partial = path.with_name(f"{path.name}.part")
    # Half of a surrogate pair is legal in JSON but not in UTF-8: "replace".
    with open(partial, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if hasattr(os, "O_DIRECTORY"):  # the new name is on disk too, where a folder can be opened
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
