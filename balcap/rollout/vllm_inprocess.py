"""Rollouts with vLLM in the trainer's process, on the trainer's device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from balcap.rollout.base import EngineFailed, Finished, Sampling
from balcap.rollout.packing import pack, stop_token_ids, until_stop
from balcap.rollout.vllm_common import (
    check_prompt,
    collapse,
    draw_seed,
    image_seeds,
    logprobs_mode,
    rows_to_check,
    sampling_settings,
)
from balcap.rollout.vllm_requests import KEY, Ranks, Request, check_lengths, run
from balcap.rollout.vllm_start import end, engine_arguments, start
from balcap.rollout.weights import adapter_weights, trained_weights
from balcap.types import CaptionBatch, Rollouts

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts


class VLLMInProcess:
    """vLLM beside the policy: each rank has an engine on its own device, and weights move within the process.

    The engine starts with the first captions, because vLLM must be told when it starts which log-probs to return:
    those at the sampling temperature. At temperature 1 they are the exact ones of `Rollouts.sampler_logps`; at
    others banned tokens have no share in them, and with ``top_p`` below 1 neither have the tails. Sampling at another
    temperature later may start it again, which takes as long as the first time.

    Args:
        gpu_memory_utilization: share of the device's memory for the engine: weights, KV cache and activations; the
            trainer's own come on top. On a CPU the environment variable VLLM_CPU_KVCACHE_SPACE (GiB) decides.
        max_model_len: longest prompt and caption together, in tokens; null: the model's own limit. Lower it where
            the KV cache does not fit.
        dtype: of the engine's weights; ``auto``: the policy's own. Policies with float32 weights that train under
            ``bf16-mixed`` sample faster in ``bfloat16``.
        tensor_parallel_size: consecutive ranks that share one engine: each holds a part of its weights, and together
            they caption the images of all of them. 1: each rank has an engine of its own.
        enforce_eager: no CUDA graphs and no compilation: a faster start, slower captions.
        sleep: give the device's memory back while the policy updates, weights to the host's memory. Without effect
            on a CPU.
        deadline_s: seconds after which captions are given up. Looked at between steps of the engine: a step that
            hangs is not noticed.
        options: more keyword arguments of ``vllm.LLM``, such as ``quantization``; they override those that follow
            from the policy.
    """

    exact = False

    def __init__(
        self,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        sleep: bool = True,
        deadline_s: float = 600.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        found = []
        if not 0 < gpu_memory_utilization <= 1:
            found.append(f"{KEY}.gpu_memory_utilization: {gpu_memory_utilization} is outside (0, 1]")
        if max_model_len is not None and max_model_len < 1:
            found.append(f"{KEY}.max_model_len: {max_model_len} must be at least 1")
        if tensor_parallel_size < 1:
            found.append(f"{KEY}.tensor_parallel_size: {tensor_parallel_size} must be at least 1")
        if deadline_s <= 0:
            found.append(f"{KEY}.deadline_s: {deadline_s} must be above 0")
        if found:
            raise ValueError("; ".join(found))
        self.settings: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
        }
        self.dtype, self.sleep, self.deadline_s, self.options = dtype, sleep, deadline_s, options or {}
        self._ranks = Ranks(tensor_parallel_size)
        self._policy: Policy | None = None
        self._version = -1  # last synced
        self._llm: Any = None
        self._mode = ""
        self._had_distributed = False
        self._asleep: set[str] = set()
        self._calls = 0

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def attach(self, policy: Policy) -> None:
        self._policy = policy

    def sync(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine.sync`. Before the first captions there is no engine yet: it gets the weights then."""
        self._policy, self._version = policy, version
        if self._llm is not None:
            with _own_precision(policy):
                self._send(policy)

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            end(llm, self._had_distributed)

    def _start(self, policy: Policy, mode: str) -> None:
        """An engine with this ``logprobs_mode``, awake."""
        if self._llm is not None and self._mode != mode:
            self.close()
        if self._llm is None:
            self._ranks.check()
            settings = self.settings | {"enable_sleep_mode": self._sleeps(policy)}
            arguments = engine_arguments(policy, mode, self.dtype, settings | self.options)
            self._had_distributed = dist.is_initialized()
            self._llm, self._mode, self._asleep = start(policy, arguments), mode, set()
            self._send(policy)
        self._wake("weights", "kv_cache")

    def _sleeps(self, policy: Policy) -> bool:
        return self.sleep and policy.device.type == "cuda"

    def _wake(self, *what: str) -> None:
        needed = [tag for tag in what if tag in self._asleep]
        if needed:
            torch.cuda.empty_cache()  # what the trainer has freed must be the device's again
            self._llm.wake_up(tags=needed)
            self._asleep -= set(needed)

    def _rest(self, policy: Policy) -> None:
        if self._sleeps(policy):
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────

    def _send(self, policy: Policy) -> None:
        """The policy's weights to the engine, and nothing left that was computed from older ones."""
        self._wake("weights")
        try:
            if policy.has_adapter:
                self._llm.collective_rpc("balcap_adapter", args=(*adapter_weights(policy), self._version))
            else:
                self._llm.collective_rpc("balcap_load", args=(trained_weights(policy), self._version))
        # Names, shapes and memory all end here, in errors of many kinds.
        except Exception as error:
            raise EngineFailed(
                f"vLLM did not take the weights of version {self._version}: {error}"
            ) from error
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _held_version(self) -> int:
        """That the engine itself reports. EngineFailed where it is not the one last synced."""
        held = self._llm.collective_rpc("balcap_version")
        if set(held) != {self._version}:
            raise EngineFailed(
                f"vLLM holds weights of version {held[0]}, the policy is at {self._version}: captions would be "
                "another policy's. The last weight sync did not reach it; resume with --ckpt_path last"
            )
        return int(held[0])

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
        policy = self._policy
        if policy is None or self._version < 0:
            raise RuntimeError("the rollout engine has no policy; call attach and sync first")
        requests = self._requests(policy, batch, prompts, num_captions, sampling)
        with _own_precision(policy):
            self._start(policy, logprobs_mode(sampling.temperature))
            version = self._held_version()
            check_lengths(self._llm, requests, [item["input_ids"].shape[1] for item in prompts.items])
            drawn = self._captions(policy, requests, prompts, finished)
            self._calls += 1
            self._rest(policy)
        tokens = [torch.tensor(one.token_ids) for group in drawn for one in group]
        logps = [_sampled_logps(one) for group in drawn for one in group]
        stop_ids = stop_token_ids(policy)
        return pack(policy.encoder, batch, tokens, logps, stop_ids, sampling.max_tokens, version)

    def _requests(
        self, policy: Policy, batch: CaptionBatch, prompts: Prompts, num_captions: int, sampling: Sampling
    ) -> list[Request]:
        rows = zip(
            batch.sample_ids, prompts.items, batch.images, image_seeds(draw_seed(), len(batch)), strict=True
        )
        return [
            Request(
                sample_id,
                collapse(item["input_ids"], prompts.image_token_id),
                image,
                sampling_settings(policy, sampling, num_captions, seed),
            )
            for sample_id, item, image, seed in rows
        ]

    def _captions(
        self, policy: Policy, requests: list[Request], prompts: Prompts, finished: Finished | None
    ) -> list[list[Any]]:
        """vLLM's ``CompletionOutput`` of every caption of this rank, ``[B][G]``."""
        everyones, first = self._ranks.union(requests)
        to_check = rows_to_check(self._calls, len(requests))
        drawn: list[list[Any]] = [[] for _ in requests]

        def complete(index: int, output: Any) -> None:
            row = index - first
            if not 0 <= row < len(requests):
                return  # another rank's
            if row in to_check:
                check_prompt(
                    requests[row].sample_id, output.prompt_token_ids, prompts.items[row]["input_ids"]
                )
            drawn[row] = sorted(output.outputs, key=lambda one: one.index)
            if finished is not None:
                stop_ids = requests[row].settings["stop_token_ids"]
                kept = [until_stop(torch.tensor(one.token_ids), stop_ids) for one in drawn[row]]
                finished(row, policy.encoder.texts(kept))

        run(self._llm, everyones, policy.has_adapter, self.deadline_s, self._ranks, complete)
        return drawn


def _own_precision(policy: Policy) -> torch.autocast:
    """vLLM computes in its own dtype; a training step of ``bf16-mixed`` would cast its operators, too."""
    return torch.autocast(policy.device.type, enabled=False)


def _sampled_logps(one: Any) -> Tensor:
    """``[t]`` log-probs of a caption's tokens; vLLM gives a dict for each, with the sampled token in it."""
    pairs = zip(one.token_ids, one.logprobs, strict=True)
    return torch.tensor([step[token].logprob for token, step in pairs])
