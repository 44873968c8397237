"""How a question is asked and its answer is read: fences, numbered items, JSON in prose, keys in the cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from balcap.judge.errors import InvalidAnswer
from balcap.judge.images import ImagePolicy, Images, images_in
from balcap.judge.task import Message, Schema, Task

# Where a model is reached, not what it answers: no part of a key, so that a server may move.
CONNECTION = {"api_base", "base_url", "api_key", "api_version", "organization", "extra_headers", "timeout"}


@dataclass(frozen=True)
class Route:
    """One judge: a model with its parameters.

    Attributes:
        model: litellm model string.
        params: what is passed to litellm beside the messages.
    """

    model: str
    params: Mapping[str, Any] = field(hash=False)

    @cached_property
    def name(self) -> str:
        """Distinct for distinct models and parameters."""
        return f"{self.model} {_digest(dict(self.params))[:12]}"

    @cached_property
    def content(self) -> dict[str, Any]:
        """The parameters that an answer depends on."""
        return {name: value for name, value in self.params.items() if name not in CONNECTION}


@dataclass(frozen=True)
class Question:
    """A task in its context, and the items that it is asked about.

    Attributes:
        task: the kind of judgment.
        context: what its `messages` takes beside the items; images are `bytes`, or a tuple of them.
        routes: who is asked, the others where the first fails.
        images: how images are sent.
        items: what is asked about.
        together: an answer holds only for an item among just these.
    """

    task: Task[Any]
    context: Mapping[str, Any]
    routes: Sequence[Route]
    images: ImagePolicy
    items: Sequence[Any]
    together: bool = False

    def keys(self, item: Any) -> list[str]:
        """Keys under which the answer to an item may be stored, one per route.

        SHA-256 over model, parameters, task, its version (which stands for prompt and schema), context
        (images by the SHA-256 of their files) and what identifies the item.
        """
        about = [self.task.identity(one) for one in (item, *(self.items if self.together else ()))]
        return [_digest([route.model, route.content, *self._fixed, about]) for route in self.routes]

    @cached_property
    def _fixed(self) -> list[Any]:
        digests = {name: [*map(_image_digest, images_in(value))] for name, value in self.context.items()}
        # one image in a tuple is that image
        shown = {name: of[0] if len(of) == 1 else of for name, of in digests.items() if of}
        context = {**self.context, **shown}
        return [self.task.name, self.task.version, context, repr(self.images) if shown else ""]

    @property
    def shown(self) -> list[bytes]:
        """The image files that the judge sees, in order."""
        return [image for value in self.context.values() for image in images_in(value)]

    def messages(self) -> list[Message]:
        """The chat as `Task.messages` writes it."""
        return self.task.messages(self.items, **self.context)

    def parse(self, text: str) -> list[Any]:
        """The answers in what the judge has written, one per item; raises `InvalidAnswer`."""
        answer = text if self.task.schema is None else self.task.read(extract_json(text))
        return self.task.parse(answer, self.items, **self.context)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@lru_cache(maxsize=64)  # a group asks about the same image again and again; Python keeps the hash of bytes
def _image_digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


@lru_cache(maxsize=64)
def response_format(task: str, schema: type[Schema]) -> dict[str, Any]:
    """The OpenAI strict structured-output setting for `schema`."""
    form = {"name": task, "strict": True, "schema": schema.model_json_schema()}
    return {"type": "json_schema", "json_schema": form}


# ---- what a task file writes its prompt with

# Angle brackets close fences, and with square brackets and bars they write the special tokens of chat
# templates: <|im_start|>, <start_of_turn>, <<SYS>>, [INST], <｜User｜>, ]~b]. Their full-width and small forms
# become them under Unicode normalisation. Control and format characters, line separators, lone surrogates
# and everything that shows as nothing can hide or reorder text, carry a message that no reader sees, or break
# the request's encoding. All are legal in JSON as \u escapes, so nothing is lost.
_UNSAFE = re.compile(
    "[][<>|\ufe47\ufe48\ufe64\ufe65\uff1c\uff1e\uff3b\uff3d\uff5c"  # brackets and bars
    "\x00-\x1f\x7f-\x9f"  # control
    "\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"  # format
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff"  # shown as nothing
    "\u2028\u2029"  # line separators
    "\ud800-\udfff]"  # half a character
)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')  # within JSON, whose own brackets must stay


def fence(tag: str, value: Any) -> str:
    """``<tag>``, `value` as one line of JSON, ``</tag>``.

    No string in the JSON holds an angle or square bracket, a bar, a control or an invisible character, so it
    can neither end its fence nor spell a special token of a chat template; ``json.loads`` of the middle line
    gives `value` back. (Two surrogates that stand side by side are one character in JSON, and come back so.)

    Args:
        tag: name of the fence: letters and underscores.
        value: anything that JSON can hold.

    Raises:
        ValueError: for NaN and infinity, which JSON does not know.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"<{tag}>\n{_STRING.sub(lambda string: _UNSAFE.sub(_escape, string.group()), text)}\n</{tag}>"


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1] if not match.group().isascii() else f"\\u{ord(match.group()):04x}"


