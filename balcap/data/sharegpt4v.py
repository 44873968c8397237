"""ShareGPT4V JSON, local or from the hub -> a memory-mapped table with one flat row per caption.

A row of the file::

    {"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": [
        {"from": "human", "value": "What do you see?\\n<image>"}, {"from": "gpt", "value": "A tray of …"}]}

``id`` is not unique in ShareGPT4V, so a sample is known by its image. A row that is not as it should be
keeps its place in the table with a cause: whoever reads it can list it and go on.

Beside ShareGPT4V's own keys one more is read: ``"reference_units"``, a list of strings, the assertions of the
caption as `balcap.commands.recaption` writes them. Absent, or null, they are asked for in training. Anything else is a
bad row, ``malformed_units``: to pay for what was to be there already would be a surprise.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

PLACEHOLDER = "<image>"

TEXT_ONLY_CAUSES = frozenset(("no_caption", "no_image_placeholder", "malformed_units"))
"""Causes that do not matter to who only needs the image."""

_FORMAT = 2
"""Part of the cache's key: raise it when `normalise` answers differently."""


class DataError(ValueError):
    """The data set cannot be read at all; the message names the key that fixes it."""


@dataclass(frozen=True)
class MalformedLine:
    """A line of a JSON lines file that is not JSON."""

    detail: str


def normalise(raw: Any, row: int) -> dict[str, Any]:
    """One raw row as flat columns.

    Args:
        raw: the row as parsed, whatever it is.
        row: its number in the file, counted from 0.

    Returns:
        ``row``; ``sample_id``, the image as the data set writes it ("" if there is none); ``question``
        without placeholder; ``caption``; ``reference_units``, assertions of the caption, or None; ``problem``,
        the cause why the row is bad, or ""; ``detail``.
    """
    flat: dict[str, Any] = {
        "row": row,
        "sample_id": "",
        "question": "",
        "caption": "",
        "reference_units": None,
        "problem": "",
        "detail": "",
    }

    def bad(cause: str, detail: str) -> dict[str, Any]:
        return flat | {"problem": cause, "detail": detail}

    if isinstance(raw, MalformedLine):
        return bad("malformed_row", raw.detail)
    if not isinstance(raw, dict):
        return bad("malformed_row", f"expected an object, found {type(raw).__name__}")
    image = raw.get("image")
    if not isinstance(image, str) or not image.strip():
        return bad("no_image_field", f'"image" is {_short(image)}')
    flat["sample_id"] = _storable(image)
    turns = raw.get("conversations") or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return bad("malformed_row", '"conversations" is not a list of objects')
    spoken: dict[str, Any] = {}
    for turn in turns:
        spoken.setdefault(str(turn.get("from")), turn.get("value"))
    question, caption = spoken.get("human", ""), spoken.get("gpt", "")
    for speaker, value in (("human", question), ("gpt", caption)):
        if not isinstance(value, str | None):
            return bad("malformed_row", f"the {speaker} turn is {_short(value)}, not text")
    question, caption = _storable(question or ""), _storable(caption or "")
    flat["question"] = question.replace(PLACEHOLDER, "").strip()
    flat["caption"] = caption.strip()
    for field in ("sample_id", "question", "caption"):
        if "\ufffd" in flat[field]:
            return bad("not_utf8", f"{field} holds bytes that are not UTF-8: {_around(flat[field])}")
    if not flat["caption"]:
        return bad("no_caption", "no gpt turn with text")
    if PLACEHOLDER not in question:
        return bad("no_image_placeholder", f"no {PLACEHOLDER} in the human turn {_short(question)}")
    units = raw.get("reference_units")
    if units is not None:
        if not isinstance(units, list) or not all(isinstance(unit, str) and unit.strip() for unit in units):
            return bad("malformed_units", f'"reference_units" is {_short(units)}, not a list of texts')
        flat["reference_units"] = [_storable(unit) for unit in units]
    return flat


