"""A judge at work in one process: event loop, cache, and how questions share calls."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from balcap.judge.cache import JudgmentCache
from balcap.judge.client import Client
from balcap.judge.errors import InvalidAnswer, JudgeFailure
from balcap.judge.ledger import Ledger
from balcap.judge.prompt import Question
from balcap.judge.retry import DIVISIBLE, Retrier
from balcap.judge.settings import JudgeSettings
from balcap.utils.loop import process_loop

T = TypeVar("T")
Piece = tuple[Any, ...]
"""What one answer is remembered for: an item, or the items of one caption."""
_Waiting = tuple[Piece, list[str], "asyncio.Future[Any]"]


class Session:
    """What cannot be copied, pickled or used after a fork; `Judge` makes one where it needs one.

    Args:
        settings: of the judge.
        client: makes the calls.
        cache: remembers the answers.

    Raises:
        LedgerError: if the ledger cannot be opened.
    """

    def __init__(self, settings: JudgeSettings, client: Client, cache: JudgmentCache):
        self.pid = os.getpid()
        self.cache = cache
        self.ledger = Ledger(settings.ledger)
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

    async def gather(
        self, question: Question, pieces: Sequence[Piece], per_call: int
    ) -> list[list[Any] | JudgeFailure]:
        """Answers of each piece, or why there are none.

        Each comes from the cache, from an equal question under way, or from the provider, who is asked about
        the others in calls of at most `per_call` items. Runs on this session's loop.
        """
        keys, loop = [question.keys(piece) for piece in pieces], asyncio.get_running_loop()
        stored = self.cache.get_many([key for routes in keys for key in routes])
        futures: list[asyncio.Future[Any]] = []
        new: list[_Waiting] = []
        for piece, routes in zip(pieces, keys, strict=True):
            known = _remembered(question, piece, [stored[key] for key in routes if key in stored])
            if known is not None:
                self.ledger.stats.cache_hits += 1
                future = loop.create_future()
                future.set_result(known)
            elif routes[0] in self._in_flight:
                self.ledger.stats.shared += 1
                future = self._in_flight[routes[0]]
            else:
                future = self._in_flight[routes[0]] = loop.create_future()
                new.append((piece, routes, future))
            futures.append(future)
        for chunk in _chunks(new, per_call):
            task = loop.create_task(self._answer_chunk(question, chunk))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        # Shielded: one caller that gives up must not take the answer away from the others.
        return [await asyncio.shield(future) for future in futures]

    async def _answer_chunk(self, question: Question, chunk: list[_Waiting]) -> None:
        """Ask about several pieces in one call; in smaller ones where that may help."""
        items = [item for piece, _, _ in chunk for item in piece]
        task = question.task
        try:
            answers, route = await self.retrier.answer(question, items)
        except JudgeFailure as failure:
            if len(chunk) > 1 and failure.kind in DIVISIBLE:
                halves = chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]
                await asyncio.gather(*(self._answer_chunk(question, half) for half in halves))
                return
            self.retrier.give_up(failure, len(items))
            outcomes: Sequence[Any] = [failure] * len(chunk)
        except asyncio.CancelledError:
            self._settle(chunk, [JudgeFailure(task.name, "the judge was closed", "stopped")] * len(chunk))
            raise
        except Exception as error:  # a mistake in a task: whoever asked must hear of it
            outcomes = [error] * len(chunk)
        else:
            rest, which = iter(answers), list(question.routes).index(route)
            outcomes = [[next(rest) for _ in piece] for piece, _, _ in chunk]
            for (_, keys, _), some in zip(chunk, outcomes, strict=True):
                # JSON holds no line break: one line per item.
                self.cache.put(keys[which], task.name, route.model, "\n".join(map(task.dump, some)))
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


def _remembered(question: Question, piece: Piece, stored: Sequence[str]) -> list[Any] | None:
    """The answers that need no call: what the task itself knows, or the cache holds."""
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


def _chunks(waiting: Sequence[_Waiting], per_call: int) -> list[list[_Waiting]]:
    """As few chunks of at most `per_call` items as possible, of about equal size; a piece is never divided."""
    items = sum(len(piece) for piece, _, _ in waiting)
    size = math.ceil(items / max(1, math.ceil(items / per_call)))
    chunks: list[list[_Waiting]] = []
    held = size
    for entry in waiting:
        if held + len(entry[0]) > size:
            chunks.append([])
            held = 0
        chunks[-1].append(entry)
        held += len(entry[0])
    return chunks
