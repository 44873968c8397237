"""What vLLM is started with; starting and ending it inside the trainer's process, which is left as it was.

What vLLM changes when it starts in process, beside building a model (seen with 0.32): it seeds the random numbers of Python,
NumPy and torch; sets environment variables (``LD_PRELOAD`` among them on a CPU); replaces ``torch.set_num_threads`` by
a function that does nothing, on a CPU; initialises ``torch.distributed`` where nobody has. All but the last is undone
at once, the last when the engine closes.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from balcap.rollout.base import KEY, EngineFailed, unsound
from balcap.rollout.vllm.client import EXTENSION, START

if TYPE_CHECKING:
    from balcap.policy.policy import Policy

NCCL_FLAG = '{"backend": "nccl"}'
"""Of ``--weight-transfer-config``: servers take weights from GPU to GPU."""

BITSANDBYTES = "bitsandbytes"
"""vLLM's name for 4-bit weights that it makes as it loads: NF4 in blocks of 64 with double quantisation, as the policy's."""

NO_BITSANDBYTES = (
    "model.policy.load_in_4bit is sampled with 4-bit weights, which vLLM has in a package of its own since 0.28: "
    "pip install vllm-bnb-plugin. Or sample over the base in eight bits, or in model.policy.dtype, with"
)

WHOLE_WEIGHTS = (
    "full tuning sends whole weights to the engine, which would have to quantise them anew after each update; set "
    "model.policy.lora, of which only the adapter is sent"
)
"""Why quantised engines are refused without an adapter."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM can be started for."""


# ── what vLLM is started with ────────────────────────────────────────────────────────────────────────


def logprobs_mode(temperature: float) -> str:
    """How vLLM must be started (``logprobs_mode``) so that its log-probs are those at the sampling temperature.

    ``raw_logprobs`` are before temperature, bans and top-p: exact at temperature 1. ``processed_logprobs`` are after
    all three: banned tokens have no share in them, and with top-p below 1 neither have the tails.
    """
    return "raw_logprobs" if temperature in (0, 1) else "processed_logprobs"


def mm_processor_kwargs(processor: Any) -> dict[str, Any]:
    """What makes vLLM's processor scale images as the trainer's does; empty where there is nothing to set.

    The image area limits of the trainer's processor may differ from those in the model folder
    (`model.policy.min_pixels`, `model.policy.max_pixels`).

    Args:
        processor: the trainer's HF processor.
    """
    size = dict(getattr(processor.image_processor, "size", None) or {})
    limits = {key: int(size[key]) for key in ("shortest_edge", "longest_edge") if size.get(key)}
    return {"size": limits} if len(limits) == 2 else {}


def launch_arguments(
    processor: Any, temperature: float, lora_rank: int | None, freeze_vision: bool
) -> dict[str, Any]:
    """Arguments that vLLM must be started with to sample for a policy, beside its name, as those of ``vllm.LLM``.

    Args:
        processor: the trainer's HF processor.
        temperature: of sampling.
        lora_rank: of the adapter; None without one.
        freeze_vision: the vision tower has no adapter.
    """
    arguments: dict[str, Any] = {
        "worker_extension_cls": EXTENSION,
        "logprobs_mode": logprobs_mode(temperature),
        "generation_config": "vllm",  # none of the sampling defaults that the hub ships
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "mm_processor_kwargs": mm_processor_kwargs(processor) or None,
    }
    if lora_rank is None:
        return arguments
    room = next((size for size in LORA_RANKS if size >= lora_rank), lora_rank)  # which vLLM would refuse
    arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    return arguments | ({} if freeze_vision else {"enable_tower_connector_lora": True})


def adapter_rank(policy: Policy) -> int | None:
    """Of the policy's LoRA adapter; None without one."""
    return policy.model.peft_config[policy.model.active_adapter].r if policy.has_adapter else None