_TOGETHER = (
    "All {} images belong together: what is said and asked of the image is said and asked of all of them."
)


def chat(task: str, instructions: str, text: str, image: Images = ()) -> list[Message]:
    """System message whose first line is ``Task: <task>``; user message of the image, if any, then `text`.

    The image stands as ``{"type": "image", "image": <bytes>}``: how it is sent (size, encoding, detail) is
    for whoever sends it. Several are numbered, and said to belong together.
    """
    shown: list[dict[str, Any]] = [{"type": "image", "image": one} for one in images_in(image)]
    texts = [text]
    if len(shown) > 1:
        numbers = [_text(f"Image {number}:") for number in range(1, len(shown) + 1)]
        shown = [part for pair in zip(numbers, shown, strict=True) for part in pair]
        texts = [_TOGETHER.format(len(numbers)), text]
    parts = [*shown, *map(_text, texts)]
    return [
        {"role": "system", "content": f"Task: {task}\n\n{instructions.strip()}"},
        {"role": "user", "content": parts},
    ]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def numbered(texts: Sequence[str]) -> list[dict[str, Any]]:
    """``[{"id": 1, "text": …}, …]``: ids count from 1."""
    return with_ids({"text": text} for text in texts)


def with_ids(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of an answer, each with its ``id``, which counts from 1: what `in_order` reads back."""
    return [{"id": number, **entry} for number, entry in enumerate(entries, 1)]


def in_order(items: Sequence[Any], count: int, what: str) -> list[Any]:
    """`items` sorted by their ``id``, which must be 1 … `count`, each once.

    Raises:
        InvalidAnswer: with the ids that they have.
    """
    ids = [item.id for item in items]
    if sorted(ids) != list(range(1, count + 1)):
        raise InvalidAnswer(f"ids 1 to {count} were asked for, each once; the {what} have the ids {ids}")
    return sorted(items, key=lambda item: item.id)


# ---- what came back

_LONGEST = 400_000  # characters; more is a model that does not stop


_THOUGHTS = re.compile(r"</think(?:ing)?>|</thought>|assistantfinal")
_LAX = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_COMMAS = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)


def extract_json(text: str) -> dict[str, Any]:
    """The JSON object in `text`, alone, within prose or code fences, or after its thoughts; comments and commas before
    a closing bracket are no harm.

    Raises:
        InvalidAnswer: if there is no complete object, or more than one.
    """
    if not text.lstrip().startswith("{"):  # else the words may be a caption's
        text = _THOUGHTS.split(text, maxsplit=1)[-1]
    if len(text) > _LONGEST:
        raise InvalidAnswer(f"the answer is {len(text)} characters long")
    objects: list[dict[str, Any]] = []
    position = text.find("{")
    while position >= 0:
        try:
            value, text = _decode(text[position:], lax=not objects)
        except json.JSONDecodeError:
            text = text[position + 1 :]  # prose; or a broken object, whose inner objects then fail the schema
        except (ValueError, RecursionError):
            raise InvalidAnswer("the JSON of the answer is too large or nested too deeply") from None
        else:
            if value not in objects:
                objects.append(value)
        position = text.find("{")
    if not objects:
        raise InvalidAnswer("the answer holds no complete JSON object")
    if len(objects) > 1:
        raise InvalidAnswer(f"the answer holds {len(objects)} JSON objects, one was asked for")
    return objects[0]


def _decode(text: str, lax: bool) -> tuple[Any, str]:
    """The object that the text begins with, and what follows it."""
    decoder = json.JSONDecoder()
    try:
        value, end = decoder.raw_decode(text)
    except json.JSONDecodeError:
        if not lax:
            raise
        for pattern in (_LAX, _COMMAS):
            text = pattern.sub(lambda match: match[1] or "", text)
        value, end = decoder.raw_decode(text)
    return value, text[end:]
