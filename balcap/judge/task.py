"""A kind of judgment (`Task`), an image's captions while they are judged (`Group`), and the answers (`Judgments`)."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from balcap.judge.errors import InvalidAnswer, JudgeFailure

if TYPE_CHECKING:
    from balcap.judge.judge import Judge

AnswerT = TypeVar("AnswerT")
Message = dict[str, Any]
Items = list[list[Any] | None]


class Schema(BaseModel):
    """Base of the schemas of answers: valid as an OpenAI strict schema, forgiving when it is read.

    Judges without structured output like to add a ``reason``: extra keys change nothing and are dropped.
    Fields take no default and no range keyword, which strict schemas refuse; the parsers check ranges.
    """

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": False})


class Task(ABC, Generic[AnswerT]):
    """One kind of judgment. Subclasses are stateless and take no arguments.

    A task answers *items* (captions, assertions) under one *context* (an image, the units of a reference).
    One call to the judge may carry several items; what one item was answered is remembered by itself.

    Attributes:
        name: the key in `Judgments`, in the counters and in ``model.judge.per_task``.
        version: part of the cache key; change it with every change of prompt, schema or parser.
        schema: what the judge answers; None for plain text, of which `parse` is given all.
        answer_type: type of the answer to one item, as pydantic reads it from JSON.
        per_call: most items in one call, unless ``model.judge.per_call`` says otherwise.
        one_item: a call holds one item, whatever `per_call` says.
        params: passed on with the judge's own ``params``, and stronger; ``model.judge.per_task`` replaces both.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    schema: ClassVar[type[Schema] | None]
    answer_type: ClassVar[Any]
    per_call: ClassVar[int] = 1
    one_item: ClassVar[bool] = False
    params: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def messages(self, items: Sequence[Any], **context: Any) -> list[Message]:
        """The chat to send: what all questions share first, then the image, then the fenced items."""

    @abstractmethod
    def parse(self, answer: Any, items: Sequence[Any], **context: Any) -> list[AnswerT]:
        """The answers in our own types, one per item.

        Args:
            answer: an instance of `schema`, or the text.
            items: what `messages` was given.
            context: likewise.

        Raises:
            InvalidAnswer: for a wrong length, unknown or repeated ids, numbers out of range.
        """

    def encode(self, answers: Sequence[AnswerT]) -> Any:
        """The JSON object, or the text, that `parse` reads back as `answers`: for judges that run in this process, dry
        runs and tests.

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

    async def inputs(self, group: Group) -> tuple[dict[str, Any], Items]:
        """The context, and the items of each of `group.captions`; None where something that is needed is missing.

        Here: no context, and each caption is an item.
        """
        return {}, [[caption] for caption in group.captions]

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
        assert self.schema is not None
        return _validated(self.schema.model_validate, answer)

    def dump(self, answer: AnswerT) -> str:
        """The answer to one item as JSON, for the cache."""
        return _adapter(type(self)).dump_json(answer).decode()

    def load(self, stored: str) -> AnswerT:
        """The opposite of `dump`.

        Raises:
            InvalidAnswer: if it was stored by a task that changed without a new version.
        """
        return _validated(_adapter(type(self)).validate_json, stored)

    async def judge_group(self, group: Group) -> list[Any | None]:
        """One answer per entry of `group.captions`, None where it is missing."""
        context, items = await self.inputs(group)
        answers = await group.answers(type(self), items, **context)
        return [None if one is None else self.combine(one) for one in answers]


class StandaloneTask(Task[AnswerT]):
    """One that is asked by itself, and not about the captions of a group."""

    async def inputs(self, group: Group) -> tuple[dict[str, Any], Items]:
        """Not to be had: TypeError."""
        raise TypeError(f"{self.name} is not asked about the captions of a group")


@cache
def _adapter(task: type[Task[Any]]) -> TypeAdapter[Any]:
    return TypeAdapter(task.answer_type)


def _validated(validate: Callable[[Any], Any], value: Any) -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        raise InvalidAnswer("; ".join(wrong)) from None


@dataclass(eq=False)
class Group:
    """The answers about the captions of one row, each kind asked for once.

    A sampler often repeats itself: equal captions are one question, and `captions` holds each once.
    Tasks work on `captions`; `judgments` gives the answers back in the order of the rollouts. It lives
    on the event loop of the judge.

    Args:
        judge: answers the questions; its ``grouping`` says whether the captions share calls.
        sample_id: identity of the group.
        image_bytes: the files of its images, in order; most rows have one.
        reference: reference caption; empty where there is none.
        captions: ``[G]`` captions of the rollouts.
        reference_units: what the reference asserts, where the data already hold it.
        columns: values of the row's further columns (``data.columns``).

    Attributes:
        tasks: that `judgments` were asked for; tasks may ask others.
    """

    judge: Judge
    sample_id: str
    image_bytes: tuple[bytes, ...]
    reference: str
    captions: Sequence[str]
    reference_units: Sequence[str] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reasons: list[str] = []
        self.tasks: Collection[type[Task[Any]]] = ()
        self._rollouts, self.captions = self.captions, list(dict.fromkeys(self.captions))
        self._answers: dict[type[Task[Any]], asyncio.Future[Any]] = {}
        self._units: asyncio.Future[Any] | None = None

    async def get(self, task: type[Task[Any]]) -> list[Any | None]:
        """One answer per entry of `captions`, None where it is missing. Tasks may await other tasks."""
        if task not in self._answers:
            self._answers[task] = asyncio.ensure_future(task().judge_group(self))
        return await self._answers[task]

    async def units(self, decompose: type[Task[list[str]]]) -> list[str] | None:
        """Assertions of the reference, by `decompose`; ``[]`` without a reference, None if that failed."""
        if self._units is None:
            self._units = asyncio.ensure_future(self._ask_units(decompose))
        return await self._units

    async def _ask_units(self, decompose: type[Task[list[str]]]) -> list[str] | None:
        if self.reference_units is not None:
            return list(self.reference_units)
        (answers,) = await self.answers(decompose, [[self.reference]])
        return None if answers is None else answers[0]

    async def answers(self, task: type[Task[Any]], items: Items, **context: Any) -> list[list[Any] | None]:
        """Answers to the items of each caption; None stays None, and where an answer is missing, with a
        reason noted.

        In ``group`` all captions share calls and what one was answered holds for all; in ``per_rollout``
        every caption has its own call.
        """
        present, together = [one for one in items if one is not None], self.judge.grouping == "per_rollout"
        asked = present if together else [list(chain(*present))]
        answered = await asyncio.gather(*(self.judge.ask(task, some, together, **context) for some in asked))
        rest = chain(*answered)
        return [None if one is None else self._complete([next(rest) for _ in one]) for one in items]

    def _complete(self, answers: list[Any]) -> list[Any] | None:
        failures = [answer for answer in answers if isinstance(answer, JudgeFailure)]
        self.reasons += map(str, failures[:1])
        return None if failures else answers

    async def judgments(self, tasks: Iterable[type[Task[Any]]]) -> Judgments:
        """The answers to these tasks, and to those that they asked on their part, as a batch of B = 1."""
        self.tasks = tuple(tasks)
        await asyncio.gather(*map(self.get, self.tasks))
        answers = {}
        for task, future in self._answers.items():
            by_caption = dict(zip(self.captions, await future, strict=True))
            answers[task.name] = [[by_caption[caption] for caption in self._rollouts]]
        missing = Counter({name: sum(one is None for one in found) for name, (found,) in answers.items()})
        units = None if self._units is None else await self._units
        return Judgments(answers, [units], +missing, self.reasons)


@dataclass(frozen=True)
class Judgments:
    """Answers per kind of judgment; B and G as in `balcap.types`.

    Attributes:
        answers: task name -> ``[B][G]`` answers, None where the judge failed. For the four tasks:
            ``decompose``: list[str]; ``verify``: list[Verdict], one per assertion of the same caption;
            ``match``: list[bool], one per unit of the same reference; ``rate``: Rating. Where it was asked,
            ``decompose_spans``: list[Assertion], those of ``decompose`` with their words.
        units: ``[B]`` units of the references, None where decomposing the reference failed or was not needed.
        failures: task name -> number of answers that are missing.
        reasons: a few distinct reasons of failure, worded for a person.
    """

    answers: Mapping[str, Sequence[Sequence[Any | None]]]
    units: Sequence[Sequence[str] | None]
    failures: Counter[str] = field(default_factory=Counter)
    reasons: Sequence[str] = ()

    def __getitem__(self, task: str) -> Sequence[Sequence[Any | None]]:
        return self.answers[task]

    def __contains__(self, task: str) -> bool:
        return task in self.answers
