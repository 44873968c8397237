"""JSON files as people have them -> rows, one at a time: arrays, JSON lines, and COCO's one object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from balcap.data.layouts import MalformedLine
from balcap.utils.errors import UserError


class DataError(UserError, ValueError):
    """The data set cannot be read at all; the message names the key that fixes it."""


def _int(digits: str) -> int | str:
    """Python converts no number of more than 4,300 digits; it stays a text then, which no column takes for one."""
    return int(digits) if len(digits) <= 4300 else digits


_DECODER = json.JSONDecoder(parse_int=_int)
_SPACE, _BRACKETS = re.compile(r"\s*"), re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def parse_rows(path: str | Path) -> Iterator[Any]:
    """Rows of a JSON array, of JSON lines, or of a COCO or Flickr30k file; a broken line is a `MalformedLine`.

    Rows are parsed one at a time: the objects of a file of 134 MB would take a gigabyte. UTF-8 and UTF-16 are read.

    Raises:
        DataError: the file is none of these, or breaks off; with the place and what to do.
    """
    text = _text(Path(path).read_bytes())
    start = _skip(text, 0)
    if text.startswith("[", start):
        yield from _parse_array(text, start, path)
    elif text.startswith("{", start):
        yield from _parse_objects(text, start, path)
    else:
        content = f"starts with {text[:20]!r}" if text[start:] else "is empty"
        raise DataError(f"data.data: {path} {content}; expected a JSON array, [{{...}}, ...], or JSON lines")


def read_json(path: str | Path) -> Any:
    """A JSON document whole, or the list of the lines of a ``.jsonl`` file; UTF-8 and UTF-16.

    Raises:
        DataError: it cannot be read, with the line.
    """
    text, number = read_text(path), 0
    try:
        if not str(path).endswith(".jsonl"):
            return _DECODER.decode(text)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # noqa: B007  the error names it
            if line.strip():
                rows.append(_DECODER.decode(line.strip()))
        return rows
    except (ValueError, RecursionError) as error:
        where = f", line {number}," if number else ""
        raise DataError(f"{path}{where} cannot be read: {error}") from None


def read_text(path: str | Path) -> str:
    """A text file; raises `DataError` where it cannot be opened."""
    try:
        return _text(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _text(data: bytes) -> str:
    """Bytes that are not UTF-8 become U+FFFD, which costs the row in which they stand, not the file."""
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return data.decode(encoding, errors="replace")


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too


def _parse_array(text: str, start: int, path: str | Path) -> Iterator[Any]:
    row, position = 0, _skip(text, start + 1)
    try:
        while not text.startswith("]", position):
            raw, position = _decode(text, position)
            yield raw
            row += 1
            position = _skip(text, position)
            if text.startswith(",", position):
                position = _skip(text, position + 1)  # one before the end is no harm
            elif not text.startswith("]", position):
                raise json.JSONDecodeError(f"expected ',' or ']' after row {row - 1}", text, position)
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("text after the end of the array", text, position + 1)
    except json.JSONDecodeError as error:
        advice = "Fix that place, or write JSON lines (.jsonl), where a broken line costs one row."
        if not text.rstrip().endswith("]"):
            advice = "The file breaks off: it was not downloaded or written to its end, get it again."
        raise DataError(f"data.data: {path} is not valid JSON in row {row}: {error}. {advice}") from error
    if row == 0:
        raise DataError(f"data.data: {path} is an empty array; expected rows with images and captions")


def _decode(text: str, position: int) -> tuple[Any, int]:
    """The value at a place and where it ends; a `MalformedLine` for one that is nested too deeply to be parsed."""
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError:
        depth = 0
        for match in _BRACKETS.finditer(text, position):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return MalformedLine("nested too deeply"), match.end()
        raise json.JSONDecodeError("nested too deeply, and never closed", text, position) from None


def _parse_objects(text: str, start: int, path: str | Path) -> Iterator[Any]:
    """JSON lines, or one object that holds a whole data set."""
    try:
        first, end = _decode(text, start)
    except json.JSONDecodeError:
        first, end = None, start
    if isinstance(first, dict) and isinstance(first.get("images"), list) and not text[end:].strip():
        yield from _dataset_rows(first, path)
    elif str(path).endswith(".jsonl") or (first is not None and "\n" not in text[start:end]):
        yield from _parse_lines(text)
    else:
        what = f"is one object with the keys {', '.join(first)}" if isinstance(first, dict) else "is not JSON"
        raise DataError(
            f"data.data: {path} {what}; expected a JSON array, [{{...}}, ...], JSON lines, or COCO's images and "
            "annotations"
        )


def _parse_lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield _DECODER.decode(line.strip().removesuffix(","))
            except (json.JSONDecodeError, RecursionError) as error:
                yield MalformedLine(f"line {number} of the file is not JSON: {error}")


def _dataset_rows(data: dict[str, Any], path: str | Path) -> Iterator[dict[str, Any]]:
    """COCO: one row per annotation that has a caption. Flickr30k in Karpathy's layout: its images, with sentences."""
    images = data["images"]
    annotations = data.get("annotations")
    if annotations is None and all(isinstance(image, dict) and "sentences" in image for image in images):
        yield from images
        return
    if not isinstance(annotations, list) or not any(
        "caption" in a for a in annotations if isinstance(a, dict)
    ):
        raise DataError(
            f"data.data: {path} has images without captions: COCO's are in annotations, each with image_id and caption"
        )
    names = {image.get("id"): image for image in images if isinstance(image, dict)}
    for annotation in annotations:
        known = isinstance(annotation, dict) and annotation.get("image_id") in names
        image = names[annotation["image_id"]].get("file_name") if known else None
        caption = annotation.get("caption") if isinstance(annotation, dict) else None
        yield {"image": image, "caption": caption}
