"""Memory of sampling on one device, by arithmetic: nothing is allocated, models on the meta device will do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from balcap.policy.families import base_of, family_of
from balcap.policy.memory import UpdateCosts

LOGIT = 18
"""Bytes of a logit while a token is drawn: itself in 16 bits, and four times float32 (`balcap.rollout.decode._draw`)."""

VLLM_REST = 1.5e9
"""Bytes that vLLM holds beside weights and KV cache, asleep too: CUDA graphs, buffers, activations. Assumed, not measured:
asleep it may be less."""

_QUANTISED = {"fp8": 1.0, "bitsandbytes": 0.5 + 4 / 64}
"""vLLM's ``quantization`` -> bytes of a weight of a linear layer; of NF4 it unpacks the scales, one float32 for 64."""


@dataclass(frozen=True)
class Work:
    """What is sampled on one device in one step.

    Attributes:
        images: B.
        captions: G of each.
        prompt: tokens of a prompt, those of its image included.
        image_tokens: of them.
        longest: tokens of a caption.
    """

    images: int
    captions: int
    prompt: int
    image_tokens: int
    longest: int

    @property
    def tokens(self) -> int:
        """Whose keys and values an engine holds that reads each prompt once."""
        return self.images * (self.prompt + self.captions * self.longest)


def kv_bytes(model: Any, size: int = 2) -> int:
    """Keys and values of a token in all layers, in numbers of `size` bytes."""
    text = base_of(model).config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * width * size


def on_the_policy(
    costs: UpdateCosts, kv: int, work: Work, max_sequences: int, shared_prompts: bool
) -> dict[str, int]:
    """What `balcap.rollout.HFGenerate` holds beside the policy at its worst moment, by what it is for.

    Args:
        costs: of the policy.
        kv: of `kv_bytes`.
        work: what is sampled.
        max_sequences: captions at once.
        shared_prompts: whether prompts are read once for all their captions (`balcap.rollout.decode`).
    """
    if shared_prompts and work.captions <= max_sequences:
        read = min(work.images, max_sequences // work.captions)
        count = read * work.captions
    else:
        read = count = min(max_sequences, work.images * work.captions)
    logits = LOGIT * count * costs.vocabulary
    prompts = {"KV cache": read * work.prompt * kv, "logits": logits}
    moments: list[dict[str, int]] = [
        {"vision": math.ceil(costs.vision_pass * read * work.image_tokens)},
        prompts | {"prompts": math.ceil(costs.inference * read * work.prompt)},
        # While a layer's cache grows, it is there twice.
        {"KV cache": math.ceil(count * (work.prompt + work.longest) * kv * (1 + 1 / costs.layers)), "logits": logits},
    ]  # fmt: skip
    return max(moments, key=lambda parts: sum(parts.values()))


def vllm_weights(model: Any, quantization: str | None, size: int = 2) -> int | None:
    """Bytes of vLLM's own copy of the base; None where the quantisation is not known.

    Args:
        model: the policy.
        quantization: that vLLM is started with; None for weights of `size` bytes.
        size: bytes of a weight that is not quantised: those of embeddings, head, vision tower.
    """
    base = base_of(model)
    layers = family_of(model).language_model(base).named_parameters()
    own = [p for name, p in base.named_parameters() if "lora_" not in name]
    total = size * sum(p.numel() for p in own)
    if quantization is None:
        return total
    if quantization not in _QUANTISED:
        return None
    table = base.get_input_embeddings().weight
    linear = sum(p.numel() for name, p in layers if "lora_" not in name and p.dim() == 2 and p is not table)
    return math.ceil(total - (size - _QUANTISED[quantization]) * linear)
