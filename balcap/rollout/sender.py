"""The trainer's end of a weight transfer to vLLM servers; the workers' end is `balcap.rollout.transfer`."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from balcap.rollout.base import EngineFailed
from balcap.rollout.transfer import (
    HELLO,
    JOIN_TIMEOUT_S,
    Backend,
    Bucket,
    Group,
    TransferBroken,
    address_towards,
    announce,
    buckets,
    open_store,
)
from balcap.rollout.vllm_http import Server, WorkerFailed
from balcap.utils.redact import redact

T = TypeVar("T")

_KEY = "model.engine.init_args"
_TICK_S = 0.001  # between looks at a broadcast
_BLAME_S = 5.0  # for a server to say what broke a broadcast


class Sender:
    """Sends weights to all workers of all servers at once. For one event loop; raises EngineFailed throughout.

    Args:
        servers: their ``workers`` counted.
        backend: ``auto`` takes NCCL where trainer and workers are on CUDA devices.
        devices: kinds of device of trainer and workers, such as ``{"cuda"}``.
        device: that the policy is on.
        timeout_s: longest broadcast.
        group_host: address of this machine as the servers see it; None finds it out.

    Attributes:
        run: under which workers know this trainer; None before the first push.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        backend: Literal["auto", "nccl", "gloo"],
        devices: set[str],
        device: torch.device,
        timeout_s: float,
        group_host: str | None,
    ) -> None:
        if backend == "nccl" and devices != {"cuda"}:
            raise EngineFailed(
                f"{_KEY}.transfer_backend: NCCL needs CUDA devices on both sides, here are {sorted(devices)}; use auto "
                "or gloo"
            )
        nccl = devices == {"cuda"} and torch.distributed.is_nccl_available()
        self.backend: Backend = ("nccl" if nccl else "gloo") if backend == "auto" else backend
        self.servers, self.device, self.timeout_s, self.group_host = servers, device, timeout_s, group_host
        self.run: str | None = None
        self._group: Group | None = None

    async def push(
        self,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype | None,
        adapter: dict[str, Any] | None,
        version: int,
    ) -> None:
        """Send weights; returns when every worker reports this version.

        Args:
            weights: names and tensors as `balcap.rollout.weights` gives them.
            dtype: that the workers compute with.
            adapter: config of the adapter that the weights are; None where they are the model's own.
            version: that workers report from now on.
        """
        joined = self._group is not None
        group = self._group if self._group is not None else await self._join()
        parts = buckets(weights, dtype)
        request = {"run": self.run, "version": version, "announced": announce(parts), "adapter": adapter}
        calls = [asyncio.ensure_future(s.rpc("balcap_receive", request)) for s in self.servers]
        try:
            answers = await self._carry(group, parts, calls)
            for server, results in zip(self.servers, answers, strict=True):
                held = {result["version"] for result in results}
                if held != {version} or len(results) != server.workers:
                    raise EngineFailed(
                        f"the vLLM server {server.name} reports weights of version {sorted(held)} from {len(results)} "
                        f"workers after version {version} was sent to {server.workers}; start it anew"
                    )
        except BaseException:
            self.leave()  # members no longer agree on what comes next
            raise
        finally:
            await cancelled(calls)
        if adapter is not None and not joined:
            await all_of(server.add_adapter() for server in self.servers)
        await all_of(server.reset_caches() for server in self.servers)

    def leave(self) -> None:
        """End the group; the next push makes another."""
        group, self._group = self._group, None
        if group is not None:
            group.leave()

    async def _join(self) -> Group:
        """A group of the trainer and all workers, tried out."""
        own = self._own_address()
        store = open_store("localhost", 0, serve=True)
        run, host, rank = uuid.uuid4().hex, self.group_host or own, 1
        size = 1 + sum(server.workers for server in self.servers)
        calls: list[asyncio.Future[Any]] = []
        for server in self.servers:
            request = {"run": run, "backend": self.backend, "host": host, "port": store.port}
            request |= {"first_rank": rank, "size": size, "timeout_s": self.timeout_s}
            calls.append(asyncio.ensure_future(server.rpc("balcap_join", request)))
            rank += server.workers
        # Members wait for one another inside: in a thread, while the calls bring the workers in.
        making = _in_daemon(
            lambda: _tried(Group(self.backend, store, 0, size, self.device, self.timeout_s, own))
        )
        try:
            group, *_ = await all_of([making, *calls])
        except RuntimeError as error:
            if isinstance(error, EngineFailed) and not isinstance(error, WorkerFailed):
                raise
            raise EngineFailed(
                f"trainer and vLLM servers cannot form a process group ({self.backend}) at {host}:{store.port}: "
                f"{redact(str(error))}. The servers must reach this machine by that address, and it them, on any "
                f"port: set {_KEY}.group_host to another one. NCCL also needs a GPU for each member and similar "
                f"versions on both sides: {_KEY}.transfer_backend: gloo does without"
            ) from None
        self.run, self._group = run, group
        return group

    async def _carry(
        self, group: Group, parts: Sequence[Bucket], calls: Sequence[asyncio.Future[T]]
    ) -> list[T]:
        """Send while the servers receive; what their calls return. A server that fails ends it."""
        work: Any = None
        try:
            for work in group.send(parts):
                while not work.is_completed():
                    _raise_failed(calls)
                    await asyncio.sleep(_TICK_S)
                work.wait()
            await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            _raise_failed(calls)
            return [call.result() for call in calls]
        except RuntimeError as error:
            work = None  # would keep the connections open as long as the error is looked at
            if isinstance(error, EngineFailed) and not _is_broken(error):
                raise
            # One member that dies breaks the others' transfer, too: it is to blame, not they.
            await asyncio.wait(calls, timeout=_BLAME_S)
            failed = [why for call in calls if call.done() and (why := call.exception())]
            for why in sorted(failed, key=_is_broken):
                raise why from None
            names = ", ".join(server.name for server in self.servers)
            raise EngineFailed(
                f"weights did not reach the vLLM servers {names}: {redact(str(error))}"
            ) from None

    def _own_address(self) -> str:
        """Of this machine, as seen from the servers: one that others can use where any of them is elsewhere."""
        found = []
        for server in self.servers:
            try:
                found.append(address_towards(server.host, server.port))
            except OSError as error:
                raise EngineFailed(f"there is no way to the vLLM server {server.name}: {error}") from None
        return next((a for a in found if not ipaddress.ip_address(a).is_loopback), found[0])


def _is_broken(error: BaseException) -> bool:
    """Whether a worker says that another member is the reason."""
    return isinstance(error, WorkerFailed) and error.kind == TransferBroken.__name__


def _raise_failed(calls: Iterable[asyncio.Future[Any]]) -> None:
    for call in calls:
        if call.done():
            call.result()


def _tried(group: Group) -> Group:
    """The group, after it has carried something."""
    for work in group.send(HELLO):
        work.wait()
        give_up = time.monotonic() + JOIN_TIMEOUT_S
        while not work.is_completed():  # NCCL's wait is the device's, not the host's
            if time.monotonic() > give_up:
                raise RuntimeError(f"nothing arrived within {JOIN_TIMEOUT_S:g} s")
            time.sleep(_TICK_S)
    return group


def _in_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run `work` in a thread that nobody waits for: it may hang as long as its own timeout."""
    future: Future[T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="balcap-group", daemon=True).start()
    return asyncio.wrap_future(future)


async def all_of(work: Iterable[Coroutine[Any, Any, T] | asyncio.Future[T]]) -> list[T]:
    """All results, in order; the first error cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancelled(tasks)


async def cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what is not done, and wait for it to end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