def is_4bit(policy: Policy) -> bool:
    """Whether its base weights are in four bits (`model.policy.load_in_4bit`)."""
    return bool(getattr(policy.model, "is_loaded_in_4bit", False))


def engine_arguments(
    policy: Policy, temperature: float, dtype: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM`` that follow from the policy; `options` come on top and override them.

    Args:
        temperature: of sampling.
        dtype: of the engine's weights; ``auto`` for the policy's own.
        options: of the user.
    """
    arguments = launch_arguments(
        policy.encoder.processor, temperature, adapter_rank(policy), policy.vision_is_frozen
    )
    arguments |= {
        "model": policy.source,
        "revision": policy.revision,
        "tokenizer_revision": policy.revision,
        "dtype": policy.model.get_input_embeddings().weight.dtype if dtype == "auto" else dtype,
        # One executor for one device and for many: it takes the device from LOCAL_RANK, and shares the
        # torch.distributed that the trainer may have initialised.
        "distributed_executor_backend": "external_launcher",
        "seed": 0,
    }
    if policy.device.type == "cuda" and is_4bit(policy):
        arguments["quantization"] = BITSANDBYTES
    if policy.device.type == "cpu":
        arguments |= whole_prompts(policy, options.get("max_model_len"))
    return arguments | options


def whole_prompts(policy: Policy, max_model_len: int | None) -> dict[str, Any]:
    """On a CPU: no prompt is split between two steps.

    Where one is, vLLM (0.32) turns its random numbers back, which those of a CPU do not know: a batch with more
    prompt tokens than a step takes would end in an error. A step must then have room for the longest sequence, so a
    limit beyond 32,768 tokens stays as it is.
    """
    text = policy.model.config.get_text_config()
    longest = max_model_len or text.max_position_embeddings
    if longest > 32768:
        return {}
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, longest)}
    # Of recurrent layers it keeps prefixes only where it may split prompts.
    recurrent = {"linear_attention", "conv"} & set(getattr(text, "layer_types", None) or ())
    return whole | ({"enable_prefix_caching": False} if recurrent else {})


def check_fits(server: str, about: dict[str, Any], names: Sequence[str], policy: Policy) -> None:
    """EngineFailed where a server cannot sample for the policy; says which of its flags to change.

    Args:
        server: for messages.
        about: what its workers report (`balcap.rollout.vllm.worker.WeightSync.balcap_about`).
        names: under which it serves its model.
        policy: that is trained.
    """
    own, served = policy.source.rstrip("/"), {name.rstrip("/") for name in (about["model"], *names)}
    # Hosts keep the same folder in different places.
    same_model = own.rpartition("/")[2] in {name.rpartition("/")[2] for name in served}
    revision, parallel = about["revision"], about["data_parallel"]
    scaled, rank = mm_processor_kwargs(policy.encoder.processor), adapter_rank(policy)
    same_scale = not scaled or scaled["size"] == (about["mm_processor_kwargs"] or {}).get("size")
    fits = {
        f"serves {', '.join(sorted(served))}, but model.policy.model is {own}; start it with: {START}. If they are the "
        f"same model, start it with --served-model-name {own}": same_model,
        f"serves revision {revision}, but model.policy.revision is {policy.revision}; start it with --revision "
        f"{policy.revision}": not policy.revision or revision in (None, policy.revision),
        f"was started with --data-parallel-size {parallel}; start that many servers instead, and name them all in "
        f"{KEY}.urls": parallel == 1,
        "scales images otherwise than the trainer (model.policy.min_pixels, model.policy.max_pixels); start it with "
        f"--mm-processor-kwargs '{json.dumps(scaled)}'": same_scale,
        f"has no room for an adapter of rank {rank} (model.policy.lora.r); start it with --enable-lora --max-lora-rank "
        "of at least that": (about["max_lora_rank"] or 0) >= (rank or 0),
        f"was started with --quantization {about['quantization']}; {WHOLE_WEIGHTS}, or start it without": not (
            about["quantization"] and rank is None
        ),
    }
    if problems := unsound(fits):
        raise EngineFailed(f"{server} {'; it '.join(problems)}")


# ── in the trainer's process ─────────────────────────────────────────────────────────────────────────


def start(policy: Policy, arguments: dict[str, Any]) -> Any:
    """A ``vllm.LLM`` on the policy's device, in this process.

    Raises:
        EngineFailed: it does not start; says what to change.
    """
    from lightning.fabric.plugins.environments.lightning import find_free_network_port
    from lightning.pytorch.utilities.seed import isolate_rng

    device = policy.device
    here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LOCAL_RANK": str(device.index or 0)}
    had_distributed = dist.is_initialized()
    if had_distributed:
        here |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    else:
        here |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        here["MASTER_PORT"] = str(find_free_network_port())
    with isolate_rng(include_cuda=device.type == "cuda"), _process_kept(here):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it says much, and most at every start
        try:
            from vllm import LLM
        except ImportError as error:
            raise EngineFailed(
                f"model.engine: vLLM cannot be imported ({error}); pip install 'balcap[vllm]', or sample with "
                "balcap.rollout.HFGenerate"
            ) from error
        if arguments.get("quantization") == BITSANDBYTES and not has_bitsandbytes():
            raise EngineFailed(
                f"model.engine: {NO_BITSANDBYTES} {KEY}.options: {{quantization: fp8}}, or with null"
            )
        try:
            return LLM(**arguments)
        # Whatever stops a start (memory, an unknown model or option, a driver) is for the user to read.
        except Exception as error:
            end_groups(had_distributed)
            raise EngineFailed(_why_not(policy, error)) from error


def has_bitsandbytes() -> bool:
    """Whether vLLM can hold weights in four bits as bitsandbytes does. Imports vLLM."""
    return any(map(find_spec, ("vllm_bnb_plugin", "vllm.model_executor.layers.quantization.bitsandbytes")))


def _why_not(policy: Policy, error: Exception) -> str:
    said = shorten(str(error), 600, placeholder=" ...")
    return (
        f"vLLM did not start for {policy.source} on {policy.device}: {type(error).__name__}: {said}. Out of memory: "
        f"the trainer's weights and gradients lie on the same device; lower {KEY}.gpu_memory_utilization or "
        f"{KEY}.max_model_len, or set {KEY}.enforce_eager. An unsupported model or option: see {KEY}.options, or "
        "sample with balcap.rollout.HFGenerate. More of its log: VLLM_LOGGING_LEVEL=INFO"
    )


def end_groups(had_distributed: bool, llm: Any = None) -> None:
    """End an engine and the groups of torch.distributed that vLLM made, however far it came, and none but these: vLLM
    itself ends all of torch.distributed (0.32).

    Args:
        had_distributed: torch.distributed was initialised before the engine, and stays.
        llm: the ``vllm.LLM``, which may have failed; its memory is free after `free_memory`.
    """
    from vllm.distributed import parallel_state

    destroy = dist.destroy_process_group

    def only_a_part(group: Any = None) -> None:
        if group is not None or not had_distributed:
            destroy(group)

    dist.destroy_process_group = only_a_part
    try:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    finally:
        dist.destroy_process_group = destroy


def free_memory() -> None:
    """Of an engine that nobody refers to any more."""
    gc.unfreeze()  # vLLM froze what was alive when it started: its own model, too
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def _process_kept(variables: dict[str, str]) -> Iterator[None]:
    """Set these environment variables; afterwards the environment and torch's threads are as before, but for vLLM's own
    variables, which it may read again."""
    before, threads, set_threads = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) | set(before):
            if not name.startswith("VLLM_") or name in variables:
                os.environ.pop(name, None)
                os.environ |= {name: before[name]} if name in before else {}
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
