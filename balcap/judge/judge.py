"""`Judge`: what the rest of the project asks, and what a YAML sets."""

from __future__ import annotations

import copy
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from balcap.judge.cache import JudgmentCache
from balcap.judge.client import Client
from balcap.judge.errors import JudgeFailure
from balcap.judge.ledger import JudgeStats, Ledger
from balcap.judge.prompt import Question
from balcap.judge.redis_cache import RedisCache, open_cache
from balcap.judge.session import Session
from balcap.judge.settings import JudgeSettings
from balcap.judge.task import AnswerT, Task
from balcap.utils.errors import RunStopped

T = TypeVar("T")

_OPENING = threading.Lock()


class Judge:
    """Answers the questions that rewards are made of, by any model that litellm reaches.

    A judgment that fails, after its retries and fallbacks, is a `JudgeFailure` here and becomes a missing
    reward (NaN) in the reward suite, never 0. The object is plain data until the first question: it can be
    pickled and copied, and every process opens its own connections. litellm does not work in a process that was
    forked from one that has used it.

    Args:
        model: litellm model string, ``<provider>/<model>``, such as ``openai/gpt-4o-mini``.
        settings: as in `JudgeSettings`.
    """

    _session: Session | None = None
    _closed_spent = 0.0
    _ranks = 1
    _machines: int | None = None
    _elsewhere = 0.0

    def __init__(self, model: str, **settings: Any):
        self.settings = JudgeSettings(model, **settings)
        self._stats = JudgeStats()

    def share(self, ranks: int, machines: int) -> None:
        """Be the judge of one of so many ranks on so many machines, who keep the limits of the settings together; before
        the first question."""
        self._ranks, self._machines = ranks, machines

    @property
    def limits(self) -> JudgeSettings:
        """The settings with this rank's part of what they allow all ranks."""
        return self.settings.share(self._ranks)

    @property
    def grouping(self) -> str:
        """Whether the captions of an image share calls."""
        return self.settings.grouping

    async def ask(
        self, task: type[Task[AnswerT]], items: Sequence[Any], together: bool = False, **context: Any
    ) -> list[AnswerT | JudgeFailure]:
        """An answer about each item, or the reason why there is none.

        Args:
            task: the kind of judgment.
            items: what to judge, such as captions.
            together: one call for all of them, whose answers hold for this list alone; else each is remembered
                by itself and calls hold as many as ``per_call`` allows.
            context: what the task's `messages` takes beside the items, such as the image.

        Raises:
            StoreError: if cache or ledger cannot be used.
        """
        if not items:
            return []
        settings, together = self.settings, together and len(items) > 1
        question = Question(
            task(), context, settings.routes(task.name, task.params), settings.images, items, together
        )
        per_call = len(items) if together else (settings.per_call or {}).get(task.name, task.per_call)
        per_call = 1 if task.one_item else per_call
        session = self._open()
        return await session.loop.here(session.gather(question, per_call))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the judge's event loop and wait for it."""
        return self._open().loop.run(coroutine)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` on the judge's event loop and return at once."""
        return self._open().submit(coroutine)

    def stats(self) -> JudgeStats:
        """Calls, tokens, cost and failures so far, in this process."""
        return copy.deepcopy(self._stats)

    def spent(self) -> float:
        """US dollars spent by all processes that share the ledger, now and in earlier runs, and by machines that the job has
        no more."""
        return self._closed_spent if self._session is None else self._session.ledger.spent()

    def spent_elsewhere(self, usd: float) -> None:
        """Take note of US dollars that others of this job have spent, whose calls are not in this ledger: the budget counts
        them."""
        self._elsewhere = usd
        if self._session is not None:
            self._session.ledger.elsewhere = usd

    @property
    def stopped(self) -> RunStopped | None:
        """Why no more questions are asked, None while they are."""
        return None if self._session is None else self._session.retrier.stopped

    def close(self) -> None:
        """Close connections and files; safe to call twice. A later question opens them again."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
            self._closed_spent = session.ledger.spent()

    def problems(self, key: str = "model.judge") -> list[str]:
        """See `JudgeSettings.problems`."""
        return self.settings.problems(key)

    def make_client(self) -> Client:
        """What makes the calls. A subclass may return a stand-in that asks nobody.

        A stand-in has ``async call(question, route, messages, timeout_s) -> Reply`` (or raises `CallFailed`),
        ``connect()`` and ``async close()``, as `Client` has them.
        """
        of = self.limits
        return Client(of.model, of.deployments or (), of.providers or {}, of.prices or {})

    def make_cache(self) -> JudgmentCache | RedisCache:
        """What remembers the answers; a subclass may return one that forgets, or only reads."""
        return open_cache(self.settings.cache)

    def open(self) -> None:
        """Open cache and ledger now, and not at the first question."""
        self._open()

    def _open(self) -> Session:
        with _OPENING:
            if self._session is None:
                ledger = Ledger(self.settings.ledger, self._stats, self._machines)
                ledger.elsewhere = self._elsewhere
                self._session = Session(self.limits, self.make_client(), self.make_cache(), ledger)
            return self._session

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_stats": JudgeStats()}
