"""Rollouts with vLLM servers on other GPUs or hosts (``vllm serve``)."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from balcap.rollout.base import EngineFailed, Finished, Sampling
from balcap.rollout.packing import pack, stop_token_ids, until_stop
from balcap.rollout.sender import Sender, all_of
from balcap.rollout.server_checks import check_fits, check_limits
from balcap.rollout.vllm_chat import chat_answer, chat_request, chat_settings
from balcap.rollout.vllm_common import check_prompt, draw_seed, image_seeds, rows_to_check
from balcap.rollout.vllm_http import ADAPTER, START, Server
from balcap.rollout.weights import adapter_weights, trained_weights
from balcap.types import CaptionBatch, Rollouts
from balcap.utils.loop import BackgroundLoop
from balcap.utils.redact import keep_secret

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts

T = TypeVar("T")
Drawn = tuple[int, list[Tensor], list[Tensor]]  # row, token ids and log-probs of its G captions

_KEY = "model.engine.init_args"


class VLLMServer:
    """vLLM servers sample; the trainer sends them its weights after every update.

    Start each with ``python main.py serve --config <the run's config>``; it belongs to one run at a time. With several
    trainer ranks each sends its own images to all servers, and rank 0 the weights. Prompts are compared with the
    trainer's on the first call of generate and on every hundredth; the version of the weights on each call.

    Log-probs are exact at temperature 1. At others banned tokens have no share in them, and with ``top_p`` below 1
    neither have the tails (`balcap.rollout.vllm_common.logprobs_mode`).

    Args:
        urls: of the servers, such as ``[http://host:8000]``.
        transfer_backend: how weights travel: ``nccl`` from GPU to GPU, ``gloo`` through the hosts' memory; ``auto`` takes
            NCCL where all are on CUDA devices.
        deadline_s: seconds after which captions, or a transfer of weights, are given up.
        start_timeout_s: seconds to wait for servers that are still starting.
        api_key_env: environment variable with the key that the servers ask for (their ``--api-key``).
        group_host: address of this machine that servers reach it by; null finds it out.
        concurrency: images that each rank has under way at once, over all servers.
    """

    exact = False

    def __init__(
        self,
        urls: list[str],
        transfer_backend: Literal["auto", "nccl", "gloo"] = "auto",
        deadline_s: float = 600.0,
        start_timeout_s: float = 600.0,
        api_key_env: str | None = None,
        group_host: str | None = None,
        concurrency: int = 64,
    ) -> None:
        found = []
        if not urls or len(set(urls)) < len(urls):
            found.append(f"{_KEY}.urls: {urls} must name at least one server, and each once")
        if bad := [url for url in urls if not url.startswith(("http://", "https://"))]:
            found.append(f"{_KEY}.urls: {bad} must begin with http:// or https://")
        found += [
            f"{_KEY}.{name}: {value} must be above 0"
            for name, value in (("deadline_s", deadline_s), ("start_timeout_s", start_timeout_s))
            if value <= 0
        ]
        if concurrency < 1:
            found.append(f"{_KEY}.concurrency: {concurrency} must be at least 1")
        if found:
            raise ValueError("; ".join(found))
        self.urls, self.transfer_backend, self.group_host = urls, transfer_backend, group_host
        self.deadline_s, self.start_timeout_s = deadline_s, start_timeout_s
        self.api_key_env, self.concurrency = api_key_env, concurrency
        self._policy: Policy | None = None
        self._loop: BackgroundLoop | None = None
        self._servers: list[Server] = []
        self._abouts: list[dict[str, Any]] = []
        self._sender: Sender | None = None
        self._synced: tuple[str | None, int] = (None, -1)  # run and version that workers must report
        self._calls = 0

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
                    f"{_KEY}.api_key_env: the environment variable {self.api_key_env} is not set"
                )
        self._loop = self._loop or BackgroundLoop()
        self._servers = [Server(url, key) for url in self.urls]
        failure = None
        try:
            self._abouts = self._run(all_of(self._meet(server, policy) for server in self._servers))
        except EngineFailed as error:
            failure = str(error)
        # The first sync, which follows, is a meeting of all ranks.
        if found := next((said for said in (failure, *_of_all_ranks(failure)) if said), None):
            raise EngineFailed(found)

    async def _meet(self, server: Server, policy: Policy) -> dict[str, Any]:
        await server.wait_until_up(self.start_timeout_s)
        about, *_ = await server.rpc("balcap_about")
        known = [model["id"] for model in await server.models() if not model.get("parent")]
        server.workers = about["workers"]
        check_fits(server.name, about, known, policy)
        return about

    def close(self) -> None:
        """See `RolloutEngine.close`. The servers go on, for the next run."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.leave()
        loop, self._loop = self._loop, None
        if loop is not None:
            for server in self._servers:
                loop.run(server.close())
            loop.stop()
        self._policy, self._synced = None, (None, -1)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return self._loop.run(work)

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────

    def sync(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine.sync`. No request may be under way; with several ranks, all must call it."""
        failure = None
        if _rank() == 0:
            try:
                self._run(self._push(policy, version))
            except Exception as error:  # the other ranks wait to hear
                failure = str(error) if isinstance(error, EngineFailed) else repr(error)
        run, failure = _of_all_ranks((self._sender.run if self._sender else None, failure))[0]
        if failure is not None:
            raise EngineFailed(failure)
        self._synced = (run, version)

    async def _push(self, policy: Policy, version: int) -> None:
        if self._sender is None:
            devices = {policy.device.type, *(about["device"] for about in self._abouts)}
            self._sender = Sender(
                self._servers, self.transfer_backend, devices, policy.device, self.deadline_s, self.group_host
            )
        dtypes = {about["dtype"] for about in self._abouts}
        dtype = getattr(torch, dtypes.pop()) if len(dtypes) == 1 else None
        try:
            async with asyncio.timeout(self.deadline_s):
                if policy.has_adapter:
                    config, adapter = adapter_weights(policy)
                    await self._sender.push(adapter.items(), dtype, config, version)
                else:
                    await self._sender.push(trained_weights(policy), dtype, None, version)
        except TimeoutError:
            names = ", ".join(server.name for server in self._servers)
            raise EngineFailed(
                f"weights did not reach the vLLM servers {names} within {_KEY}.deadline_s: {self.deadline_s:g} s"
            ) from None

    async def _check_version(self, server: Server) -> None:
        """EngineFailed where a worker holds other weights than those last synced."""
        for about in await server.rpc("balcap_about"):
            held = (about["run"], about["version"])
            if held == self._synced:
                continue
            if about["run"] is None:
                why = "it was started anew since"
            elif about["run"] != self._synced[0]:
                why = "another run has sent it its own: a server belongs to one run at a time"
            else:
                why = f"it is at version {about['version']}"
            raise EngineFailed(
                f"the vLLM server {server.name} does not hold the weights of version {self._synced[1]} that it was "
                f"sent: {why}"
            )

    # ── captions ─────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def generate(
        self,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        sampling: Sampling,
        finished: Finished | None = None,
    ) -> Rollouts:
        """See `RolloutEngine.generate`; tensors come back on the CPU."""
        policy, loop = self._policy, self._loop
        if policy is None or loop is None or self._synced[0] is None:
            raise RuntimeError("the rollout engine has no policy; call attach and sync first")
        seeds = image_seeds(draw_seed(), len(batch))
        stop_ids = stop_token_ids(policy)
        for server, about in zip(self._servers, self._abouts, strict=True):
            check_limits(server.name, about, batch, prompts, sampling)
        tokens: list[list[Tensor]] = [[] for _ in seeds]
        logps: list[list[Tensor]] = [[] for _ in seeds]
        arrived: queue.SimpleQueue[Drawn | None] = queue.SimpleQueue()
        work = self._sample(policy, batch, prompts, num_captions, sampling, seeds, arrived)
        future = loop.submit(work)
        future.add_done_callback(lambda _: arrived.put(None))
        try:
            while (drawn := arrived.get()) is not None:
                row, tokens[row], logps[row] = drawn
                if finished is not None:
                    texts = policy.encoder.texts([until_stop(t, stop_ids) for t in tokens[row]])
                    finished(row, texts)
            future.result()
        finally:
            future.cancel()
        self._calls += 1
        flat_tokens, flat_logps = (
            [t for group in tokens for t in group],
            [p for group in logps for p in group],
        )
        version = self._synced[1]  # as the workers reported
        return pack(policy.encoder, batch, flat_tokens, flat_logps, stop_ids, sampling.max_tokens, version)

    async def _sample(
        self,
        policy: Policy,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        sampling: Sampling,
        seeds: Sequence[int],
        arrived: queue.SimpleQueue[Drawn | None],
    ) -> None:
        """Put every image's captions into `arrived` as they come."""
        settings = chat_settings(policy, sampling, num_captions)
        model = ADAPTER if policy.has_adapter else None
        to_check = rows_to_check(self._calls, len(batch))
        slots = asyncio.Semaphore(self.concurrency)
        first = _rank() % len(self._servers)
        turn = [*self._servers[first:], *self._servers[:first]]  # ranks begin at different ones
        waiting = {server.name: 0 for server in turn}

        async def draw(row: int) -> None:
            async with slots:
                request = await asyncio.to_thread(
                    chat_request, settings, model, batch.images[row], batch.prompts[row], seeds[row]
                )
                server = min(turn, key=lambda server: server.busy)
                waiting[server.name] += 1
                answer = await server.complete(request)
                waiting[server.name] -= 1
            if row in to_check:
                check_prompt(
                    batch.sample_ids[row], answer["prompt_token_ids"], prompts.items[row]["input_ids"]
                )
            arrived.put((row, *chat_answer(answer, num_captions, server.name)))

        try:
            async with asyncio.timeout(self.deadline_s):
                # Before, lest stale captions are waited for; after, lest a server was started anew meanwhile.
                await all_of(self._check_version(server) for server in turn)
                await all_of(draw(row) for row in range(len(batch)))
                await all_of(self._check_version(server) for server in turn)
        except TimeoutError:
            silent = ", ".join(f"{name} ({n})" for name, n in waiting.items() if n) or ", ".join(waiting)
            raise EngineFailed(
                f"no answer within {_KEY}.deadline_s: {self.deadline_s:g} s from the vLLM servers (images) {silent}; "
                "raise it, or lower model.sampling.max_tokens, model.num_captions or data.batch_size; a server that "
                f"hangs: start it again with {START}"
            ) from None


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _of_all_ranks(value: T) -> list[T]:
    """What each rank passed in, by rank; all must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
