"""`Judge`: what the rest of the project asks, and what a YAML sets."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from balcap.judge.cache import cache_problem
from balcap.judge.client import (
    RESERVED,
    import_litellm,
    load_provider,
    missing_keys,
    provider_of,
    register_providers,
)
from balcap.judge.errors import JudgeFailure
from balcap.judge.group import Group
from balcap.judge.images import ImageError
from balcap.judge.loop import BackgroundLoop
from balcap.judge.request import Request
from balcap.judge.session import Session
from balcap.judge.stats import JudgeStats
from balcap.judge.tasks import Decompose, Match, Rate, Rating, Task, Verdict, Verify
from balcap.judge.tasks.base import AnswerT

T = TypeVar("T")

_OPENING = threading.Lock()
_LEFT_BEHIND: list[Session] = []  # of the parent process: closing them after a fork would disturb the parent
_SECRET = re.compile(r"(^|_)(api_key|key|secret|token|password|credentials)$")


@dataclass(frozen=True)
class TaskModel:
    """Another model, or other parameters, for one kind of judgment.

    Args:
        model: litellm model string; null keeps ``model.judge.model``.
        params: replaces ``model.judge.params`` for this task; null keeps them.
    """

    model: str | None = None
    params: dict[str, Any] | None = None


class Judge:
    """Answers the questions that rewards are made of, by any model that litellm reaches.

    A judgment that fails, after its retries, raises `JudgeFailure` here and becomes a missing reward (NaN)
    in the reward suite, never 0. The object is plain data until the first question: it can be pickled,
    copied and used after a fork, and every process opens its own connections.

    Args:
        model: litellm model string, ``<provider>/<model>``, such as ``openai/gpt-4o-mini``.
        providers: litellm provider name -> import path of a `litellm.CustomLLM` subclass, for judges that
            run in this process; null for none.
        per_task: task name (``decompose``, ``verify``, ``match``, ``rate``) -> another model or other
            parameters for it.
        params: passed on with every call, such as ``temperature``, ``reasoning_effort``, ``max_tokens`` or
            ``api_base``. What a model does not know is dropped. Keys come from the environment, never from
            here.
        concurrency: calls under way at once, at least 1.
        timeout_s: seconds until a call counts as failed, above 0.
        retries: repetitions of a call that failed in a way that may pass, at least 0.
        cache: SQLite file that keeps the answers, shared by the processes of one machine; null for none.
    """

    def __init__(
        self,
        model: str,
        providers: dict[str, str] | None = None,
        per_task: dict[str, TaskModel] | None = None,
        params: dict[str, Any] | None = None,
        concurrency: int = 64,
        timeout_s: float = 60.0,
        retries: int = 3,
        cache: str | None = "runs/judge_cache.sqlite",
    ):
        self.model = model
        self.providers = dict(providers or {})
        self.per_task = dict(per_task or {})
        self.params = dict(params or {})
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.retries = retries
        self.cache = cache
        self._session: Session | None = None
        self._closed = JudgeStats()

    # ---- the questions

    async def decompose(self, captions: Sequence[str]) -> list[list[str] | None]:
        """Atomic assertions of each caption, None where the judge failed."""
        group = Group(self, "", b"", "", captions)
        return await self._open().loop.here(group.per_rollout(Decompose))

    async def verify(self, image: bytes, assertions: Sequence[str]) -> list[Verdict]:
        """Is each assertion true of the image, and can one point at it?

        Raises:
            JudgeFailure: if the judge fails or the image cannot be read.
        """
        return await self.ask(Verify, image=image, assertions=assertions)

    async def match(self, units: Sequence[str], assertions: Sequence[str]) -> list[bool]:
        """Is each unit of a reference covered by the assertions?

        Raises:
            JudgeFailure: if the judge fails.
        """
        return await self.ask(Match, units=units, assertions=assertions)

    async def rate(self, caption: str) -> Rating:
        """Clarity, fluency and coherency of a caption, each in [0, 1].

        Raises:
            JudgeFailure: if the judge fails.
        """
        return await self.ask(Rate, caption=caption)

    async def ask(self, task: type[Task[AnswerT]], **inputs: Any) -> AnswerT:
        """One question of any kind.

        Args:
            task: the kind of judgment.
            inputs: what its `messages` takes.

        Raises:
            JudgeFailure: if the judge fails, or an image cannot be read.
            CacheError: if the cache cannot be used.
        """
        asked = task()
        known = asked.known(**inputs)
        if known is not None:
            return known
        try:
            messages = asked.messages(**inputs)
        except ImageError as error:
            raise JudgeFailure(asked.name, str(error)) from None
        model, params = self._route(asked.name)
        request = Request(asked.name, asked.version, model, params, messages, asked.schema)

        def parse(answer: dict[str, Any]) -> AnswerT:
            return asked.parse(asked.read(answer), **inputs)

        session = self._open()
        return await session.loop.here(session.ask(request, parse))

    # ---- synchronous callers

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the judge's event loop and wait for it."""
        return self._loop_for(coroutine).run(coroutine)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` on the judge's event loop and return at once."""
        return self._loop_for(coroutine).submit(coroutine)

    def stats(self) -> JudgeStats:
        """Calls, tokens, cost and failures so far, in this process."""
        return self._closed if self._session is None else self._closed + self._session.counters.snapshot()

    def close(self) -> None:
        """Close connections, thread and cache; safe to call twice. A later question opens them again."""
        session, self._session = self._session, None
        if session is not None and session.pid == os.getpid():
            session.close()
            self._closed = self._closed + session.counters.snapshot()

    # ---- settings

    def problems(self) -> list[str]:
        """What is wrong with the settings, each message with the key that mends it. Calls no provider."""
        found = []
        if self.concurrency < 1:
            found.append(f"model.judge.concurrency: {self.concurrency} calls at once; it must be at least 1")
        if self.timeout_s <= 0:
            found.append(f"model.judge.timeout_s: {self.timeout_s} s; it must be above 0")
        if self.retries < 0:
            found.append(f"model.judge.retries: {self.retries}; it must be at least 0")
        if self.cache is not None and (problem := cache_problem(self.cache)):
            found.append(problem)
        names = {task.name for task in _tasks(Task)}  # type: ignore[type-abstract]
        found += [
            f"model.judge.per_task.{name}: no such task; there are {', '.join(sorted(names))}"
            for name in self.per_task
            if name not in names
        ]
        return found + self._params_problems() + self._model_problems()

    def _params_problems(self) -> list[str]:
        found = []
        for key, _, params in self._routes():
            for name in params:
                if name in RESERVED:
                    found.append(f"{key}params.{name}: set by the judge itself; remove it")
                elif _SECRET.search(name):
                    found.append(f"{key}params.{name}: keys come from the environment; remove it")
        return list(dict.fromkeys(found))

    def _model_problems(self) -> list[str]:
        litellm, found, usable = import_litellm(), [], {}
        for name, path in self.providers.items():
            try:
                load_provider(litellm, path)
            except (ImportError, AttributeError, TypeError) as error:
                found.append(f"model.judge.providers.{name}: cannot load {path}: {error}")
            else:
                usable[name] = path
        register_providers(litellm, usable)
        for key, model, params in self._routes():
            provider = provider_of(litellm, model, self.providers)
            if provider is None:
                found.append(
                    f"{key}model: litellm knows no provider for {model!r}; write <provider>/<model>, such as "
                    "openai/gpt-4o-mini or hosted_vllm/<name>, or name its class in model.judge.providers"
                )
            elif provider not in self.providers and not params.get("api_base"):
                missing = missing_keys(litellm, model)
                if missing:
                    found.append(f"{key}model: {model} needs in the environment: {', '.join(missing)}")
        return found

    def _routes(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Key prefix, model and parameters of the judge and of every task that has its own."""
        yield "model.judge.", self.model, self.params
        for name, own in self.per_task.items():
            if own.model is not None or own.params is not None:
                yield (f"model.judge.per_task.{name}.", *self._route(name))

    def _route(self, task: str) -> tuple[str, Mapping[str, Any]]:
        own = self.per_task.get(task, TaskModel())
        return own.model or self.model, self.params if own.params is None else own.params

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
                self._session = Session(
                    self.cache, self.concurrency, self.timeout_s, self.retries, self.providers
                )
            return self._session

    def _loop_for(self, coroutine: Coroutine[Any, Any, Any]) -> BackgroundLoop:
        try:
            return self._open().loop
        except BaseException:
            coroutine.close()  # it will never be awaited, which Python would remark on
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_closed": JudgeStats()}


def _tasks(kind: type[Task[Any]]) -> Iterator[type[Task[Any]]]:
    """Every kind of judgment that is loaded, the user's own included."""
    for task in kind.__subclasses__():
        if hasattr(task, "name"):
            yield task
        yield from _tasks(task)
