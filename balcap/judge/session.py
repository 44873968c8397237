"""A judge at work in one process: event loop, memory, calls."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from balcap.judge.asking import DIVISIBLE, Asker, Limits
from balcap.judge.cache import JudgmentCache
from balcap.judge.client import Client
from balcap.judge.errors import InvalidAnswer, JudgeFailure
from balcap.judge.health import Health
from balcap.judge.ledger import Ledger
from balcap.judge.request import Question
from balcap.judge.stats import Counters
from balcap.utils.loop import process_loop

T = TypeVar("T")
Piece = tuple[Any, ...]
_Waiting = tuple[Piece, list[str], "asyncio.Future[Any]"]


class Session:
    """What cannot be copied, pickled or used after a fork; `Judge` makes one where it needs one.

    A *piece* is what one answer is remembered for: an item, or the items of one caption.

    Args:
        cache: path of the cache, or None.
        ledger: path of the ledger, or None.
        make_client: makes the client.
        limits: of this process.
        max_failed_share: as `Health`.

    Raises:
        CacheError: if the cache cannot be opened.
        LedgerError: if the ledger cannot be opened.
    """

    def __init__(
        self,
        cache: str | None,
        ledger: str | None,
        make_client: Callable[[], Client],
        limits: Limits,
        max_failed_share: float,
    ):
        self.pid = os.getpid()
        self.counters = Counters()
        self.cache = JudgmentCache(cache)
        self.ledger = Ledger(ledger)
        self.loop = process_loop()
        self._client = make_client()
        self.asker = Asker(self._client, limits, Health(max_failed_share), self.ledger, self.counters)
        self._in_flight: dict[str, asyncio.Future[Any]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._submitted: set[Future[Any]] = set()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` on the loop and return at once; `close` cancels it."""
        future = self.loop.submit(coroutine)
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        return future

    async def ask(
        self, question: Question, pieces: Sequence[Piece], per_call: int
    ) -> list[list[Any] | JudgeFailure]:
        """Answers of each piece, or why there are none.

        Each comes from the cache, from an equal question under way, or from the provider, whom the rest is
        asked in calls of at most `per_call` items. Runs on this session's loop.
        """
        keys = [question.keys(piece) for piece in pieces]
        stored = self.cache.get_many([key for routes in keys for key in routes])
        futures: list[asyncio.Future[Any]] = []
        new: list[_Waiting] = []
        for piece, routes in zip(pieces, keys, strict=True):
            known = self._remembered(question, piece, [stored[key] for key in routes if key in stored])
            future = self._in_flight.get(routes[0])
            if known is not None:
                self.counters.cache_hits += 1
                future = _done(known)
            elif future is not None:
                self.counters.shared += 1
            else:
                future = self._in_flight[routes[0]] = asyncio.get_running_loop().create_future()
                new.append((piece, routes, future))
            futures.append(future)
        for chunk in _chunks(new, per_call):
            self._start(question, chunk)
        # Shielded: one caller that gives up must not take the answer away from the others.
        return [await asyncio.shield(future) for future in futures]

    def _remembered(self, question: Question, piece: Piece, stored: Sequence[str]) -> list[Any] | None:
        known = [question.task.known(item, **question.context) for item in piece]
        if all(answer is not None for answer in known):
            return known
        for text in stored:
            try:
                answers = [question.task.load(line) for line in text.split("\n")]
            except InvalidAnswer:
                continue  # stored by a task that changed without a new version: ask again
            if len(answers) == len(piece):
                return answers
        return None

    def _start(self, question: Question, chunk: list[_Waiting]) -> None:
        task = asyncio.get_running_loop().create_task(self._ask_chunk(question, chunk))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _ask_chunk(self, question: Question, chunk: list[_Waiting]) -> None:
        """Ask about several pieces in one call; in smaller ones where that may help."""
        items = [item for piece, _, _ in chunk for item in piece]
        task = question.task
        try:
            answers, route = await self.asker.ask(
                question, items, lambda answer: task.parse(task.read(answer), items, **question.context)
            )
        except JudgeFailure as failure:
            if len(chunk) > 1 and failure.kind in DIVISIBLE:
                half = len(chunk) // 2
                await asyncio.gather(
                    self._ask_chunk(question, chunk[:half]), self._ask_chunk(question, chunk[half:])
                )
                return
            if len(items) > 1:
                self.asker.give_up(failure, len(items))
            self._settle(chunk, [failure] * len(chunk))
        except asyncio.CancelledError:
            closed = JudgeFailure(task.name, "the judge was closed", "stopped")
            self._settle(chunk, [closed] * len(chunk))
            raise
        except Exception as error:  # a mistake in a task: whoever asked must hear of it
            for _, keys, future in chunk:
                self._in_flight.pop(keys[0], None)
                if not future.done():
                    future.set_exception(error)
        else:
            left = iter(answers)
            mine = [[next(left) for _ in piece] for piece, _, _ in chunk]
            which = list(question.routes).index(route)
            for (_, keys, _), some in zip(chunk, mine, strict=True):
                # JSON holds no line break: one line per item.
                self.cache.put(keys[which], task.name, route.model, "\n".join(map(task.dump, some)))
            self._settle(chunk, mine)

    def _settle(self, chunk: Sequence[_Waiting], outcomes: Sequence[Any]) -> None:
        for (_, keys, future), outcome in zip(chunk, outcomes, strict=True):
            self._in_flight.pop(keys[0], None)
            if not future.done():
                future.set_result(outcome)

    def close(self) -> None:
        """Cancel what is under way, close connections, cache and ledger; safe to call twice."""
        for future in list(self._submitted):
            future.cancel()
        self.loop.run(self._stop())
        self.cache.close()
        self.ledger.close()

    async def _stop(self) -> None:
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()


def _done(answers: list[Any]) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(answers)
    return future


def _chunks(waiting: Sequence[_Waiting], per_call: int) -> list[list[_Waiting]]:
    """As few chunks of at most `per_call` items as possible, of about equal size; a piece is never divided."""
    items = sum(len(piece) for piece, _, _ in waiting)
    number = max(1, -(-items // per_call))
    size = -(-items // number)
    chunks: list[list[_Waiting]] = []
    held = size
    for entry in waiting:
        if held + len(entry[0]) > size:
            chunks.append([])
            held = 0
        chunks[-1].append(entry)
        held += len(entry[0])
    return chunks
