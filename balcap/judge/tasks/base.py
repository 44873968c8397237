"""A kind of judgment: schema -> prompt -> parser, in one file, with a version.

To add one, write a file beside `decompose.py` with a subclass of `Task` and name it in the `needs` of a
reward. There is nothing to register.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from balcap.judge.errors import InvalidAnswer

if TYPE_CHECKING:
    from balcap.judge.group import Group

AnswerT = TypeVar("AnswerT")
Message = dict[str, Any]


class Schema(BaseModel):
    """Base of the schemas of answers: valid as an OpenAI strict schema, forgiving when it is read.

    Judges without structured output like to add a ``reason``: extra keys change nothing and are dropped.
    Fields take no default and no range keyword, which strict schemas refuse; the parsers check ranges.
    """

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": False})


class Asks(Protocol):
    """What a task needs of a judge: one question, one answer, or `JudgeFailure`."""

    async def ask(self, task: type[Task[AnswerT]], **inputs: Any) -> AnswerT: ...


class Task(ABC, Generic[AnswerT]):
    """One kind of judgment. Subclasses are stateless and take no arguments.

    Attributes:
        name: the key in `Judgments`, in the counters and in ``model.judge.per_task``.
        version: part of the cache key; change it with every change of prompt, schema or parser.
        schema: what the judge answers.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    schema: ClassVar[type[Schema]]

    # The bare *args only lets subclasses name their inputs: mypy then accepts any signature.

    @abstractmethod
    def messages(self, *args: Any, **inputs: Any) -> list[Message]:
        """The chat to send: what all questions share first, then the image, then the fenced text."""

    @abstractmethod
    def parse(self, answer: Any, *args: Any, **inputs: Any) -> AnswerT:
        """The answer in our own types.

        Args:
            answer: an instance of `schema`.
            inputs: what `messages` was given.

        Raises:
            InvalidAnswer: for a wrong length, unknown or repeated ids, numbers out of range.
        """

    def read(self, answer: dict[str, Any]) -> Schema:
        """The JSON object as an instance of `schema`.

        Raises:
            InvalidAnswer: naming the fields that do not fit.
        """
        try:
            return self.schema.model_validate(answer)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3]]
            raise InvalidAnswer("; ".join(wrong)) from None

    @abstractmethod
    async def inputs(self, group: Group) -> Sequence[dict[str, Any] | None]:
        """What to ask for each of `group.captions`; None where something that it needs is missing."""

    def known(self, *args: Any, **inputs: Any) -> AnswerT | None:
        """The answer to a question that no judge is needed for, such as about an empty caption."""
        return None

    async def judge_group(self, judge: Asks, group: Group) -> list[AnswerT | None]:
        """One answer per entry of `group.captions`, None where it is missing.

        Override it to judge all captions of an image in one call.
        """
        return await group.ask_each(self, await self.inputs(group))


def chat(task: str, instructions: str, text: str, image_url: str | None = None) -> list[Message]:
    """System message whose first line is ``Task: <task>``; user message of the image, if any, then `text`."""
    parts: list[dict[str, Any]] = []
    if image_url is not None:
        parts.append({"type": "image_url", "image_url": {"url": image_url}})
    parts.append({"type": "text", "text": text})
    return [
        {"role": "system", "content": f"Task: {task}\n\n{instructions.strip()}"},
        {"role": "user", "content": parts},
    ]


def numbered(texts: Sequence[str]) -> list[dict[str, Any]]:
    """``[{"id": 1, "text": …}, …]``: ids count from 1."""
    return [{"id": number, "text": text} for number, text in enumerate(texts, 1)]


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
