"""Starting and ending vLLM inside the trainer's process, and leaving that process as it was.

What vLLM changes when it starts, beside building a model (seen with 0.32): it seeds the random numbers of Python,
NumPy and torch; sets environment variables (``LD_PRELOAD`` among them on a CPU); replaces ``torch.set_num_threads`` by
a function that does nothing, on a CPU; initialises ``torch.distributed`` where nobody has. All but the last is undone
at once, the last when the engine closes.
"""

from __future__ import annotations

import gc
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from balcap.rollout.base import EngineFailed
from balcap.rollout.vllm_common import mm_processor_kwargs

if TYPE_CHECKING:
    from balcap.policy.policy import Policy

EXTENSION = "balcap.rollout.vllm_worker.WeightSync"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be built for


def engine_arguments(policy: Policy, mode: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM`` that follow from the policy; `options` come on top and override them.

    Args:
        mode: ``logprobs_mode``.
        dtype: of the engine's weights; ``auto`` for the policy's own.
        options: of the user.
    """
    own = str(policy.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    arguments: dict[str, Any] = {
        "model": policy.source,
        "revision": policy.revision,
        "tokenizer_revision": policy.revision,
        "dtype": own if dtype == "auto" else dtype,
        "logprobs_mode": mode,
        "worker_extension_cls": EXTENSION,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "mm_processor_kwargs": mm_processor_kwargs(policy.encoder.processor) or None,
        "generation_config": "vllm",  # none of the sampling defaults that the hub ships
        # One executor for one device and for many: it takes the device from LOCAL_RANK, and shares the
        # torch.distributed that the trainer may have initialised.
        "distributed_executor_backend": "external_launcher",
        "seed": 0,
    }
    if policy.device.type == "cpu":
        arguments |= whole_prompts(policy, options.get("max_model_len"))
    if policy.has_adapter:
        arguments |= lora_arguments(policy)
    return arguments | options


def whole_prompts(policy: Policy, max_model_len: int | None) -> dict[str, Any]:
    """On a CPU: no prompt is split between two steps.

    Where one is, vLLM (0.32) turns its random numbers back, which those of a CPU do not know: a batch with more
    prompt tokens than a step takes would end in an error. A step must then have room for the longest sequence, so a
    limit beyond 32,768 tokens stays as it is.
    """
    longest = max_model_len or policy.model.config.get_text_config().max_position_embeddings
    if longest > 32768:
        return {}
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, longest)}


def lora_arguments(policy: Policy) -> dict[str, Any]:
    """Those that make room for the policy's adapter."""
    rank = policy.model.peft_config[policy.model.active_adapter].r
    room = next((size for size in LORA_RANKS if size >= rank), None)
    if room is None:
        raise EngineFailed(
            f"model.policy.lora.r: vLLM takes ranks up to {LORA_RANKS[-1]}, not {rank}; lower it, or sample with "
            "balcap.rollout.hf.HFGenerate"
        )
    arguments = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room}
    if not policy.vision_is_frozen:
        arguments["enable_tower_connector_lora"] = True
    return arguments


def start(policy: Policy, arguments: dict[str, Any]) -> Any:
    """A ``vllm.LLM`` on the policy's device, in this process.

    Raises:
        EngineFailed: it does not start; says what to change.
    """
    device = policy.device
    here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LOCAL_RANK": str(device.index or 0)}
    had_distributed = dist.is_initialized()
    if had_distributed:
        here |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    else:
        here |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with _process_as_it_was(device), _environment(here):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it says much, and most at every start
        try:
            from vllm import LLM
        except ImportError as error:
            raise EngineFailed(
                f"model.engine: vLLM cannot be imported ({error}); pip install 'balcap[vllm]', or sample with "
                "balcap.rollout.hf.HFGenerate"
            ) from error
        try:
            return LLM(**arguments)
        # Whatever stops a start (memory, an unknown model or option, a driver) is for the user to read.
        except Exception as error:
            _end_groups(had_distributed)
            raise EngineFailed(_why_not(policy, error)) from error


def _why_not(policy: Policy, error: Exception) -> str:
    key, said = "model.engine.init_args", str(error)
    said = said if len(said) < 600 else f"{said[:600]} ..."
    return (
        f"vLLM did not start for {policy.source} on {policy.device}: {type(error).__name__}: {said}. Out of memory: "
        f"the trainer's weights and gradients lie on the same device; lower {key}.gpu_memory_utilization or "
        f"{key}.max_model_len, or set {key}.enforce_eager. An unsupported model or option: see {key}.options, or "
        "sample with balcap.rollout.hf.HFGenerate. More of its log: VLLM_LOGGING_LEVEL=INFO"
    )


def end(llm: Any, had_distributed: bool) -> None:
    """Free what an engine holds. Safe on one that has failed.

    Args:
        llm: the ``vllm.LLM``; the caller must drop its own reference.
        had_distributed: torch.distributed was initialised before the engine, and stays.
    """
    with _groups_kept() if had_distributed else nullcontext():
        llm.llm_engine.engine_core.shutdown()
    _end_groups(had_distributed)
    del llm
    gc.unfreeze()  # vLLM froze what was alive when it started: its own model, too
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end_groups(had_distributed: bool) -> None:
    """The groups of torch.distributed that vLLM made, however far it came."""
    from vllm.distributed import parallel_state

    with _groups_kept() if had_distributed else nullcontext():
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@contextmanager
def _groups_kept() -> Iterator[None]:
    """vLLM ends all of torch.distributed when it ends (0.32); here only the groups that it made."""
    destroy = dist.destroy_process_group

    def only_a_part(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = only_a_part
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set these; afterwards everything is as before, but for vLLM's own variables, which it may read again."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if not name.startswith("VLLM_") or name in variables:
                del os.environ[name]
        os.environ.update({k: v for k, v in before.items() if not k.startswith("VLLM_") or k in variables})


@contextmanager
def _process_as_it_was(device: torch.device) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch, and torch's threads, are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
