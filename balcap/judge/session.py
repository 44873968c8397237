"""A judge at work in one process: event loop, cache, and how questions share calls."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from balcap.judge.cache import JudgmentCache
from balcap.judge.client import Client
from balcap.judge.errors import InvalidAnswer, JudgeFailure
from balcap.judge.ledger import Ledger
from balcap.judge.prompt import Question
from balcap.judge.redis_cache import RedisCache
from balcap.judge.retry import DIVISIBLE, Retrier
from balcap.judge.settings import JudgeSettings
from balcap.utils.loop import process_loop

T = TypeVar("T")
_Waiting = tuple[Any, list[str], "asyncio.Future[Any]"]
"""An item, the keys of its answer, and who waits for it."""


class Session:
    """What cannot be copied, pickled or used after a fork; `Judge` makes one where it needs one.

    Args:
        settings: of the judge.
        client: makes the calls.
        cache: remembers the answers.
        ledger: counts what is done.
    """

    def __init__(
        self, settings: JudgeSettings, client: Client, cache: JudgmentCache | RedisCache, ledger: Ledger
    ):
        self.cache = cache
        self.ledger = ledger
        self.loop = process_loop()
        self.retrier = Retrier(client, settings, self.ledger)
        self._client = client
        self._in_flight: dict[str, asyncio.Future[Any]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._submitted: set[Future[Any]] = set()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` on the loop and return at once; `close` cancels it."""
        future = self.loop.submit(coroutine)
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        return future

    async def gather(self, question: Question, per_call: int) -> list[Any | JudgeFailure]:
        """The answer about each item, or why there is none.

        Each comes from the cache, from an equal question under way, or from the provider, who is asked about
        the others in calls of at most `per_call` items. Runs on this session's loop.
        """
        keys, loop = [question.keys(item) for item in question.items], asyncio.get_running_loop()
        stored = self.cache.get_many([key for routes in keys for key in routes])
        futures: list[asyncio.Future[Any]] = []
        new: list[_Waiting] = []
        for item, routes in zip(question.items, keys, strict=True):
            future = self._in_flight.get(routes[0]) or loop.create_future()
            futures.append(future)
            if routes[0] in self._in_flight:
                continue
            known = _remembered(question, item, [stored[key] for key in routes if key in stored])
            if known is not None:
                self.ledger.stats.cache_hits += 1
                future.set_result(known)
            else:
                self._in_flight[routes[0]] = future
                new.append((item, routes, future))
        for chunk in _chunks(new, per_call):
            task = loop.create_task(self._answer_chunk(question, chunk))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        # Shielded: one caller that gives up must not take the answer away from the others.
        return [await asyncio.shield(future) for future in futures]

    async def _answer_chunk(self, question: Question, chunk: list[_Waiting]) -> None:
        """Ask about several items in one call; in smaller ones where that may help."""
        task, outcomes = question.task, list[Any]()
        try:
            asked = replace(question, items=[item for item, _, _ in chunk])
            outcomes, route = await self.retrier.answer(asked)
            which = question.routes.index(route)
            for (_, keys, _), answer in zip(chunk, outcomes, strict=True):
                self.cache.put(keys[which], task.name, route.model, task.dump(answer))
        except JudgeFailure as failure:
            if len(chunk) > 1 and failure.kind in DIVISIBLE:
                halves = chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]
                await asyncio.gather(*(self._answer_chunk(question, half) for half in halves))
                return
            self.retrier.give_up(failure, len(chunk))
            outcomes = [failure] * len(chunk)
        except asyncio.CancelledError:
            self._settle(chunk, [JudgeFailure(task.name, "the judge was closed", "stopped")] * len(chunk))
            raise
        except Exception as error:  # a mistake in a task: whoever asked must hear of it
            outcomes = [error] * len(chunk)
        self._settle(chunk, outcomes)

    def _settle(self, chunk: Sequence[_Waiting], outcomes: Sequence[Any]) -> None:
        for (_, keys, future), outcome in zip(chunk, outcomes, strict=True):
            self._in_flight.pop(keys[0], None)
            if not future.done():
                is_error = isinstance(outcome, Exception) and not isinstance(outcome, JudgeFailure)
                (future.set_exception if is_error else future.set_result)(outcome)

    def close(self) -> None:
        """Cancel what is under way, close connections, cache and ledger; safe to call twice."""
        for future in list(self._submitted):
            future.cancel()
        self.loop.run(self._stop())
        self.cache.close()
        self.ledger.close()

    async def _stop(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._client.close()


def _remembered(question: Question, item: Any, stored: Sequence[str]) -> Any | None:
    """The answer that needs no call: what the task itself knows, or the cache holds."""
    answer = question.task.known(item, **question.context)
    for text in stored:
        if answer is None:
            with contextlib.suppress(
                InvalidAnswer
            ):  # of a task that changed without a new version: ask again
                answer = question.task.load(text)
    return answer


def _chunks(waiting: list[_Waiting], per_call: int) -> list[list[_Waiting]]:
    """As few chunks of at most `per_call` items as possible, of about equal size."""
    count = math.ceil(len(waiting) / per_call)
    size = math.ceil(len(waiting) / max(1, count))
    return [waiting[start : start + size] for start in range(0, len(waiting), max(1, size))]
