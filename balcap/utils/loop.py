"""Event loops in background threads, for synchronous callers."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """An event loop that runs until it is stopped. Its thread is a daemon: it never keeps a finished program alive."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="balcap-judge", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` and return at once."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end; an interrupt (Ctrl-C) cancels it.

        Raises:
            RuntimeError: if called from the loop itself, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run() was called from within the judge's own event loop: use await")
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def here(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await `coroutine` on this loop, whichever loop the caller runs on."""
        if asyncio.get_running_loop() is self.loop:
            return await coroutine
        return await asyncio.wrap_future(self.submit(coroutine))

    def stop(self, timeout: float | None = None) -> None:
        """Cancel what is running, stop the loop and its thread.

        Args:
            timeout: seconds that what is running may take to end; None for no limit.
        """
        if self.loop.is_closed():
            return
        try:
            self.submit(self._drain()).result(timeout)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout)
        self.loop.close()

    async def _drain(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()


_LOOPS: dict[int, BackgroundLoop] = {}
_STARTING = threading.Lock()


def process_loop() -> BackgroundLoop:
    """The one loop of this process for all judges; it runs until the process ends.

    litellm keeps HTTP clients per event loop. A loop for each judge would leave those of dead loops behind, and a
    new loop with the id of a dead one would be handed its connections.
    """
    with _STARTING:
        if os.getpid() not in _LOOPS:  # after a fork the parent's thread does not run here
            _LOOPS[os.getpid()] = BackgroundLoop()
            atexit.register(_stop_at_exit, os.getpid())
        return _LOOPS[os.getpid()]


def _stop_at_exit(pid: int) -> None:
    """No thread of ours runs while the interpreter ends; a fork's copy of this handler does nothing."""
    if os.getpid() == pid:
        with contextlib.suppress(Exception):
            _LOOPS[pid].stop(timeout=5)
