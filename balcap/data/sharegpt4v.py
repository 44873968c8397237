"""ShareGPT4V JSON, local or from the hub -> a memory-mapped table with one flat row per caption.

A row of the file::

    {"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": [
        {"from": "human", "value": "What do you see?\\n<image>"}, {"from": "gpt", "value": "A tray of …"}]}

``id`` is not unique in ShareGPT4V, so a sample is known by its image. A row that is not as it should be
keeps its place in the table with a cause: whoever reads it can list it and go on.

Further keys that `data.columns` names are kept as they are, see `balcap.data.columns`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from balcap.data.columns import MALFORMED_COLUMN, Columns, storable
from balcap.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PLACEHOLDER = "<image>"

TEXT_ONLY_CAUSES = frozenset(("no_caption", "no_image_placeholder", MALFORMED_COLUMN))
"""Causes that do not matter to who only needs the image."""

_FORMAT = 3
"""Part of the cache's key: raise it when `flat_rows` answers differently."""


class DataError(UserError, ValueError):
    """The data set cannot be read at all; the message names the key that fixes it."""


@dataclass(frozen=True)
class MalformedLine:
    """A line of a JSON lines file that is not JSON."""

    detail: str


def flat_row(row: int, **values: Any) -> dict[str, Any]:
    """One row of the table, as `normalise` describes it; empty but for `values`."""
    texts = dict.fromkeys(("sample_id", "question", "caption", "problem", "detail"), "")
    return {"row": row, **texts, "columns": {}, **values}


def normalise(raw: Any, row: int) -> dict[str, Any]:
    """One raw row as flat columns.

    Args:
        raw: the row as parsed, whatever it is.
        row: its number in the file, counted from 0.

    Returns:
        ``row``; ``sample_id``, the image as the data set writes it ("" if there is none); ``question``
        without placeholder; ``caption``; ``problem``, the cause why the row is bad, or ""; ``detail``; and
        ``columns``, JSON texts that `flat_rows` fills in.
    """
    flat = flat_row(row)

    def bad(cause: str, detail: str) -> dict[str, Any]:
        return flat | {"problem": cause, "detail": detail}

    if isinstance(raw, MalformedLine):
        return bad("malformed_row", raw.detail)
    if not isinstance(raw, dict):
        return bad("malformed_row", f"expected an object, found {type(raw).__name__}")
    image = raw.get("image")
    if not isinstance(image, str) or not image.strip():
        return bad("no_image_field", f'"image" is {image!r:.60}')
    flat["sample_id"] = storable(image)
    turns = raw.get("conversations") or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return bad("malformed_row", '"conversations" is not a list of objects')
    first_turn = {str(turn.get("from")): turn.get("value") for turn in reversed(turns)}
    question, caption = first_turn.get("human", ""), first_turn.get("gpt", "")
    for speaker, value in (("human", question), ("gpt", caption)):
        if not isinstance(value, str | None):
            return bad("malformed_row", f"the {speaker} turn is {value!r:.60}, not text")
    question = storable(question or "")
    flat["question"] = question.replace(PLACEHOLDER, "").strip()
    flat["caption"] = storable(caption or "").strip()
    for field in ("sample_id", "question", "caption"):
        if (at := flat[field].find("\ufffd")) >= 0:
            around = flat[field][max(0, at - 20) : at + 20]
            return bad("not_utf8", f"{field} holds bytes that are not UTF-8: {around!r}")
    if not flat["caption"]:
        return bad("no_caption", "no gpt turn with text")
    if PLACEHOLDER not in question:
        return bad("no_image_placeholder", f"no {PLACEHOLDER} in the human turn {question!r:.60}")
    return flat


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
    elif start == "{" and (
        str(path).endswith(".jsonl") or isinstance(next(_parse_lines(text.lstrip().splitlines()[0])), dict)
    ):
        yield from _parse_lines(text)
    else:
        content = f"starts with {text[:20]!r}" if start else "is empty"
        raise DataError(f"data.data: {path} {content}; expected a JSON array, [{{...}}, ...], or JSON lines")


