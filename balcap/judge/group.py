"""One image and its captions while they are being judged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from balcap.judge.errors import JudgeFailure
from balcap.judge.tasks.base import AnswerT, Asks, Task
from balcap.judge.tasks.decompose import Decompose


class Group:
    """The answers about one image's captions, each kind asked for once.

    A sampler often repeats itself: equal captions are one question, and `captions` holds each once.
    Tasks work on `captions`; `per_rollout` gives the answers back in the order of the rollouts. It lives
    on the event loop of the judge.

    Args:
        judge: answers the questions.
        sample_id: identity of the group.
        image_bytes: the image file.
        reference: reference caption; empty where there is none.
        captions: ``[G]`` captions of the rollouts.
    """

    def __init__(
        self, judge: Asks, sample_id: str, image_bytes: bytes, reference: str, captions: Sequence[str]
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
        self._units: asyncio.Future[Any] | None = None

    async def get(self, task: type[Task[AnswerT]]) -> list[AnswerT | None]:
        """One answer per entry of `captions`, None where it is missing. Tasks may await other tasks."""
        if task not in self._answers:
            self._answers[task] = asyncio.ensure_future(task().judge_group(self.judge, self))
        return await self._answers[task]

    async def units(self) -> list[str] | None:
        """Assertions of the reference; ``[]`` without a reference, None if decomposing it failed."""
        if self._units is None:
            self._units = asyncio.ensure_future(self.ask(Decompose, caption=self.reference))
        return await self._units

    async def ask(self, task: type[Task[AnswerT]], **inputs: Any) -> AnswerT | None:
        """One answer; None, and a reason noted, where the judge fails."""
        try:
            return await self.judge.ask(task, **inputs)
        except JudgeFailure as failure:
            self.reasons.append(str(failure))
            return None

    async def ask_each(
        self, task: Task[AnswerT], inputs: Sequence[dict[str, Any] | None]
    ) -> list[AnswerT | None]:
        """`ask` for every entry of `inputs` at once; None stays None and asks nothing."""

        async def one(given: dict[str, Any] | None) -> AnswerT | None:
            if given is None:
                return None
            kind: type[Task[AnswerT]] = type(task)
            return await self.ask(kind, **given)

        return list(await asyncio.gather(*(one(given) for given in inputs)))

    def asked(self) -> dict[str, type[Task[Any]]]:
        """Name -> task of all that was asked so far, tasks asked on behalf of others included."""
        return {task.name: task for task in self._answers}

    async def per_rollout(self, task: type[Task[AnswerT]]) -> list[AnswerT | None]:
        """``[G]`` answers in the order of the rollouts."""
        answers = await self.get(task)
        return [answers[index] for index in self._rollouts]

    def known_units(self) -> list[str] | None:
        """`units` if they were asked for, else None."""
        return self._units.result() if self._units is not None and self._units.done() else None
