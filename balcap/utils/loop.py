"""Event loops in background threads, for synchronous callers."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
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
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="balcap-judge", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        # In the end the runner cancels what is left, and closes the loop.
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._stopping.wait())

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
        """Cancel what is running, stop the loop and its thread; safe to call twice.

        Args:
            timeout: seconds that what is running may take to end; None for no limit.
        """
        with contextlib.suppress(RuntimeError):  # it is closed already
            self.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout)


@functools.cache
def process_loop() -> BackgroundLoop:
    """The one loop of this process for all judges; it runs until the process ends.

    litellm keeps HTTP clients per event loop. A loop for each judge would leave those of dead loops behind, and a
    new loop with the id of a dead one would be handed its connections.
    """
    loop = BackgroundLoop()
    atexit.register(loop.stop, timeout=5)  # no thread of ours runs while the interpreter ends
    return loop


if hasattr(os, "register_at_fork"):  # the parent's thread does not run in a child
    os.register_at_fork(after_in_child=process_loop.cache_clear)
