"""What an update and a rollout compute, counted over distinct tokens: model FLOPs, for model FLOPs utilisation (MFU).

Counted as in PaLM (arXiv 2204.02311, appendix B): a multiplication and an addition are two operations;
recomputation (gradient checkpointing, chunks of logits) and tokens that are forwarded twice are not work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balcap.policy.families import family_of
from balcap.policy.families.base import num_weights
from balcap.policy.layout import Layout
from balcap.policy.loading import REFERENCE

# Dense bfloat16 operations per second, from the makers' data sheets. Others: no MFU, rather than a guess.
PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def update_flops(base: Any, layout: Layout, items: Sequence[dict[str, Tensor]]) -> float | None:
    """Of one forward and backward over images, their prompts once, and all their captions.

    With N tokens of prompts and captions, M predicted tokens and Q pairs of a token with one that it sees::

        language   2 N (2 + 1 where trained) per weight: forward, gradient of the input, gradient of the weight
        head       2 M (2 + 1 where trained) per weight
        attention  3 * 4 * heads * head size * layers * Q
        vision     2 * patches per weight and 4 * width per pair of patches; three times that where trained

    Of a mixture's experts a token goes through ``num_experts_per_tok``.

    Args:
        base: the HF image-text-to-text model; adapters within it count as what they are.
        layout: of prompts and captions.
        items: ``[b]`` encoded prompts, which tell the sizes of the images.

    Returns:
        Operations; None for an architecture that is not known here: a metric must not end a run.
    """
    return _flops(base, layout, items, backward=True)


def rollout_flops(base: Any, layout: Layout, items: Sequence[dict[str, Tensor]]) -> float | None:
    """Of sampling the captions of images: each image and prompt once, then the captions, forward alone.

    With N tokens of prompts and captions (the last of a caption is not forwarded), M sampled tokens and Q pairs of a token
    with one that it sees::

        language   2 N per weight
        head       2 M per weight
        attention  4 * heads * head size * layers * Q
        vision     2 * patches per weight and 4 * width per pair of patches

    Args:
        base, layout, items: as of `update_flops`.

    Returns:
        Operations; None for an architecture that is not known here.
    """
    return _flops(base, layout, items, backward=False)


def _flops(base: Any, layout: Layout, items: Sequence[dict[str, Tensor]], backward: bool) -> float | None:
    """Of a forward, and with `backward` of what follows it."""
    family, text = family_of(base), base.config.get_text_config()
    images = [family.vision_flops(base, item) for item in items]
    if text.model_type not in family.text_types or None in images:
        return None

    def passes(trained: bool) -> int:
        """Products with a matrix: forward, and for the gradients of input and weight."""
        return 2 + trained if backward else 1

    total = 0.0
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    for name, parameter in family.language_model(base).named_parameters():
        if parameter is not embedding and f".{REFERENCE}." not in name:
            share = text.num_experts_per_tok / len(parameter) if ".experts." in name else 1
            total += 2 * num_weights(parameter) * share * layout.tokens * passes(parameter.requires_grad)
    total += 2 * num_weights(head) * len(layout.predictors) * passes(head.requires_grad)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = text.num_attention_heads * size * text.num_hidden_layers * layout.attention_pairs
    total += (3 if backward else 1) * 4 * pairs
    tower_is_trained = backward and not family.vision_is_frozen(base)
    return total + (3 if tower_is_trained else 1) * sum(filter(None, images))


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a device in operations per second, None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes at the worst moment: of the device's allocator since it was last reset here, or on a CPU resident
    memory of the process since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
