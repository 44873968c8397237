"""One image and its captions while they are being judged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from balcap.judge.errors import JudgeFailure
from balcap.judge.tasks.base import Asks, Items, Task
from balcap.judge.tasks.decompose import Decompose


class Group:
    """The answers about one image's captions, each kind asked for once.

    A sampler often repeats itself: equal captions are one question, and `captions` holds each once.
    Tasks work on `captions`; `per_rollout` gives the answers back in the order of the rollouts. It lives
    on the event loop of the judge.

    Args:
        judge: answers the questions; its ``grouping`` says whether the captions share calls.
        sample_id: identity of the group.
        image_bytes: the image file.
        reference: reference caption; empty where there is none.
        captions: ``[G]`` captions of the rollouts.
        reference_units: what the reference asserts, where the data already hold it.
    """

    def __init__(
        self,
        judge: Asks,
        sample_id: str,
        image_bytes: bytes,
        reference: str,
        captions: Sequence[str],
        reference_units: Sequence[str] | None = None,
    ):
        self.judge = judge
        self.sample_id = sample_id
        self.image_bytes = image_bytes
        self.reference = reference
        self.captions = list(dict.fromkeys(captions))
        self.reasons: list[str] = []
        position = {caption: index for index, caption in enumerate(self.captions)}
        self._rollouts = [position[caption] for caption in captions]
        self._answers: dict[type[Task[Any]], asyncio.Future[Any]] = {}
        self._given_units = None if reference_units is None else list(reference_units)
        self._units: asyncio.Future[Any] | None = None

    async def get(self, task: type[Task[Any]]) -> list[Any | None]:
        """One answer per entry of `captions`, None where it is missing. Tasks may await other tasks."""
        if task not in self._answers:
            self._answers[task] = asyncio.ensure_future(task().judge_group(self))
        return await self._answers[task]

    async def units(self) -> list[str] | None:
        """Assertions of the reference; ``[]`` without a reference, None if decomposing it failed."""
        if self._units is None:
            self._units = asyncio.ensure_future(self._reference_units())
        return await self._units

    async def _reference_units(self) -> list[str] | None:
        if self._given_units is not None:
            return self._given_units
        (answers,) = await self.ask(Decompose, [[self.reference]])
        return None if answers is None else answers[0]

    async def ask(self, task: type[Task[Any]], items: Items, **context: Any) -> list[list[Any] | None]:
        """Answers to the items of each caption; None stays None, and where an answer is missing, with a
        reason noted.

        In ``group`` all captions share calls and what one was answered holds for all; in ``per_rollout``
        every caption has its own call.
        """
        asked = [one for one in items if one is not None]
        if self.judge.grouping == "group":
            flat = iter(await self.judge.ask(task, [item for one in asked for item in one], **context))
            found = [[next(flat) for _ in one] for one in asked]
        else:
            found = await asyncio.gather(
                *(self.judge.ask(task, one, together=True, **context) for one in asked)
            )
        answers = iter([self._complete(one) for one in found])
        return [None if one is None else next(answers) for one in items]

    def _complete(self, answers: list[Any]) -> list[Any] | None:
        failures = [answer for answer in answers if isinstance(answer, JudgeFailure)]
        self.reasons += map(str, failures[:1])
        return None if failures else answers

    def asked(self) -> dict[str, type[Task[Any]]]:
        """Name -> task of all that was asked so far, tasks asked on behalf of others included."""
        return {task.name: task for task in self._answers}

    async def per_rollout(self, task: type[Task[Any]]) -> list[Any | None]:
        """``[G]`` answers in the order of the rollouts."""
        answers = await self.get(task)
        return [answers[index] for index in self._rollouts]

    def known_units(self) -> list[str] | None:
        """`units` if they were asked for, else None."""
        return self._units.result() if self._units is not None and self._units.done() else None
