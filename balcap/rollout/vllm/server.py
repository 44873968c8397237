"""Rollouts with vLLM servers on other GPUs or hosts (``vllm serve``)."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Coroutine, Generator
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from balcap.rollout.base import KEY, Drawn, EngineFailed, RolloutEngine, Sampling, check_init_args
from balcap.rollout.vllm.client import CHAT, START, Server, all_of
from balcap.rollout.vllm.requests import (
    chat_answer,
    chat_request,
    chat_settings,
    check_images,
    check_lengths,
    check_prompt,
)
from balcap.rollout.vllm.start import NCCL_FLAG, check_fits, logprobs_mode
from balcap.rollout.vllm.weights import NCCLTransfer, push_files, weight_files
from balcap.types import CaptionBatch
from balcap.utils.loop import process_loop
from balcap.utils.redact import keep_secret

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts


@dataclass(eq=False)
class VLLMServer(RolloutEngine):
    """vLLM servers sample; the trainer sends them its weights after every update.

    Start each with ``python main.py serve --config <the run's config>``; it belongs to one run at a time. With several
    trainer ranks each sends its own images to all servers, and rank 0 the weights. Prompts are compared with the
    trainer's, and the version of the weights on each call.

    Log-probs are exact at temperature 1. At others banned tokens have no share in them, and with ``top_p`` below 1
    neither have the tails (`balcap.rollout.vllm.start.logprobs_mode`).

    Args:
        urls: of the servers, such as ``[http://host:8000]``.
        transfer_backend: how the weights of full tuning travel: ``nccl`` from GPU to GPU, by vLLM's own transfer;
            ``folder`` as files; ``auto`` takes NCCL where all are on CUDA devices and the servers were started for it.
            Adapters, and weights of a policy that is sharded over ranks, are files always.
        weights_folder: for these files; trainer and servers see it under the same path. null: a temporary folder of
            this machine, which is enough for servers on it.
        deadline_s: seconds after which captions, or a transfer of weights, are given up.
        start_timeout_s: seconds to wait for servers that are still starting.
        api_key_env: environment variable with the key that the servers ask for (their ``--api-key``).
        group_host: address of this machine that servers reach it by (NCCL); null: the one that vLLM finds.
        concurrency: images that each rank has under way at once, over all servers.
        per_request_seeds: send a seed for each image, from torch's CPU generator: a run that is resumed, or repeated,
            draws the same captions, as far as the servers round alike. Without, servers draw from their own numbers:
            no draw is repeatable. vLLM's older model runner (0.22 to 0.27) then draws caption by caption: two operators
            for each at every step.
    """

    own_device = False

    urls: list[str]
    transfer_backend: Literal["auto", "nccl", "folder"] = "auto"
    weights_folder: str | None = None
    deadline_s: float = 600.0
    start_timeout_s: float = 600.0
    api_key_env: str | None = None
    group_host: str | None = None
    concurrency: int = 64
    per_request_seeds: bool = False

    def __post_init__(self) -> None:
        bad = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        credentials = any("@" in url.split("/")[2:3][0] for url in self.urls if url not in bad)
        once = 0 < len(self.urls) == len(set(self.urls))
        sound = {
            f"urls: {self.urls} must name at least one server, and each once": once,
            f"urls: {bad} must begin with http:// or https://": not bad,
            "urls: a user and password in a URL end up in files and messages; servers take a key, which stands in "
            "the environment and is named by api_key_env": not credentials,
            f"deadline_s: {self.deadline_s} must be above 0": self.deadline_s > 0,
            f"start_timeout_s: {self.start_timeout_s} must be above 0": self.start_timeout_s > 0,
            f"concurrency: {self.concurrency} must be above 0": self.concurrency > 0,
        }
        check_init_args(sound)
        super().__init__()
        self._servers: list[Server] = []
        self._nccl: NCCLTransfer | None = None
        self._run_id = ""

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, policy: Policy) -> None:
        """See `RolloutEngine.attach`. Waits for the servers, and checks that they fit the policy."""
        ids = [uuid.uuid4().hex]
        if dist.is_initialized():
            dist.broadcast_object_list(ids)
        if self.api_key_env:
            keep_secret([self.api_key_env])
        key = os.environ.get(self.api_key_env or "")
        if self.api_key_env and not key:
            raise EngineFailed(f"{KEY}.api_key_env: the environment variable {self.api_key_env} is not set")
        self._run_id, self._servers = ids[0], [Server(url, key) for url in self.urls]
        process_loop().run(all_of(self._meet(server, policy) for server in self._servers))

    async def _meet(self, server: Server, policy: Policy) -> None:
        await server.wait_until_up(self.start_timeout_s)
        server.about, *_ = await server.rpc("balcap_about")
        served = [model["id"] for model in await server.models() if not model.get("parent")]
        check_fits(f"the vLLM server {server.name}", server.about, served, policy)

    def close(self) -> None:
        """See `RolloutEngine.close`. The servers go on, for the next run."""
        super().close()
        self._servers, self._nccl = [], None

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """TimeoutError after `deadline_s`."""
        process_loop().run(asyncio.wait_for(work, self.deadline_s))

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────

    def sync(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine.sync`. No request may be under way."""
        if _rank() == 0 or policy.is_sharded:
            try:
                self._send(policy, version)
            except TimeoutError:
                names = ", ".join(server.name for server in self._servers)
                raise EngineFailed(
                    f"weights did not reach the vLLM servers {names} within {KEY}.deadline_s: {self.deadline_s:g} s"
                ) from None
            except OSError as error:
                raise EngineFailed(f"{KEY}.weights_folder: weights cannot be written: {error}") from None
        super().sync(policy, version)

    def _send(self, policy: Policy, version: int) -> None:
        """The weights of all ranks; rank 0 hands them over."""
        if self._uses_nccl(policy):
            self._run(self._push(policy, version))
            return
        with weight_files(policy, self.weights_folder, keep=_rank() == 0) as folder:
            if folder:
                self._run(self._push(policy, version, folder))

    async def _push(self, policy: Policy, version: int, folder: str = "") -> None:
        """From a folder, or by NCCL."""
        held = f"{self._run_id}-{version}"
        if folder:
            await push_files(self._servers, folder, policy.has_adapter, held)
        else:
            self._nccl = self._nccl or NCCLTransfer(self._servers, self.group_host)
            await self._nccl.push(policy, held)
        await self._check_versions(version)
        if policy.has_adapter:
            await all_of(server.add_adapter() for server in self._servers)
        await all_of(server.reset_caches() for server in self._servers)

    def _uses_nccl(self, policy: Policy) -> bool:
        abouts = [server.about for server in self._servers]
        devices = {policy.device.type, *(about["device"] for about in abouts)}
        ready = devices == {"cuda"} and all(about["weight_transfer"] == "nccl" for about in abouts)
        if self.transfer_backend == "nccl" and not ready:
            raise EngineFailed(
                f"{KEY}.transfer_backend: NCCL needs CUDA devices on both sides, here are {sorted(devices)}, and "
                f"servers that were started with --weight-transfer-config '{NCCL_FLAG}'; use auto or folder"
            )
        by_files = self.transfer_backend == "folder" or policy.has_adapter or policy.is_sharded
        return ready and not by_files

    async def _check_versions(self, version: int) -> None:
        """EngineFailed where a worker holds other weights than those of this run and version."""
        abouts = await all_of(server.rpc("balcap_about") for server in self._servers)
        for server, workers in zip(self._servers, abouts, strict=True):
            for held in {about["version"] for about in workers} - {f"{self._run_id}-{version}"}:
                if held is None:
                    why = "it was started anew since"
                elif held.startswith(self._run_id):
                    why = f"it is at version {held.rpartition('-')[2]}"
                else:
                    why = "another run has sent it its own: a server belongs to one run at a time"
                raise EngineFailed(
                    f"the vLLM server {server.name} does not hold the weights of version {version} that it was sent: "
                    f"{why}"
                )

    # ── captions ─────────────────────────────────────────────────────────────────────────────────────

    def _draw(
        self, policy: Policy, batch: CaptionBatch, prompts: Prompts, num_captions: int, sampling: Sampling
    ) -> Generator[Drawn]:
        self._check_limits(batch, prompts, sampling)
        settings = chat_settings(policy, sampling, num_captions, len(batch), self.per_request_seeds)
        slots = asyncio.Semaphore(self.concurrency)
        first = _rank() % len(self._servers)
        turn = [*self._servers[first:], *self._servers[:first]]  # ranks begin at different ones
        waiting = {server.name: 0 for server in turn}

        async def ask(row: int) -> Drawn:
            async with slots:
                images = batch.images[row]
                content = policy.encoder.content(batch.prompts[row], len(images))
                request = await asyncio.to_thread(chat_request, settings[row], content, images)
                server = min(turn, key=lambda server: waiting[server.name])
                waiting[server.name] += 1
                answer = await server.ask(CHAT, request)
                waiting[server.name] -= 1
            prompt_ids, tokens, logps = chat_answer(answer, num_captions, server.name)
            check_prompt(batch.sample_ids[row], prompt_ids, prompts.items[row]["input_ids"])
            return row, tokens, logps

        asked = []
        try:
            # Before, lest stale captions are waited for; after, lest a server was started anew meanwhile.
            self._run(self._check_versions(self._version))
            asked = [process_loop().submit(ask(row)) for row in range(len(batch))]
            for answered in as_completed(asked, self.deadline_s):
                yield answered.result()
            self._run(self._check_versions(self._version))
        except TimeoutError:
            silent = ", ".join(f"{name} ({n})" for name, n in waiting.items() if n) or ", ".join(waiting)
            raise EngineFailed(
                f"no answer within {KEY}.deadline_s: {self.deadline_s:g} s from the vLLM servers (images) {silent}; "
                "raise it, or lower model.sampling.max_tokens, model.num_captions or data.batch_size; a server that "
                f"hangs: start it again with {START}"
            ) from None
        finally:
            for future in asked:
                future.cancel()

    def _check_limits(self, batch: CaptionBatch, prompts: Prompts, sampling: Sampling) -> None:
        """EngineFailed where a server was started for another temperature, fewer images or shorter captions."""
        mode = logprobs_mode(sampling.temperature)
        for server in self._servers:
            name, own = f"the vLLM server {server.name}", server.about["logprobs_mode"]
            if own != mode and sampling.temperature > 0:  # nobody learns from greedy captions
                raise EngineFailed(
                    f"{name} was started with --logprobs-mode {own}; with model.sampling.temperature: "
                    f"{sampling.temperature} it must be {mode}"
                )
            check_images(batch, server.about["images"], name, "start it with --limit-mm-per-prompt")
            limit = server.about["max_model_len"]
            check_lengths(batch, prompts, sampling.max_tokens, limit, name, "its --max-model-len")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
