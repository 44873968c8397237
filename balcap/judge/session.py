"""A judge at work in one process: event loop, client, cache."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from balcap.judge.cache import JudgmentCache
from balcap.judge.client import Client
from balcap.judge.errors import InvalidAnswer
from balcap.judge.loop import BackgroundLoop
from balcap.judge.request import Request
from balcap.judge.stats import Counters

T = TypeVar("T")


class Session:
    """What cannot be copied, pickled or used after a fork; `Judge` makes one where it needs one.

    Args:
        cache: path of the cache, or None.
        concurrency, timeout_s, retries, providers: as `Client`.

    Raises:
        CacheError: if the cache cannot be opened.
    """

    def __init__(
        self,
        cache: str | None,
        concurrency: int,
        timeout_s: float,
        retries: int,
        providers: Mapping[str, str],
    ):
        self.pid = os.getpid()
        self.counters = Counters()
        self.cache = JudgmentCache(cache)
        self.loop = BackgroundLoop()
        self._client = Client(self.counters, concurrency, timeout_s, retries, providers)
        self._in_flight: dict[str, asyncio.Task[Any]] = {}

    async def ask(self, request: Request, parse: Callable[[dict[str, Any]], T]) -> T:
        """The answer: from the cache, from an equal request under way, or from the provider.

        Runs on this session's loop. Raises `JudgeFailure` as `Client.ask`.
        """
        key = request.key
        stored = self.cache.get(key)
        if stored is not None:
            try:
                answer = parse(json.loads(stored))
            except (InvalidAnswer, ValueError):
                pass  # stored by a task that changed without a new version: ask again
            else:
                self.counters.cache_hits += 1
                return answer
        task = self._in_flight.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._ask_provider(request, key, parse))
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._landed(key, done))
        else:
            self.counters.shared += 1
        # Shielded: one caller that gives up must not take the answer away from the others.
        return await asyncio.shield(task)

    async def _ask_provider(self, request: Request, key: str, parse: Callable[[dict[str, Any]], T]) -> T:
        answer, text = await self._client.ask(request, parse)
        self.cache.put(key, request.task, request.model, text)
        return answer

    def _landed(self, key: str, task: asyncio.Task[Any]) -> None:
        self._in_flight.pop(key, None)
        if not task.cancelled():
            task.exception()  # looked at: all callers may have gone

    def close(self) -> None:
        """Close connections, loop and cache; safe to call twice."""
        if not self.loop.loop.is_closed():
            self.loop.run(self._client.close())
            self.loop.stop()
        self.cache.close()
