"""A kind of judgment: schema -> prompt -> parser, in one file, with a version.

To add one, write a file beside `decompose.py` with a subclass of `Task` and name it in the `needs` of a
reward. There is nothing to register.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from balcap.judge.errors import InvalidAnswer, JudgeFailure

if TYPE_CHECKING:
    from balcap.judge.group import Group

AnswerT = TypeVar("AnswerT")
Message = dict[str, Any]
Items = list[list[Any] | None]


class Schema(BaseModel):
    """Base of the schemas of answers: valid as an OpenAI strict schema, forgiving when it is read.

    Judges without structured output like to add a ``reason``: extra keys change nothing and are dropped.
    Fields take no default and no range keyword, which strict schemas refuse; the parsers check ranges.
    """

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": False})


class Asks(Protocol):
    """What a group needs of a judge: one answer, or the failure, per item."""

    @property
    def grouping(self) -> str: ...

    async def ask(
        self, task: type[Task[AnswerT]], items: Sequence[Any], together: bool = False, **context: Any
    ) -> list[AnswerT | JudgeFailure]: ...


class Task(ABC, Generic[AnswerT]):
    """One kind of judgment. Subclasses are stateless and take no arguments.

    A task answers *items* (captions, assertions) under one *context* (an image, the units of a reference).
    One call to the judge may carry several items; what one item was answered is remembered by itself.

    Attributes:
        name: the key in `Judgments`, in the counters and in ``model.judge.per_task``.
        version: part of the cache key; change it with every change of prompt, schema or parser.
        schema: what the judge answers.
        answer_type: type of the answer to one item, as pydantic reads it from JSON.
        per_call: most items in one call, unless ``model.judge.per_call`` says otherwise.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    schema: ClassVar[type[Schema]]
    answer_type: ClassVar[Any]
    per_call: ClassVar[int] = 1

    @abstractmethod
    def messages(self, items: Sequence[Any], **context: Any) -> list[Message]:
        """The chat to send: what all questions share first, then the image, then the fenced items."""

    @abstractmethod
    def parse(self, answer: Any, items: Sequence[Any], **context: Any) -> list[AnswerT]:
        """The answers in our own types, one per item.

        Args:
            answer: an instance of `schema`.
            items: what `messages` was given.
            context: likewise.

        Raises:
            InvalidAnswer: for a wrong length, unknown or repeated ids, numbers out of range.
        """

    def encode(self, answers: Sequence[AnswerT]) -> dict[str, Any]:
        """The JSON object that `parse` reads back as `answers`: for judges that run in this process, dry runs and
        tests.

        Raises:
            NotImplementedError: if the task does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encode()")

    def example(self, items: Sequence[Any], **context: Any) -> list[AnswerT]:
        """Plausible answers about `items`, of the size that a judge's would have; the same for the same items.

        Raises:
            NotImplementedError: if the task does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} has no example()")

    @abstractmethod
    async def inputs(self, group: Group) -> tuple[dict[str, Any], Items]:
        """The context, and the items of each of `group.captions`; None where something that is needed is
        missing."""

    def known(self, item: Any, **context: Any) -> AnswerT | None:
        """The answer to an item that no judge is needed for, such as an empty caption."""
        return None

    def identity(self, item: Any) -> Any:
        """What makes two items the same question; JSON-able."""
        return item

    def combine(self, answers: list[AnswerT]) -> Any:
        """The answer about a caption from the answers to its items."""
        return answers[0]

    def read(self, answer: dict[str, Any]) -> Schema:
        """The JSON object as an instance of `schema`.

        Raises:
            InvalidAnswer: naming the fields that do not fit.
        """
        try:
            return self.schema.model_validate(answer)
        except ValidationError as error:
            raise InvalidAnswer(_wrong(error)) from None

    def dump(self, answer: AnswerT) -> str:
        """The answer to one item as JSON, for the cache."""
        return _adapter(type(self)).dump_json(answer).decode()

    def load(self, stored: str) -> AnswerT:
        """The opposite of `dump`.

        Raises:
            InvalidAnswer: if it was stored by a task that changed without a new version.
        """
        try:
            return _adapter(type(self)).validate_json(stored)
        except ValidationError as error:
            raise InvalidAnswer(_wrong(error)) from None

    async def judge_group(self, group: Group) -> list[Any | None]:
        """One answer per entry of `group.captions`, None where it is missing."""
        context, items = await self.inputs(group)
        return [
            None if answers is None else self.combine(answers)
            for answers in await group.ask(type(self), items, **context)
        ]


@cache
def _adapter(task: type[Task[Any]]) -> TypeAdapter[Any]:
    return TypeAdapter(task.answer_type)


def _wrong(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])


def chat(task: str, instructions: str, text: str, image: bytes | None = None) -> list[Message]:
    """System message whose first line is ``Task: <task>``; user message of the image, if any, then `text`.

    The image stands as ``{"type": "image", "image": <bytes>}``: how it is sent (size, encoding, detail) is
    for whoever sends it.
    """
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    parts.append({"type": "text", "text": text})
    return [
        {"role": "system", "content": f"Task: {task}\n\n{instructions.strip()}"},
        {"role": "user", "content": parts},
    ]


def numbered(texts: Sequence[str]) -> list[dict[str, Any]]:
    """``[{"id": 1, "text": …}, …]``: ids count from 1."""
    return with_ids({"text": text} for text in texts)


def with_ids(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of an answer, each with its ``id``, which counts from 1: what `in_order` reads back."""
    return [{"id": number, **entry} for number, entry in enumerate(entries, 1)]


def in_order(items: Iterable[Any], count: int, what: str) -> list[Any]:
    """`items` sorted by their ``id``, which must be 1 … `count`, each once.

    Raises:
        InvalidAnswer: naming unknown, repeated and missing ids.
    """
    by_id: dict[int, Any] = {}
    for item in items:
        if not 1 <= item.id <= count:
            raise InvalidAnswer(f"{what} for the unknown id {item.id}, ids are 1 to {count}")
        if item.id in by_id:
            raise InvalidAnswer(f"two {what} for id {item.id}")
        by_id[item.id] = item
    if len(by_id) < count:
        raise InvalidAnswer(f"{len(by_id)} {what}, {count} were asked for")
    return [by_id[number] for number in range(1, count + 1)]