def _parse_array(text: str, path: str | Path) -> Iterator[Any]:
    decoder, space, row = json.JSONDecoder(), re.compile(r"\s*"), 0

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too

    try:
        position = skip(text.index("[") + 1)
        while not text.startswith("]", position):
            raw, position = decoder.raw_decode(text, position)
            yield raw
            row += 1
            position = skip(position)
            if text.startswith(",", position):
                position = skip(position + 1)
            elif not text.startswith("]", position):
                raise json.JSONDecodeError(f"expected ',' or ']' after row {row - 1}", text, position)
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("text after the end of the array", text, position + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        advice = "Fix that place, or write JSON lines (.jsonl), where a broken line costs one row."
        if not text.rstrip().endswith("]"):
            advice = "The file breaks off: it was not downloaded or written to its end, get it again."
        raise DataError(f"data.data: {path} is not valid JSON in row {row}: {error}. {advice}") from error


def _parse_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield MalformedLine(f"line {number} of the file is not JSON: {error}")


def flat_rows(raw_rows: Iterable[Any], columns: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Normalised rows with their columns.

    Besides the causes of `normalise`, a second good row with the same image is bad, ``duplicate_image``, and
    so is one with a column of another kind than before, ``malformed_column``.

    Raises:
        DataError: after the last row, if no row had one of the `columns`.
    """
    first: dict[str, int] = {}
    taken = Columns(columns)
    for row, raw in enumerate(raw_rows):
        flat = normalise(raw, row)
        if not flat["problem"] and (other := first.setdefault(flat["sample_id"], row)) != row:
            flat |= {"problem": "duplicate_image", "detail": f"row {other} has the same image"}
        usable = not flat["problem"] or flat["problem"] in TEXT_ONLY_CAUSES
        flat["columns"], malformed = taken.take(raw if usable else {}, row)
        if malformed and not flat["problem"]:
            flat |= {"problem": MALFORMED_COLUMN, "detail": malformed}
        yield flat
    if taken.unseen:
        raise DataError(taken.unseen_message())


@dataclass(frozen=True)
class RowFile:
    """The rows of a file, as `parse_rows` reads them. The digest of its content keys the cache."""

    path: str
    digest: str

    def __iter__(self) -> Iterator[Any]:
        return parse_rows(self.path)


def raw_rows(data: str, name: str | None = None, cache_dir: str | None = None) -> tuple[Iterable[Any], str]:
    """The rows that `load_rows` makes a table of, as parsed and in the same order, and the same digest.

    Raises:
        DataError: as `load_rows`; for a file that breaks off, not before its rows are read.
    """
    import datasets

    path = Path(data).expanduser()
    try:
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return RowFile(str(path), digest), digest
    except OSError as error:
        raise DataError(f"data.data: cannot read {path}: {error.strerror}") from error
    try:
        rows = datasets.load_dataset(data, name, split="train", cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.data: no file {data!r} here, and as a hub data set (data.name={name}) it fails to load: "
            f"{error}. Without a network, download the JSON file elsewhere and give its path."
        ) from error
    return rows, rows._fingerprint


def _generate(rows: Iterable[Any], columns: tuple[str, ...], version: int) -> Iterator[dict[str, Any]]:
    # `version` is here to be hashed: it keys the cache.
    yield from flat_rows(rows, columns)


def load_rows(
    data: str, name: str | None = None, cache_dir: str | None = None, columns: Collection[str] = ()
) -> tuple[Dataset, str]:
    """The data set as a memory-mapped table of the rows of `flat_rows`.

    The table is written once into the Hugging Face cache under a lock, whichever process comes first, and
    is keyed on the content of the file and the columns.

    Args:
        data: path of a ``.json`` or ``.jsonl`` file, or a hub id such as ``Lin-Chen/ShareGPT4V``.
        name: configuration on the hub, such as ``ShareGPT4V``.
        cache_dir: folder of the cache; None for Hugging Face's own (``HF_DATASETS_CACHE``).
        columns: further keys of the rows to keep, besides ``reference_units``.

    Returns:
        The table, and a digest of the content it was made from.

    Raises:
        DataError: the file or hub data set cannot be read, or no row has one of the columns.
    """
    import datasets

    text = datasets.Value("string")
    kept = dict.fromkeys(Columns(columns).names, text)
    features = dict.fromkeys(flat_row(0), text) | {"row": datasets.Value("int64"), "columns": kept}
    rows, digest = raw_rows(data, name, cache_dir)
    try:
        table = datasets.Dataset.from_generator(
            _generate,
            features=datasets.Features(features),
            cache_dir=cache_dir,
            gen_kwargs={"rows": rows, "columns": tuple(sorted(set(columns))), "version": _FORMAT},
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


def column(table: Dataset, name: str) -> list[str]:
    """One column as a list: much faster than row by row."""
    return table.data.column(name).to_pylist()
