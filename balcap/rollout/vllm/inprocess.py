"""Rollouts with vLLM in the trainer's process, on the trainer's device."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm.client import KEY
from balcap.rollout.vllm.engine import Group, VLLMEngine, check_lengths
from balcap.rollout.vllm.requests import prompt_request, token_settings
from balcap.rollout.vllm.start import end, engine_arguments, logprobs_mode, start
from balcap.rollout.vllm.weights import trained_weights, weight_files
from balcap.rollout.vllm.worker import ADAPTER_ID
from balcap.types import CaptionBatch

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts

Request = tuple[dict[str, Any], dict[str, Any]]
"""vLLM's input for one image, and keyword arguments of ``SamplingParams``."""


class Ranks:
    """The consecutive ranks that share one engine by tensor parallelism; with `size` 1 there is nothing to share.

    Every rank of them takes the same requests, in the same order, and the same steps.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def union(self, mine: list[Request]) -> tuple[list[Request], int]:
        """The requests of all these ranks, and where among them this rank's own begin."""
        if self.size == 1:
            return mine, 0
        everyone: list[list[Request]] = [[]] * self.size
        dist.all_gather_object(everyone, mine, group=self._group().cpu_group)
        before = everyone[: self._group().rank_in_group]
        return list(chain(*everyone)), sum(map(len, before))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any of these ranks."""
        if self.size == 1:
            return flag
        most = torch.tensor([float(flag)])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group().cpu_group)
        return bool(most)

    @staticmethod
    def _group() -> Any:
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group()


class VLLMInProcess(VLLMEngine):
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
        problems = []
        if not 0 < gpu_memory_utilization <= 1:
            problems.append(f"{KEY}.gpu_memory_utilization: {gpu_memory_utilization} is outside (0, 1]")
        if max_model_len is not None and max_model_len < 1:
            problems.append(f"{KEY}.max_model_len: {max_model_len} must be at least 1")
        if tensor_parallel_size < 1:
            problems.append(f"{KEY}.tensor_parallel_size: {tensor_parallel_size} must be at least 1")
        if not deadline_s > 0:
            problems.append(f"{KEY}.deadline_s: {deadline_s} must be above 0")
        if problems:
            raise ValueError("; ".join(problems))
        super().__init__()
        self.settings: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
        }
        self.dtype, self.sleep, self.deadline_s, self.options = dtype, sleep, deadline_s, options or {}
        self._ranks = Ranks(tensor_parallel_size)
        self._llm: Any = None
        self._mode = ""
        self._had_distributed = False
        self._asleep: set[str] = set()

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

    def _start(self, policy: Policy, temperature: float) -> None:
        """An engine whose log-probs are those at this temperature, awake."""
        mode = logprobs_mode(temperature)
        if self._llm is not None and self._mode != mode:
            self.close()
        if self._llm is None:
            world = dist.get_world_size() if dist.is_initialized() else 1
            if world % self._ranks.size:
                raise EngineFailed(
                    f"{KEY}.tensor_parallel_size: {self._ranks.size} does not divide the run's ranks, {world}; change "
                    "it or trainer.devices, or spread the model over devices of its own with balcap.rollout.VLLMServer"
                )
            settings = self.settings | {"enable_sleep_mode": self._sleeps(policy)}
            arguments = engine_arguments(policy, temperature, self.dtype, settings | self.options)
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

    def _sleep(self, policy: Policy) -> None:
        if self._sleeps(policy):
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────

    def _send(self, policy: Policy) -> None:
        """The policy's weights to the engine, and nothing left that was computed from older ones."""
        self._wake("weights")
        try:
            if policy.has_adapter:
                with weight_files(policy, None) as folder:
                    self._llm.collective_rpc("balcap_load_adapter", args=(folder, self._version))
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

    def _check_version(self) -> None:
        """EngineFailed where the engine itself reports other weights than those last synced."""
        held = self._llm.collective_rpc("balcap_version")
        if set(held) != {self._version}:
            raise EngineFailed(
                f"vLLM holds weights of version {held[0]}, the policy is at {self._version}: captions would be "
                "another policy's. The last weight sync did not reach it; resume with --ckpt_path last"
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
        rows = zip(prompts.items, batch.images, seeds, strict=True)
        requests = [
            (prompt_request(item, image, prompts.image_token_id), token_settings(policy, settings, seed))
            for item, image, seed in rows
        ]
        with _own_precision(policy):
            self._start(policy, settings["temperature"])
            self._check_version()
            limit = self._llm.llm_engine.model_config.max_model_len
            key = f"{KEY}.max_model_len (null: the model's own)"
            check_lengths(batch, prompts, settings, limit, "vLLM", key)
            everyones, first = self._ranks.union(requests)
            with closing(self._outputs(everyones, policy.has_adapter)) as outputs:
                for index, output in outputs:
                    if 0 <= index - first < len(requests):  # else another rank's
                        captions = sorted(output.outputs, key=lambda caption: caption.index)
                        tokens = [torch.tensor(caption.token_ids) for caption in captions]
                        yield index - first, output.prompt_token_ids, tokens, [*map(_logps, captions)]
            self._sleep(policy)

    def _outputs(self, requests: list[Request], has_adapter: bool) -> Generator[tuple[int, Any]]:
        """Index of a request and vLLM's ``RequestOutput``, when all its captions are complete.

        Whatever happens, no request is left in the engine.

        Raises:
            EngineFailed: too slow, or vLLM failed.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        deadline, engine = time.monotonic() + self.deadline_s, self._llm.llm_engine
        prompts, params = [prompt for prompt, _ in requests], [SamplingParams(**how) for _, how in requests]
        adapter = LoRARequest("balcap", ADAPTER_ID, "in memory") if has_adapter else None
        waiting: dict[str, int] = {}
        try:
            with _failures_explained():
                ids = self._llm.enqueue(prompts, params, lora_request=adapter, use_tqdm=False)
            # Newer versions append a random part to the id that outputs carry.
            waiting |= {str(request_id).split("-")[0]: index for index, request_id in enumerate(ids)}
            while engine.has_unfinished_requests() and not self._ranks.any(time.monotonic() > deadline):
                with _failures_explained():
                    outputs = engine.step()
                for output in (output for output in outputs if output.finished):
                    yield waiting.pop(output.request_id), output
            if waiting:
                raise EngineFailed(
                    f"vLLM has captioned {len(requests) - len(waiting)} of {len(requests)} images after "
                    f"{self.deadline_s:g} s; raise {KEY}.deadline_s, or lower model.sampling.max_tokens, "
                    "model.num_captions or data.batch_size"
                )
        finally:
            if waiting:
                engine.abort_request(list(waiting))


@contextmanager
def _failures_explained() -> Iterator[None]:
    """EngineFailed where vLLM fails, in as many ways as a model can; none of them leaves an engine to go on with."""
    try:
        yield
    except Exception as error:
        if "does not use offset" in str(error):  # see balcap.rollout.vllm.start.whole_prompts
            advice = f"On a CPU it cannot split prompts: set {KEY}.max_model_len to at most 32768"
        else:
            advice = f"Out of memory: lower {KEY}.gpu_memory_utilization or data.batch_size"
        raise EngineFailed(
            f"vLLM failed while sampling: {type(error).__name__}: {error}. {advice}; else see VLLM_LOGGING_LEVEL=INFO"
        ) from error


def _own_precision(policy: Policy) -> torch.autocast:
    """vLLM computes in its own dtype; a training step of ``bf16-mixed`` would cast its operators, too."""
    return torch.autocast(policy.device.type, enabled=False)


def _logps(caption: Any) -> Tensor:
    """``[t]`` log-probs of a caption's tokens; vLLM gives a dict for each, with the sampled token in it."""
    pairs = zip(caption.token_ids, caption.logprobs, strict=True)
    return torch.tensor([step[token].logprob for token, step in pairs])
