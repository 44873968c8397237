"""Weights, adapters and freezing."""

from __future__ import annotations

import re
from typing import Any

import torch

from balcap.policy.config import PolicyConfig


def load_processor(config: PolicyConfig) -> Any:
    """The model's own processor, with the image area limits of the config."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(config.model, revision=config.revision)
    limits = {
        k: v for k, v in (("shortest_edge", config.min_pixels), ("longest_edge", config.max_pixels)) if v
    }
    if limits:
        own = processor.image_processor.size
        if not {"shortest_edge", "longest_edge"} <= dict(own).keys():
            raise ValueError(
                f"model.policy.min_pixels, model.policy.max_pixels: the image processor of {config.model} does not "
                f"scale to an area (its size is {dict(own)}); leave both null"
            )
        size = dict(own) | limits  # the names are Qwen2.5-VL's; both are areas
        if size["shortest_edge"] > size["longest_edge"]:
            raise ValueError(
                f"model.policy.min_pixels: {size['shortest_edge']} is above model.policy.max_pixels: "
                f"{size['longest_edge']}; where one is null, it is the model's own"
            )
        processor.image_processor.size = type(own)(**size)
    return processor


def load_model(config: PolicyConfig) -> Any:
    """The weights as they are on disk or hub, frozen parts not yet marked."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "revision": config.revision}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    return AutoModelForImageTextToText.from_pretrained(config.model, **options)


def vision_prefixes(model: Any) -> list[str]:
    """Names under which a model keeps all that makes image features: whatever is not language."""
    inner = getattr(model, "model", model)
    names = [name for name, _ in inner.named_children() if name != "language_model"]
    return [f"model.{name}." for name in names] if inner is not model else [f"{name}." for name in names]


def prepare(model: Any, config: PolicyConfig) -> Any:
    """Freeze, adapt and set up checkpointing; returns the model to train (a PeftModel with LoRA)."""
    vision = tuple(vision_prefixes(model))
    if config.freeze_vision:
        for name, parameter in model.named_parameters():
            if name.startswith(vision):
                parameter.requires_grad_(False)
    if config.lora is not None:
        model = _adapt(model, config, vision)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # HF makes embeddings, the vision tower's too, require gradients: re-entrant checkpointing needs that. Here it
        # would only send a backward pass through a frozen tower.
        model.disable_input_require_grads()
    return model


def _adapt(model: Any, config: PolicyConfig, vision: tuple[str, ...]) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    assert lora is not None
    assert lora.target_modules
    wanted = lora.target_modules
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if config.freeze_vision:
        names = [name for name in names if not name.startswith(vision)]
    patterns = {wanted: wanted} if isinstance(wanted, str) else {w: rf"(.*\.)?{re.escape(w)}" for w in wanted}
    found = {w: [name for name in names if re.fullmatch(pattern, name)] for w, pattern in patterns.items()}
    idle = [w for w, matches in found.items() if not matches]
    if idle:
        examples = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            f"model.policy.lora.target_modules: {', '.join(map(repr, idle))} matches no linear layer of {config.model} "
            f"that may be trained; those end in {', '.join(examples)}"
        )
    chosen = [name for name in names if any(name in matches for matches in found.values())]
    pattern = "|".join(map(re.escape, chosen))  # full names, as one expression: exact, and serialisable
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=f"(?:{pattern})",
        bias="none",
    )
    return get_peft_model(model, settings)
