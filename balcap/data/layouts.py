"""One row of a data set, in whichever of the usual layouts -> its images, question and captions.

ShareGPT4V, LLaVA            ``{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                             {"from": "gpt", "value": "A tray of …"}]}``
LLaMA-Factory, ms-swift,     ``{"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>What is it?"},
TRL                          {"role": "assistant", "content": "A tray of …"}]}``; a content may be a list of parts
tables of captions           ``{"file_name": "a.jpg", "caption": "A tray of …"}``, or ``"captions"``: several
COCO, Flickr30k              files of one object, see `balcap.data.json_files`

A row that is not as it should be keeps its place in the table with a cause: whoever reads it can list it and go on.
``id`` is not unique in ShareGPT4V, so a sample is known by its image, or by its images in their order.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from balcap.data.columns import storable
from balcap.data.images import BadImage

PLACEHOLDER = "<image>"

BETWEEN = " // "
"""Between the paths in the ``sample_id`` of a row of several images; `one_spelling` leaves no path with two slashes."""

IMAGE_KEYS = ("image", "images", "image_path", "file_name", "filename", "img")
TURN_KEYS = ("conversations", "messages", "conversation")
QUESTION_KEYS = ("question", "query", "instruction", "prompt")
CAPTION_KEYS = ("caption", "captions", "text", "response", "output", "sentences")
LAYOUT_KEYS = (*IMAGE_KEYS, *TURN_KEYS, *QUESTION_KEYS, *CAPTION_KEYS)
"""Keys that say what the image, the question and the captions are."""

LONGEST_QUESTION, LONGEST_CAPTION = 10_000, 100_000
"""Characters. What is longer is no question about a picture, and would fill the memory of a whole batch."""

NO_CAPTION = "no_caption"
"""Cause of a bad row: it has an image and no caption."""

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class MalformedLine:
    """Part of a JSON file that is no row: a line that is not JSON, a value nested too deeply."""

    detail: str


def flat_row(row: int, **values: Any) -> dict[str, Any]:
    """One row of the table, as `normalise` describes it; empty but for `values`."""
    texts = dict.fromkeys(("sample_id", "question", "problem", "detail"), "")
    return {"row": row, "first": row, **texts, "captions": [], "columns": {}, **values}


def normalise(raw: Any, row: int) -> dict[str, Any]:
    """One raw row as flat columns.

    Args:
        raw: the row as parsed, whatever it is.
        row: its number in the file, counted from 0.

    Returns:
        ``row``; ``first``, the number of the first row of the same image, which `balcap.data.table` fills in;
        ``sample_id``, the path of the image in one spelling ("" if there is none), or several, see `image_paths`;
        ``question``, with placeholders only where images stand within it;
        ``captions``; ``problem``, the cause why the row is bad, or ""; ``detail``; and ``columns``, JSON texts that
        `balcap.data.table` fills in.
    """
    flat = flat_row(row)
    try:
        if isinstance(raw, MalformedLine):
            raise BadImage("malformed_row", raw.detail)
        if not isinstance(raw, dict):
            raise BadImage("malformed_row", f"expected an object, found {type(raw).__name__}")
        paths = _images(raw)
        flat["sample_id"] = storable(BETWEEN.join(map(one_spelling, paths)))
        question, captions = _turns(raw) or _texts(raw)
        flat["question"] = storable(_with_places(question, len(paths))).strip()
        flat["captions"] = list(filter(None, (storable(caption).strip() for caption in captions)))
        _check(flat, raw)
    except BadImage as bad:
        flat |= {"problem": bad.cause, "detail": storable(bad.detail)}
    return flat


def one_spelling(path: str) -> str:
    """``./a//b.png`` and ``a/b.png`` are one file, and so are the two ways in which Unicode writes é."""
    return unicodedata.normalize("NFC", posixpath.normpath(path.strip())) if path.strip() else ""


def image_paths(sample_id: str) -> list[str]:
    """The images of a row, in their order, from its ``sample_id``."""
    return sample_id.split(BETWEEN)


