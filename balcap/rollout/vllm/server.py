"""Rollouts with vLLM servers on other GPUs or hosts (``vllm serve``)."""

from __future__ import annotations

import asyncio
import os
import queue
import uuid
from collections.abc import Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch.distributed as dist

from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.client import ADAPTER, KEY, START, Server, address_towards, all_of
from balcap.rollout.vllm.engine import Group, VLLMEngine, check_lengths
from balcap.rollout.vllm.requests import chat_answer, chat_request, chat_settings
from balcap.rollout.vllm.start import NCCL_FLAG, check_fits, logprobs_mode
from balcap.rollout.vllm.weights import NCCLTransfer, push_files
from balcap.types import CaptionBatch
from balcap.utils.loop import BackgroundLoop
from balcap.utils.redact import keep_secret

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts

T = TypeVar("T")


class VLLMServer(VLLMEngine):
    """vLLM servers sample; the trainer sends them its weights after every update.

    Start each with ``python main.py serve --config <the run's config>``; it belongs to one run at a time. With several
    trainer ranks each sends its own images to all servers, and rank 0 the weights. Prompts are compared with the
    trainer's on the first call of generate and on every hundredth; the version of the weights on each call.

    Log-probs are exact at temperature 1. At others banned tokens have no share in them, and with ``top_p`` below 1
    neither have the tails (`balcap.rollout.vllm.start.logprobs_mode`).

    Args:
        urls: of the servers, such as ``[http://host:8000]``.
        transfer_backend: how the weights of full tuning travel: ``nccl`` from GPU to GPU, by vLLM's own transfer;
            ``folder`` as a file; ``auto`` takes NCCL where all are on CUDA devices and the servers were started for it.
            Adapters are files always.
        weights_folder: for these files; trainer and servers see it under the same path. null: a temporary folder of
            this machine, which is enough for servers on it.
        deadline_s: seconds after which captions, or a transfer of weights, are given up.
        start_timeout_s: seconds to wait for servers that are still starting.
        api_key_env: environment variable with the key that the servers ask for (their ``--api-key``).
        group_host: address of this machine that servers reach it by (NCCL); null finds it out.
        concurrency: images that each rank has under way at once, over all servers.
    """

    def __init__(
        self,
        urls: list[str],
        transfer_backend: Literal["auto", "nccl", "folder"] = "auto",
        weights_folder: str | None = None,
        deadline_s: float = 600.0,
        start_timeout_s: float = 600.0,
        api_key_env: str | None = None,
        group_host: str | None = None,
        concurrency: int = 64,
    ) -> None:
        problems = []
        if not urls or len(set(urls)) < len(urls):
            problems.append(f"{KEY}.urls: {urls} must name at least one server, and each once")
        if bad := [url for url in urls if not url.startswith(("http://", "https://"))]:
            problems.append(f"{KEY}.urls: {bad} must begin with http:// or https://")
        limits = {"deadline_s": deadline_s, "start_timeout_s": start_timeout_s, "concurrency": concurrency}
        problems += [
            f"{KEY}.{name}: {value} must be above 0" for name, value in limits.items() if not value > 0
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.urls, self.transfer_backend, self.weights_folder = urls, transfer_backend, weights_folder
        self.deadline_s, self.start_timeout_s = deadline_s, start_timeout_s
        self.api_key_env, self.group_host, self.concurrency = api_key_env, group_host, concurrency
        super().__init__()
        self._loop: BackgroundLoop | None = None
        self._servers: list[Server] = []
        self._abouts: list[dict[str, Any]] = []
        self._nccl: NCCLTransfer | None = None
        self._run_id = uuid.uuid4().hex
        self._held = ""  # what workers must report: the run's id and the version

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, policy: Policy) -> None:
        """See `RolloutEngine.attach`. Waits for the servers, and checks that they fit the policy."""
        self._policy = policy
        key = None
        if self.api_key_env is not None:
            keep_secret([self.api_key_env])
            key = os.environ.get(self.api_key_env)
            if not key:
                raise EngineFailed(
                    f"{KEY}.api_key_env: the environment variable {self.api_key_env} is not set"
                )
        self._loop = self._loop or BackgroundLoop()
        self._servers = [Server(url, key) for url in self.urls]
        failure = None
        try:
            self._abouts = self._run(all_of(self._meet(server, policy) for server in self._servers))
        except EngineFailed as error:
            failure = str(error)
        _raise_together(failure)

    async def _meet(self, server: Server, policy: Policy) -> dict[str, Any]:
        await server.wait_until_up(self.start_timeout_s)
        about, *_ = await server.rpc("balcap_about")
        served = [model["id"] for model in await server.models() if not model.get("parent")]
        server.workers = about["workers"]
        check_fits(f"the vLLM server {server.name}", about, served, policy)
        return about

    def close(self) -> None:
        """See `RolloutEngine.close`. The servers go on, for the next run."""
        self._policy, self._version, self._nccl = None, -1, None
        loop, self._loop = self._loop, None
        if loop is not None:
            for server in self._servers:
                loop.run(server.close())
            loop.stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return self._loop.run(work)

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────

    def sync(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine.sync`. No request may be under way; with several ranks, all must call it."""
        held, failure = f"{self._run_id}-{version}", None
        if _rank() == 0:
            try:
                self._run(self._push(policy, held))
            except Exception as error:  # the other ranks wait to hear
                failure = str(error) if isinstance(error, EngineFailed) else repr(error)
        _raise_together(failure)
        self._version, self._held = version, _of_all_ranks(held)[0]

    async def _push(self, policy: Policy, version: str) -> None:
        try:
            async with asyncio.timeout(self.deadline_s):
                if self._uses_nccl(policy):
                    self._nccl = self._nccl or self._new_nccl()
                    await self._nccl.push(policy, version)
                else:
                    await push_files(self._servers, policy, version, self.weights_folder)
                await all_of(self._check_version(server, version) for server in self._servers)
                if policy.has_adapter:
                    await all_of(server.add_adapter() for server in self._servers)
                await all_of(server.reset_caches() for server in self._servers)
        except TimeoutError:
            names = ", ".join(server.name for server in self._servers)
            raise EngineFailed(
                f"weights did not reach the vLLM servers {names} within {KEY}.deadline_s: {self.deadline_s:g} s"
            ) from None

    def _uses_nccl(self, policy: Policy) -> bool:
        devices = {policy.device.type, *(about["device"] for about in self._abouts)}
        ready = devices == {"cuda"} and all(about["weight_transfer"] == "nccl" for about in self._abouts)
        if self.transfer_backend == "nccl" and not ready:
            raise EngineFailed(
                f"{KEY}.transfer_backend: NCCL needs CUDA devices on both sides, here are {sorted(devices)}, and "
                f"servers that were started with --weight-transfer-config '{NCCL_FLAG}'; use auto or folder"
            )
        return ready and self.transfer_backend != "folder" and not policy.has_adapter

    def _new_nccl(self) -> NCCLTransfer:
        assert self._loop is not None
        # One that others can use where any of the servers is elsewhere.
        own = sorted(
            (address_towards(s.host, s.port) for s in self._servers), key=lambda a: a.startswith("127.")
        )
        return NCCLTransfer(self._servers, self._loop, self.group_host or own[0])

    async def _check_version(self, server: Server, version: str) -> None:
        """EngineFailed where a worker holds other weights than those last synced."""
        for about in await server.rpc("balcap_about"):
            held = about["version"]
            if held == version:
                continue
            run, _, number = (held or "").rpartition("-")
            if held is None:
                why = "it was started anew since"
            elif run != self._run_id:
                why = "another run has sent it its own: a server belongs to one run at a time"
            else:
                why = f"it is at version {number}"
            raise EngineFailed(
                f"the vLLM server {server.name} does not hold the weights of version {version.rpartition('-')[2]} "
                f"that it was sent: {why}"
            )

    # ── captions ─────────────────────────────────────────────────────────────────────────────────────

    def _draw(
        self,
        policy: Policy,
        batch: CaptionBatch,
        prompts: Prompts,
        settings: dict[str, Any],
        seeds: list[int],
    ) -> Generator[Group]:
        assert self._loop is not None
        mode = logprobs_mode(settings["temperature"])
        for server, about in zip(self._servers, self._abouts, strict=True):
            name = f"the vLLM server {server.name}"
            if about["logprobs_mode"] != mode:
                raise EngineFailed(
                    f"{name} was started with --logprobs-mode {about['logprobs_mode']}; with "
                    f"model.sampling.temperature: {settings['temperature']} it must be {mode}"
                )
            check_lengths(batch, prompts, settings, about["max_model_len"], name, "its --max-model-len")
        arrived: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        future = self._loop.submit(self._ask_all(policy, batch, settings, seeds, arrived))
        future.add_done_callback(lambda _: arrived.put(None))
        try:
            while (group := arrived.get()) is not None:
                yield group
            future.result()
        finally:
            future.cancel()

    async def _ask_all(
        self,
        policy: Policy,
        batch: CaptionBatch,
        settings: dict[str, Any],
        seeds: Sequence[int],
        arrived: queue.SimpleQueue[Group | None],
    ) -> None:
        """Put every image's captions into `arrived` as they come."""
        settings, model = chat_settings(policy, settings), ADAPTER if policy.has_adapter else None
        slots = asyncio.Semaphore(self.concurrency)
        first = _rank() % len(self._servers)
        turn = [*self._servers[first:], *self._servers[:first]]  # ranks begin at different ones
        waiting = {server.name: 0 for server in turn}

        async def ask(row: int) -> None:
            async with slots:
                image, prompt = batch.images[row], batch.prompts[row]
                request = await asyncio.to_thread(chat_request, settings, model, image, prompt, seeds[row])
                server = min(turn, key=lambda server: server.busy)
                waiting[server.name] += 1
                answer = await server.complete(request)
                waiting[server.name] -= 1
            arrived.put((row, *chat_answer(answer, settings["n"], server.name)))

        try:
            async with asyncio.timeout(self.deadline_s):
                # Before, lest stale captions are waited for; after, lest a server was started anew meanwhile.
                await all_of(self._check_version(server, self._held) for server in turn)
                await all_of(ask(row) for row in range(len(batch)))
                await all_of(self._check_version(server, self._held) for server in turn)
        except TimeoutError:
            silent = ", ".join(f"{name} ({n})" for name, n in waiting.items() if n) or ", ".join(waiting)
            raise EngineFailed(
                f"no answer within {KEY}.deadline_s: {self.deadline_s:g} s from the vLLM servers (images) {silent}; "
                "raise it, or lower model.sampling.max_tokens, model.num_captions or data.batch_size; a server that "
                f"hangs: start it again with {START}"
            ) from None


def _raise_together(failure: str | None) -> None:
    """EngineFailed on all ranks where any has a failure; all must call it."""
    if message := next(filter(None, _of_all_ranks(failure)), None):
        raise EngineFailed(message)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _of_all_ranks(value: T) -> list[T]:
    """What each rank passed in, by rank; all must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