def _storable(text: str) -> str:
    """Arrow stores UTF-8: half of a surrogate pair, legal in JSON, becomes U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _around(text: str) -> str:
    at = text.index("\ufffd")
    return repr(text[max(0, at - 20) : at + 20])


def parse_rows(path: str | Path) -> Iterator[Any]:
    """Rows of a JSON array or of JSON lines, as parsed; a broken line is a `MalformedLine`.

    Rows are parsed one at a time: the objects of a file of 134 MB would take a gigabyte.

    Raises:
        DataError: the file is neither, or breaks off; with the place and what to do.
    """
    # Bytes that are not UTF-8 become U+FFFD, which costs the row in which they stand, not the file.
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read()
    start = text.lstrip()[:1]
    if start == "[":
        yield from _parse_array(text, path)
    elif start == "{" and (str(path).endswith(".jsonl") or _is_json(text.lstrip().splitlines()[0])):
        yield from _parse_lines(text)
    else:
        found = f"starts with {text[:20]!r}" if start else "is empty"
        raise DataError(
            f"data.data: {path} {found}; expected a JSON array of rows, [{{...}}, ...], or JSON lines"
        )


def _parse_array(text: str, path: str | Path) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too

    position, row = skip(text.index("[") + 1), 0
    while text[position : position + 1] != "]":
        try:
            raw, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _broken(path, text, getattr(error, "pos", position), row, str(error)) from error
        yield raw
        row += 1
        position = skip(position)
        follows = text[position : position + 1]
        if follows == ",":
            position = skip(position + 1)
        elif follows != "]":
            raise _broken(path, text, position, row, f"expected ',' or ']' after row {row - 1}")
    if text[position + 1 :].strip():
        raise _broken(path, text, position + 1, row, "text after the end of the array")


def _broken(path: str | Path, text: str, position: int, row: int, reason: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    cut = not text.rstrip().endswith("]")
    advice = (
        "The file breaks off: it was not downloaded or written to its end, get it again."
        if cut
        else "Mend that place, or write the rows as JSON lines (.jsonl), where a broken line costs one row."
    )
    place = f"line {line}, column {column} (character {position}, in row {row})"
    return DataError(f"data.data: {path} is not valid JSON at {place}: {reason.split(': line')[0]}. {advice}")


def _parse_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield MalformedLine(f"line {number} of the file is not JSON: {error}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def flat_rows(raw_rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Normalised rows; a second good row with the same image is bad: ``duplicate_image``."""
    first: dict[str, int] = {}
    for row, raw in enumerate(raw_rows):
        flat = normalise(raw, row)
        if not flat["problem"] and first.setdefault(flat["sample_id"], row) != row:
            flat |= {
                "problem": "duplicate_image",
                "detail": f"row {first[flat['sample_id']]} has the same image",
            }
        yield flat


def _generate(path: str, digest: str, version: int) -> Iterator[dict[str, Any]]:
    # `digest` and `version` are here to be hashed: they key the cache.
    yield from flat_rows(parse_rows(path))


def _generate_from_hub(rows: Iterable[Any], version: int) -> Iterator[dict[str, Any]]:
    yield from flat_rows(rows)


def load_rows(data: str, name: str | None = None, cache_dir: str | None = None) -> tuple[Dataset, str]:
    """The data set as a memory-mapped table with the columns of `normalise`.

    The table is written once into the Hugging Face cache under a lock, whichever process comes first, and
    is keyed on the content of the file.

    Args:
        data: path of a ``.json`` or ``.jsonl`` file, or a hub id such as ``Lin-Chen/ShareGPT4V``.
        name: configuration on the hub, such as ``ShareGPT4V``.
        cache_dir: folder of the cache; None for Hugging Face's own (``HF_DATASETS_CACHE``).

    Returns:
        The table, and a digest of the content it was made from.

    Raises:
        DataError: the file or hub data set cannot be read.
    """
    import datasets

    path = Path(data).expanduser()
    text = datasets.Value("string")
    features = datasets.Features(
        row=datasets.Value("int64"),
        reference_units=datasets.List(text),
        **dict.fromkeys(("sample_id", "question", "caption", "problem", "detail"), text),
    )
    if path.is_file():
        digest = _digest(path)
        generator: Any = _generate
        arguments: dict[str, Any] = {"path": str(path), "digest": digest, "version": _FORMAT}
    else:
        rows = _load_from_hub(data, name, cache_dir)
        digest = rows._fingerprint
        generator, arguments = _generate_from_hub, {"rows": rows, "version": _FORMAT}
    try:
        table = datasets.Dataset.from_generator(
            generator, features=features, cache_dir=cache_dir, gen_kwargs=arguments
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    except OSError as error:
        raise DataError(
            f"data.cache_dir: cannot write to {error.filename or cache_dir} ({error.strerror}); name a "
            "folder that you may write to and that has room"
        ) from error
    return table, digest


def raw_rows(data: str, name: str | None = None, cache_dir: str | None = None) -> tuple[Iterator[Any], str]:
    """The rows that `load_rows` makes a table of, as parsed and in the same order, and the same digest.

    Raises:
        DataError: as `load_rows`; for a file that breaks off, not before its rows are read.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return parse_rows(path), _digest(path)
    rows = _load_from_hub(data, name, cache_dir)
    return iter(rows), rows._fingerprint


def column(table: Dataset, name: str) -> list[str]:
    """One column as a list: much faster than row by row."""
    return table.data.column(name).to_pylist()


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data.data: cannot read {path}: {error.strerror}") from error


def _load_from_hub(data: str, name: str | None, cache_dir: str | None) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(data, name, split="train", cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.data: no file {data!r} here, and as a hub data set (data.name={name}) it fails to load: "
            f"{error}. Without a network, download the JSON file elsewhere and give its path."
        ) from error