def _images(raw: Mapping[str, Any]) -> list[str]:
    key = next((key for key in IMAGE_KEYS if raw.get(key)), None)
    value = raw.get(key or "")
    values = value if isinstance(value, list) else [value]
    named = [value.get("path") if isinstance(value, dict) else value for value in values]
    paths = [path for path in named if isinstance(path, str) and path.strip()]
    if len(paths) == len(named):
        folder = raw.get("filepath") if key == "filename" else ""  # Karpathy's splits of COCO
        return [posixpath.join(folder, path) if isinstance(folder, str) else path for path in paths]
    if key is not None:
        raise BadImage("no_image_field", f'"{key}" is {raw[key]!r:.60}')
    known = ", ".join(IMAGE_KEYS[:2])
    raise BadImage("no_image_field", f"no key that names an image ({known}, …); keys are {list(raw)!r:.100}")


def _with_places(question: str, images: int) -> str:
    """The question, without placeholders where they only say that the images come first, or where there is one image."""
    count = question.count(PLACEHOLDER)
    if count not in (0, images):
        raise BadImage("placeholder_mismatch", f"{images} images, but {count} {PLACEHOLDER} in the question")
    *before, _ = question.split(PLACEHOLDER)
    within = images > 1 and any(map(str.strip, before))
    return question if within else question.replace(PLACEHOLDER, "")


def _turns(raw: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Question and caption of a conversation: of the turn that shows the image, else of the first ones."""
    key = next((key for key in TURN_KEYS if raw.get(key)), None)
    if key is None:
        return None
    turns = raw[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadImage("malformed_row", f'"{key}" is not a list of objects')
    said = [pair for turn in turns for pair in _turn(turn)]
    users = [i for i, (speaker, _) in enumerate(said) if speaker == "user"]
    asked = next((i for i in users if PLACEHOLDER in said[i][1]), users[0] if users else -1)
    answers = [text for speaker, text in said[max(0, asked) :] if speaker == "assistant"]
    return said[asked][1] if users else "", answers[:1]


def _turn(turn: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Who speaks, and the text; nothing for other roles."""
    speaker = _SPEAKERS.get(str(turn.get("from", turn.get("role"))))
    value = turn.get("value", turn.get("content"))
    if speaker is None:
        return
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        value = "".join(
            PLACEHOLDER if part.get("type") == "image" else part.get("text", "") for part in value
        )
    if not isinstance(value, str | None):
        raise BadImage("malformed_row", f"the {speaker} turn is {value!r:.60}, not text")
    yield speaker, value or ""


def _texts(raw: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Question and captions of a row without turns."""
    question = next((raw[key] for key in QUESTION_KEYS if raw.get(key)), "")
    key = next((key for key in CAPTION_KEYS if raw.get(key)), "caption")
    value = raw.get(key, [])
    captions = value if isinstance(value, list) else [value]
    captions = [caption.get("raw") if isinstance(caption, dict) else caption for caption in captions]
    if not isinstance(question, str) or not all(isinstance(caption, str) for caption in captions):
        raise BadImage("malformed_row", f'"{key}" is {value!r:.60}, not text')
    return question, captions


def _check(flat: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """BadImage where the texts cannot be used."""
    for field in ("sample_id", "question", "captions"):
        text = "\n".join(flat[field]) if field == "captions" else flat[field]
        if (at := text.find("\ufffd")) >= 0:
            around = text[max(0, at - 20) : at + 20]
            raise BadImage("not_utf8", f"{field} holds bytes that are not UTF-8: {around!r}")
        longest = LONGEST_CAPTION if field == "captions" else LONGEST_QUESTION
        if len(text) > longest:
            raise BadImage("text_too_long", f"{field} has {len(text):,} characters, more than {longest:,}")
    if not flat["captions"]:
        raise BadImage(NO_CAPTION, f"no caption in the answer of a conversation; keys are {list(raw)!r:.100}")
