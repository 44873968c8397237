"""Rollouts with vLLM in the trainer's process, on the trainer's device."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from balcap.rollout.base import KEY, Drawn, EngineFailed, RolloutEngine, Sampling, check_init_args
from balcap.rollout.vllm.client import ADAPTER
from balcap.rollout.vllm.requests import (
    check_images,
    check_lengths,
    check_prompt,
    prompt_request,
    token_settings,
)
from balcap.rollout.vllm.start import end_groups, engine_arguments, free_memory, logprobs_mode, start
from balcap.rollout.vllm.weights import all_taken, trained_weights, weight_files
from balcap.rollout.vllm.worker import ADAPTER_ID
from balcap.types import CaptionBatch

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts

T = TypeVar("T")

_PASSED_ON = ("gpu_memory_utilization", "max_model_len", "tensor_parallel_size", "enforce_eager")
"""Settings that are vLLM's own."""

Request = tuple[dict[str, Any], dict[str, Any]]
"""vLLM's input for one image, and keyword arguments of ``SamplingParams``."""


@dataclass(eq=False)
class VLLMInProcess(RolloutEngine):
    """vLLM beside the policy: each rank has an engine on its own device, and weights move within the process.

    The engine starts with the first captions, because vLLM must be told when it starts which log-probs to return:
    those at the sampling temperature. At temperature 1 they are the exact ones of `Rollouts.sampler_logps`; at
    others banned tokens have no share in them, and with ``top_p`` below 1 neither have the tails. Sampling at another
    temperature later may start it again, which takes as long as the first time.

    vLLM draws from the random numbers of this process, which are seeded before each call from torch's CPU generator and
    are afterwards as they were: the same call of an engine that is set up alike draws the same captions.

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
        per_request_seeds: draw each caption from a seed of its own, whichever captions are sampled beside it, and
            however much memory the engine has for them. vLLM's older model runner (0.22 to 0.27) then draws caption by
            caption: two operators for each at every step, for 512 captions 1,024.
        options: more keyword arguments of ``vllm.LLM``, such as ``quantization``; they override those that follow
            from the policy. A policy with 4-bit weights is sampled with 4-bit weights (``quantization: bitsandbytes``)
            on a GPU, and in its dtype on a CPU.
    """

    gpu_memory_utilization: float = 0.4
    max_model_len: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    sleep: bool = True
    deadline_s: float = 600.0
    per_request_seeds: bool = False
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        share, longest, ranks = self.gpu_memory_utilization, self.max_model_len, self.tensor_parallel_size
        sound = {
            f"gpu_memory_utilization: {share} is outside (0, 1]": 0 < share <= 1,
            f"max_model_len: {longest} must be at least 1": longest is None or longest >= 1,
            f"tensor_parallel_size: {ranks} must be at least 1": ranks >= 1,
            f"deadline_s: {self.deadline_s} must be above 0": self.deadline_s > 0,
        }
        check_init_args(sound)
        super().__init__()
        self._llm: Any = None
        self._mode = ""
        self._had_distributed = self._asleep = False

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────

    def sync(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine.sync`. Before the first captions there is no engine yet: it gets the weights then."""
        super().sync(policy, version)
        if self._llm is not None:
            with _own_precision(policy):
                self._send(policy)

    def close(self) -> None:
        if self._llm is not None:
            end_groups(self._had_distributed, self._llm)
            self._llm = None
            free_memory()

    def _start(self, policy: Policy, temperature: float) -> None:
        """An engine whose log-probs are those at this temperature, awake."""
        mode = logprobs_mode(temperature)
        if self._mode != mode:
            self.close()
        if self._llm is None:
            self._had_distributed, size = dist.is_initialized(), self.tensor_parallel_size
            world = dist.get_world_size() if self._had_distributed else 1
            if world % size:
                raise EngineFailed(
                    f"{KEY}.tensor_parallel_size: {size} does not divide the run's ranks, {world}; change it or "
                    "trainer.devices, or spread the model over devices of its own with balcap.rollout.VLLMServer"
                )
            settings = {name: getattr(self, name) for name in _PASSED_ON}
            settings |= {"enable_sleep_mode": self._sleeps(policy), **(self.options or {})}
            arguments = engine_arguments(policy, temperature, self.dtype, settings)
            self._llm, self._mode, self._asleep = start(policy, arguments), mode, False
            self._send(policy)
        self._wake()

    def _sleeps(self, policy: Policy) -> bool:
        return self.sleep and policy.device.type == "cuda"

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # what the trainer has freed must be the device's again
            self._llm.wake_up()
            self._asleep = False

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────

    def _send(self, policy: Policy) -> None:
        """The policy's weights to the engine."""
        self._wake()
        try:
            if policy.has_adapter:
                with weight_files(policy, None) as folder:
                    self._llm.collective_rpc("balcap_load_adapter", args=(folder, self._version))
            else:
                with all_taken(trained_weights(policy)) as weights:
                    self._llm.collective_rpc("balcap_load", args=(weights, self._version))
        # Names, shapes and memory all end here, in errors of many kinds.
        except Exception as error:
            raise EngineFailed(
                f"vLLM did not take the weights of version {self._version}: {error}"
            ) from error

    def _forget(self) -> None:
        """Nothing is left that was computed from older weights, or for an earlier call, which would change what is
        scheduled together, and so what is drawn."""
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _check_version(self) -> None:
        """EngineFailed where the engine itself reports other weights than those last synced."""
        (held, *_) = (about["version"] for about in self._llm.collective_rpc("balcap_about"))
        if held != self._version:
            raise EngineFailed(
                f"vLLM holds weights of version {held}, the policy is at {self._version}: captions would be "
                "another policy's. The last weight sync did not reach it; resume with --ckpt_path last"
            )

    # ── captions ─────────────────────────────────────────────────────────────────────────────────────

    def _draw(
        self, policy: Policy, batch: CaptionBatch, prompts: Prompts, num_captions: int, sampling: Sampling
    ) -> Generator[Drawn]:
        settings = token_settings(policy, sampling, num_captions, len(batch), self.per_request_seeds)
        seed = int(torch.randint(2**62, ()))
        inputs = [*map(prompt_request, prompts.unexpanded, batch.images)]
        requests = list(zip(inputs, settings, strict=True))
        with _own_precision(policy):
            self._start(policy, sampling.temperature)
            self._check_version()
            config = self._llm.llm_engine.model_config
            most, limit = config.multimodal_config.get_limit_per_prompt("image"), config.max_model_len
            check_images(batch, most, "vLLM", f"set {KEY}.options.limit_mm_per_prompt to")
            key = f"{KEY}.max_model_len (null: the model's own)"
            check_lengths(batch, prompts, sampling.max_tokens, limit, "vLLM", key)
            parts = self._of_all_ranks(requests)
            place = dist.get_rank() % len(parts) if len(parts) > 1 else 0  # of this rank among them
            first = sum(map(len, parts[:place]))
            self._forget()
            with (
                _drawing(self._of_all_ranks(seed)[0], policy.device),  # ranks that share an engine draw alike
                closing(self._outputs([*chain(*parts)], policy.has_adapter)) as outputs,
            ):
                for index, output in outputs:
                    row = index - first
                    if 0 <= row < len(requests):  # else another rank's
                        own = prompts.items[row]["input_ids"]
                        check_prompt(batch.sample_ids[row], output.prompt_token_ids, own)
                        captions = sorted(output.outputs, key=lambda caption: caption.index)
                        tokens = [torch.tensor(caption.token_ids) for caption in captions]
                        yield row, tokens, [*map(_logps, captions)]
            if self._sleeps(policy):
                self._llm.sleep(level=1)  # weights to the host, the KV cache nowhere
                self._asleep = True

    def _of_all_ranks(self, mine: T) -> list[T]:
        """What each of the consecutive ranks that share this engine gives, in their order."""
        if self.tensor_parallel_size == 1:
            return [mine]
        from vllm.distributed.parallel_state import get_tp_group

        everyones: list[Any] = [None] * self.tensor_parallel_size
        dist.all_gather_object(everyones, mine, group=get_tp_group().cpu_group)
        return everyones

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
        adapter = LoRARequest(ADAPTER, ADAPTER_ID, "in memory") if has_adapter else None
        waiting: dict[str, int] = {}
        try:
            ids = self._llm.enqueue(prompts, params, lora_request=adapter, use_tqdm=False)
            # Newer versions append a random part to the id that outputs carry.
            waiting |= {str(request_id).split("-")[0]: index for index, request_id in enumerate(ids)}
            while waiting:
                if any(self._of_all_ranks(time.monotonic() > deadline)):
                    raise EngineFailed(
                        f"vLLM has captioned {len(requests) - len(waiting)} of {len(requests)} images after "
                        f"{self.deadline_s:g} s; raise {KEY}.deadline_s, or lower model.sampling.max_tokens, "
                        "model.num_captions or data.batch_size"
                    )
                for output in (output for output in engine.step() if output.finished):
                    yield waiting.pop(output.request_id), output
        except EngineFailed:
            raise
        # It fails in as many ways as a model can; none of them leaves an engine to go on with.
        except Exception as error:
            raise EngineFailed(
                f"vLLM failed while sampling: {type(error).__name__}: {error}. Out of memory: lower "
                f"{KEY}.gpu_memory_utilization or data.batch_size. On a CPU, which cannot split prompts (`does not "
                f"use offset`): set {KEY}.max_model_len to at most 32768. Else see VLLM_LOGGING_LEVEL=INFO"
            ) from error
        finally:
            if waiting:
                engine.abort_request(list(waiting))


def _own_precision(policy: Policy) -> torch.autocast:
    """vLLM computes in its own dtype; a training step of ``bf16-mixed`` would cast its operators, too."""
    return torch.autocast(policy.device.type, enabled=False)


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """What vLLM draws comes from `seed`; the trainer, in the same process, goes on with its own numbers.

    Without a seed in a request vLLM's older model runner draws from torch's generator of the device, and the newer one
    (0.32 on a GPU) takes the request's seed from NumPy.
    """
    numpy_state = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def _logps(caption: Any) -> Tensor:
    """``[t]`` log-probs of a caption's tokens; vLLM gives a dict for each, with the sampled token in it."""
    pairs = zip(caption.token_ids, caption.logprobs, strict=True)
    return torch.tensor([step[token].logprob for token, step in pairs])
