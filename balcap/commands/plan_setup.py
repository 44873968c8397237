"""From a config to what decides about memory: the model without its weights, a prompt with the largest image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from PIL import Image

from balcap.commands.estimate_plan import ranks_of
from balcap.commands.plan_fit import Other, Setup, Weights
from balcap.data import CaptionDataModule
from balcap.module import BalCapModule
from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.families import base_of, family_of
from balcap.policy.loading import empty_model, load_processor, prepare
from balcap.policy.memory import OptimizerCosts, update_costs
from balcap.policy.prompts import PromptEncoder
from balcap.policy.sharded_memory import costs_of_rank
from balcap.rollout import HFGenerate, VLLMInProcess
from balcap.rollout.memory import VLLM_REST, kv_bytes, vllm_weights
from balcap.rollout.vllm.start import BITSANDBYTES
from balcap.types import CaptionBatch
from balcap.utils.errors import UserError

QUESTION = "Describe this image in detail."

SHAPES = (1, 5 / 4, 4 / 3, 3 / 2, 8 / 5, 16 / 9)
"""Of pictures, width by height; some make more image tokens of an area than others."""

GPUS = "80 (H100, A100), 48 (L40S, A6000), 40 (A100 of 40 GB), 24 (4090, 3090, L4) or 16 (T4)"


@dataclass(frozen=True)
class Planned:
    """What is planned.

    Attributes:
        setup: of the run.
        other: the policy with an adapter, see `Other`.
        assumed: a line each.
    """

    setup: Setup
    other: Other
    assumed: list[str]


def read_setup(
    module: BalCapModule, data: CaptionDataModule, launch: Any, gpu_gb: float | None, pixels: int | None
) -> Planned:
    """Of the run of this config.

    Args:
        module: with policy, engine and optimizer.
        data: its settings alone are read.
        launch: settings of the trainer that would run the fit.
        gpu_gb: memory of each GPU as it is sold, in 2^30 bytes; None for that of the one that is here.
        pixels: area of the images; None for the largest that the processor makes.

    Raises:
        PolicyError: the model's config or processor cannot be read.
        UserError: see `balcap.commands.plan.plan_run`.
    """
    device, config, settings = device_bytes(gpu_gb), module.policy_config, module.update_settings
    autocast = str(launch.precision) == "bf16-mixed"
    ranks = ranks_of(launch.devices, launch.num_nodes, str(launch.accelerator), torch.cuda.device_count())
    shared_by = ranks if "ModelParallelStrategy" in str(launch.strategy) else 1

    @cache
    def weights(lora: bool, in_4bit: bool) -> tuple[Any, Weights]:
        changed = replace(config, load_in_4bit=in_4bit, lora=LoraSettings() if lora else config.lora)
        return _weights(module, changed, autocast, shared_by)

    def other(in_4bit: bool) -> Weights | None:
        known = config.load_in_4bit or (has_adapter and not in_4bit)
        return None if known else weights(not has_adapter, in_4bit)[1]

    has_adapter = config.lora is not None or config.adapter is not None
    model, own = weights(False, config.load_in_4bit)
    prompt, image_tokens, area = largest_prompt(config, model, data.settings.prompts, pixels)
    setup = Setup(
        own,
        device,
        images=data.settings.batch_size,
        val_images=data.settings.eval_batch_size if data.settings.val_size else 0,
        captions=1 if module.supervised else module.num_captions,
        val_captions=module.val_captions,
        prompt=prompt,
        image_tokens=image_tokens,
        longest=module.pipeline.sampling.max_tokens,
        shared_prefix=_shares_prefix(config, model),
        checkpointing=config.gradient_checkpointing,
        max_tokens=settings.max_tokens_per_forward,
        micro_batch=settings.micro_batch_size,
        buckets=shared_by == 1 and (ranks > 1 or "ddp" in str(launch.strategy)),
        gathers=shared_by > 1,
        pixels=area,
        has_adapter=has_adapter,
        **_engine(module, model),
    )
    compiled = shared_by == 1 and _is_compiled(config, model)
    name, optimizer = optimizer_costs(module.optimizer_factory, model)
    assumed = [
        f"a prompt of {prompt:,} tokens, {image_tokens:,} of them the largest image's that the processor makes  [--pixels]",
        f"captions of {setup.longest:,} tokens  [--model.sampling.max_tokens]",
        f"{name} keeps {optimizer.state:.2f} bytes for each byte that is trained  [--model.optimizer]",
        f"updates are {'compiled' if compiled else 'not compiled'}  [--model.policy.compile]",
        "not counted: CUDA itself (about 0.5 GB), which is part of what is left alone",
    ]
    if shared_by > 1:
        assumed.append(
            f"weights, gradients and optimizer lie in parts on {shared_by} ranks, a frozen vision tower whole on each  "
            "[--trainer.devices, --trainer.num_nodes]"
        )
    if setup.engine == "vllm":
        assumed.append(f"vLLM holds {VLLM_REST / 1e9:g} GB beside weights, keys and values, asleep too")
    if setup.engine == "policy" and shared_by > 1:
        assumed.append(
            "the policy samples itself, which fit refuses, since no rank holds all of it: sample with vLLM, which may not "
            "be installed here  [--config configs/engine/vllm.yaml]"
        )
    elif setup.engine == "policy" and launch.accelerator != "cpu":
        assumed.append(
            "the policy samples itself, as the config says or because vLLM is not installed here  "
            "[--config configs/engine/vllm.yaml]"
        )
    return Planned(setup, other, assumed)


def device_bytes(gpu_gb: float | None) -> int:
    """Of a GPU of so many GB as it is sold, or of the one that is here.

    Raises:
        UserError: there is none, or no such size.
    """
    if gpu_gb is None:
        if not torch.cuda.is_available():
            raise UserError(f"--gpu_gb: there is no GPU here; say how much memory the run's have: {GPUS}")
        return torch.cuda.get_device_properties(0).total_memory
    if not gpu_gb > 0:
        raise UserError(f"--gpu_gb {gpu_gb:g}: use a number above 0, such as {GPUS}")
    return int(gpu_gb * 2**30)


def optimizer_costs(factory: Callable[..., Any], model: Any) -> tuple[str, OptimizerCosts]:
    """Class of an optimizer, and what it costs: a step on one matrix in the dtype of what is trained tells what it keeps."""
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    weight = torch.nn.Parameter(torch.zeros(512, 512, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = factory([weight])
    optimizer.step()
    state = (value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    many_at_once = optimizer.defaults.get("foreach", False) is not False and not optimizer.defaults.get(
        "fused"
    )
    kept = sum(value.nbytes for value in state) / weight.nbytes
    return type(optimizer).__name__, OptimizerCosts(kept, 1.0 if many_at_once else 0.0)


def largest_prompt(
    config: PolicyConfig, model: Any, prompts: list[str] | None, pixels: int | None
) -> tuple[int, int, int]:
    """Tokens of a prompt with the largest image, those of the image, and the image's area; 0 where the processor does not
    scale to an area.

    Args:
        prompts: of the config; None for one that asks for a description.
        pixels: area of the images before they are scaled; None for the largest that the processor makes.
    """
    if pixels is not None and pixels < 1:
        raise UserError(f"--pixels {pixels}: an image has 1 or more")
    encoder = PromptEncoder(load_processor(config), base_of(model).config)
    size = dict(getattr(encoder.processor.image_processor, "size", None) or {})
    limit = size["longest_edge"] if {"shortest_edge", "longest_edge"} <= size.keys() else 0
    area = pixels or limit or 2**22
    text = max(prompts or [QUESTION], key=len)
    found = []
    for shape in SHAPES if area <= 2**22 else SHAPES[:1]:  # a large picture takes seconds
        picture = Image.new(
            "RGB", (max(1, round(math.sqrt(area * shape))), max(1, round(math.sqrt(area / shape))))
        )
        item = encoder.encode(CaptionBatch(["plan"], [(picture,)], [(b"",)], [text], [""])).items[0]
        found.append((item["input_ids"].shape[1], int((item["input_ids"] == encoder.image_token_id).sum())))
    return *max(found), min(limit, area)


def _weights(
    module: BalCapModule, config: PolicyConfig, autocast: bool, shared_by: int
) -> tuple[Any, Weights]:
    """The policy on the meta device, and what it costs each of the ranks that share it."""
    with_reference = module.update_settings.kl_coef > 0
    model = prepare(empty_model(config.base), replace(config, gradient_checkpointing=False), with_reference)
    costs = update_costs(
        model,
        "cuda",
        autocast,
        with_reference,
        config.load_in_4bit,
        shared_by == 1 and _is_compiled(config, model),
        optimizer_costs(module.optimizer_factory, model)[1],
    )
    if costs is None:
        raise UserError(
            f"model.policy.model: how much memory an update of {config.model} takes is not known (experts, layers that do "
            "not attend to all tokens before, an unusual tower). A short fit says it: trainer.max_steps: 3, "
            "time/peak_memory_gb"
        )
    if shared_by > 1:
        costs = costs_of_rank(costs, model, shared_by, autocast)
    engine, size = module.pipeline.engine, 4 if config.dtype == "float32" else 2
    if not isinstance(engine, VLLMInProcess):
        return model, Weights(costs, 0, kv_bytes(model, 2 if autocast else size))
    options = engine.options or {}
    size = size if engine.dtype == "auto" else 4 if engine.dtype == "float32" else 2
    quantization = options.get("quantization", BITSANDBYTES if config.load_in_4bit else None)
    own = vllm_weights(model, quantization, size)
    if own is None:
        raise UserError(
            f"model.engine.init_args.options.quantization: how large weights in {quantization} are is not known; plan "
            "without it, or with fp8 or bitsandbytes"
        )
    keys = 1 if str(options.get("kv_cache_dtype")).startswith("fp8") else size
    return model, Weights(costs, own, kv_bytes(model, keys))


def _engine(module: BalCapModule, model: Any) -> dict[str, Any]:
    """Settings of `Setup` that are the engine's."""
    engine = module.pipeline.engine
    if isinstance(engine, HFGenerate):
        return {"max_sequences": engine.max_sequences, "shared_prompts": engine.shared_prompts}
    if not isinstance(engine, VLLMInProcess):
        return {"engine": "elsewhere"}
    longest = base_of(model).config.get_text_config().max_position_embeddings
    return {
        "engine": "vllm",
        "share": engine.gpu_memory_utilization,
        "sleeps": engine.sleep,
        "max_model_len": engine.max_model_len or longest,
        "parallel": engine.tensor_parallel_size,
    }


def _shares_prefix(config: PolicyConfig, model: Any) -> bool:
    base = base_of(model)
    return config.shared_prefix and not family_of(base).obstacle(base)


def _is_compiled(config: PolicyConfig, model: Any) -> bool:
    """On the GPUs of the run, whatever is here."""
    return bool(config.compile) and _shares_prefix(config, model)
