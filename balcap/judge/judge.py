"""`Judge`: what the rest of the project asks, and what a YAML sets."""

from __future__ import annotations

import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from balcap.judge.asking import Limits
from balcap.judge.client import Client, Deployment, Price
from balcap.judge.errors import JudgeFailure
from balcap.judge.images import ImagePolicy
from balcap.judge.request import Question, Route
from balcap.judge.session import Session
from balcap.judge.stats import JudgeStats
from balcap.judge.tasks import Decompose, Match, Rate, Rating, Task, Verdict, Verify
from balcap.judge.tasks.base import AnswerT
from balcap.utils.errors import RunStopped

T = TypeVar("T")

_OPENING = threading.Lock()
_LEFT_BEHIND: list[Session] = []  # of the parent process: closing them after a fork would disturb the parent


@dataclass(frozen=True)
class TaskModel:
    """Another model, or other parameters: for one kind of judgment, or as a fallback.

    Args:
        model: litellm model string; null keeps ``model.judge.model``.
        params: replaces ``model.judge.params``; null keeps them.
    """

    model: str | None = None
    params: dict[str, Any] | None = None


class Judge:
    """Answers the questions that rewards are made of, by any model that litellm reaches.

    A judgment that fails, after its retries and fallbacks, is a `JudgeFailure` here and becomes a missing
    reward (NaN) in the reward suite, never 0. The object is plain data until the first question: it can be
    pickled and copied, and every process opens its own connections. litellm does not work in a process that was
    forked from one that has used it.

    Args:
        model: litellm model string, ``<provider>/<model>``, such as ``openai/gpt-4o-mini``.
        deployments: where `model` is served, with their limits; null: it is reached by its own name.
        fallbacks: other judges, asked in this order when `model` (or a task's own model) fails; null for
            none. Their answers are kept under their own names.
        providers: litellm provider name -> import path of a `litellm.CustomLLM` subclass, for judges that
            run in this process; null for none.
        per_task: task name (``decompose``, ``verify``, ``match``, ``rate``) -> another model or other
            parameters for it.
        params: passed on with every call, such as ``temperature``, ``reasoning_effort``, ``max_tokens`` or
            ``api_base``. What a model does not know is dropped. Keys come from the environment, never from
            here.
        grouping: ``group`` judges the captions of an image together: their assertions, without repetitions,
            are verified in one call with one image, and every verdict is remembered. ``per_rollout`` makes
            a call of its own for each caption and kind, several times as dear: the baseline.
        per_call: task name -> most items in one call (captions; assertions for ``verify``), each at least
            1; null for each task's own (4, 128, 8 and, for ``rate``, 1).
        images: how images are sent.
        prices: litellm model string -> US dollars per million tokens, for models that litellm has no price
            for, or another one; null for none.
        concurrency: calls under way at once, at least 1.
        timeout_s: seconds until a call counts as failed, above 0.
        deadline_s: seconds until a judgment counts as failed, all its calls included, at least `timeout_s`;
            null for three times that.
        retries: repetitions of a call that failed in a way that may pass, at least 0.
        max_failed_share: the run ends, with a checkpoint, when more than this share of the recent judgments
            of a kind failed, in (0, 1], or when none comes any more; 1 never ends it.
        budget_usd: the run ends, with a checkpoint, when so many dollars are spent, above 0; calls that are
            under way then are still paid. Counts the whole `ledger`; null for no limit.
        cache: SQLite file that keeps the answers, shared by the processes of one machine; null for none.
        ledger: SQLite file with a row for every call; null for none. ``fit`` keeps it in the run's folder.
    """

    def __init__(
        self,
        model: str,
        deployments: list[Deployment] | None = None,
        fallbacks: list[TaskModel] | None = None,
        providers: dict[str, str] | None = None,
        per_task: dict[str, TaskModel] | None = None,
        params: dict[str, Any] | None = None,
        grouping: Literal["group", "per_rollout"] = "group",
        per_call: dict[str, int] | None = None,
        images: ImagePolicy = ImagePolicy(),  # noqa: B008  frozen
        prices: dict[str, Price] | None = None,
        concurrency: int = 64,
        timeout_s: float = 60.0,
        deadline_s: float | None = None,
        retries: int = 3,
        max_failed_share: float = 0.5,
        budget_usd: float | None = None,
        cache: str | None = "runs/judge_cache.sqlite",
        ledger: str | None = None,
    ):
        self.model = model
        self.deployments = list(deployments or [])
        self.fallbacks = list(fallbacks or [])
        self.providers = dict(providers or {})
        self.per_task = dict(per_task or {})
        self.params = dict(params or {})
        self.grouping = grouping
        self.per_call = dict(per_call or {})
        self.images = images
        self.prices = dict(prices or {})
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.deadline_s = 3 * timeout_s if deadline_s is None else deadline_s
        self.retries = retries
        self.max_failed_share = max_failed_share
        self.budget_usd = budget_usd
        self.cache = cache
        self.ledger = ledger
        self._session: Session | None = None
        self._closed = JudgeStats()
        self._closed_spent = 0.0

    # ---- the questions

    async def ask(
        self, task: type[Task[AnswerT]], items: Sequence[Any], together: bool = False, **context: Any
    ) -> list[AnswerT | JudgeFailure]:
        """An answer of any kind about each item, or the reason why there is none.

        Args:
            task: the kind of judgment.
            items: what to judge, such as captions.
            together: one call for all of them, remembered as a whole; else each is remembered by itself and
                calls hold as many as ``per_call`` allows.
            context: what the task's `messages` takes beside the items, such as the image.

        Raises:
            CacheError, LedgerError: if these files cannot be used.
        """
        if not items:
            return []
        pieces = [tuple(items)] if together else [(item,) for item in items]
        question = Question(task(), context, self.routes(task.name), self.images)
        per_call = len(items) if together else self.per_call.get(task.name, task.per_call)
        session = self._open()
        found = await session.loop.here(session.ask(question, pieces, per_call))
        return [
            answer
            for piece, answers in zip(pieces, found, strict=True)
            for answer in ([answers] * len(piece) if isinstance(answers, JudgeFailure) else answers)
        ]

    async def decompose(self, captions: Sequence[str]) -> list[list[str] | None]:
        """Atomic assertions of each caption, None where the judge failed."""
        answers = await self.ask(Decompose, captions)
        return [None if isinstance(answer, JudgeFailure) else answer for answer in answers]

    async def verify(self, image: bytes, assertions: Sequence[str]) -> list[Verdict]:
        """Is each assertion true of the image, and can one point at it?

        Raises:
            JudgeFailure: if the judge fails or the image cannot be read.
        """
        return _all(await self.ask(Verify, assertions, image=image))

    async def match(self, units: Sequence[str], assertions: Sequence[str]) -> list[bool]:
        """Is each unit of a reference covered by the assertions?

        Raises:
            JudgeFailure: if the judge fails.
        """
        return _all(await self.ask(Match, [tuple(assertions)], units=tuple(units)))[0]

    async def rate(self, caption: str) -> Rating:
        """Clarity, fluency and coherency of a caption, each in [0, 1].

        Raises:
            JudgeFailure: if the judge fails.
        """
        return _all(await self.ask(Rate, [caption]))[0]

    def routes(self, task: str) -> list[Route]:
        """Who is asked for a kind of judgment: its judge, then the fallbacks."""
        own = self.per_task.get(task, TaskModel())
        asked = [own, *self.fallbacks]
        return [
            Route(one.model or self.model, self.params if one.params is None else one.params) for one in asked
        ]

    # ---- synchronous callers

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the judge's event loop and wait for it."""
        return self._session_for(coroutine).loop.run(coroutine)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` on the judge's event loop and return at once."""
        return self._session_for(coroutine).submit(coroutine)

    def stats(self) -> JudgeStats:
        """Calls, tokens, cost and failures so far, in this process."""
        return self._closed if self._session is None else self._closed + self._session.counters.snapshot()

    def spent(self) -> float:
        """US dollars spent by all processes that share the ledger, now and in earlier runs."""
        return self._closed_spent if self._session is None else self._session.ledger.spent()

    @property
    def stopped(self) -> RunStopped | None:
        """Why no more questions are asked, None while they are."""
        return None if self._session is None else self._session.asker.stopped

    def close(self) -> None:
        """Close connections, thread and files; safe to call twice. A later question opens them again."""
        session, self._session = self._session, None
        if session is not None and session.pid == os.getpid():
            session.close()
            self._closed = self._closed + session.counters.snapshot()
            self._closed_spent = session.ledger.spent()

    def problems(self, key: str = "model.judge") -> list[str]:
        """What is wrong with the settings, each message with the key that mends it. Calls no provider.

        Args:
            key: where the judge stands in the config.
        """
        from balcap.judge.settings import problems

        return problems(self, key)

    # ---- one session per process

    def _open(self) -> Session:
        session = self._session
        if session is not None and session.pid == os.getpid():
            return session
        with _OPENING:
            if self._session is not None and self._session.pid != os.getpid():
                _LEFT_BEHIND.append(self._session)
                self._session, self._closed = None, JudgeStats()
            if self._session is None:
                limits = Limits(
                    self.concurrency, self.timeout_s, self.deadline_s, self.retries, self.budget_usd
                )
                self._session = Session(
                    self.cache, self.ledger, self.make_client, limits, self.max_failed_share
                )
            return self._session

    def make_client(self) -> Client:
        """What makes the calls. A subclass may return a stand-in that asks nobody.

        A stand-in has ``async call(question, route, messages, timeout_s) -> Reply`` (or raises `CallFailed`),
        ``connect()`` and ``async close()``, as `Client` has them.
        """
        return Client(self.deployments, self.model, self.providers, self.prices)

    def _session_for(self, coroutine: Coroutine[Any, Any, Any]) -> Session:
        try:
            return self._open()
        except BaseException:
            coroutine.close()  # it will never be awaited, which Python would remark on
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_closed": JudgeStats(), "_closed_spent": 0.0}


def _all(answers: Sequence[Any]) -> list[Any]:
    """The answers; raises the first failure among them."""
    for answer in answers:
        if isinstance(answer, JudgeFailure):
            raise answer
    return list(answers)
