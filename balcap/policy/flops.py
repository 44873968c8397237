"""What an update computes, counted over distinct tokens: model FLOPs, for model FLOPs utilisation (MFU).

Counted as in PaLM (arXiv 2204.02311, appendix B): a multiplication and an addition are two operations;
recomputation (gradient checkpointing, chunks of logits) and tokens that are forwarded twice are not work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from balcap.policy.layout import Layout

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


FAMILIES = {"qwen2_5_vl", "qwen2_vl", "llava"}
"""Model types whose vision towers `_vision_flops` counts."""


def update_flops(base: Any, layout: Layout, items: Sequence[dict[str, Tensor]]) -> float | None:
    """Of one forward and backward over images, their prompts once, and all their captions.

    With N tokens of prompts and captions, M predicted tokens and Q pairs of a token with one that it sees::

        language   2 N (2 + 1 where trained) per weight: forward, gradient of the input, gradient of the weight
        head       2 M (2 + 1 where trained) per weight
        attention  3 * 4 * heads * head size * layers * Q
        vision     2 * patches per weight and 4 * width per pair of patches; three times that where trained

    Args:
        base: the HF image-text-to-text model; adapters within it count as what they are.
        layout: of prompts and captions.
        items: ``[b]`` encoded prompts, which tell the sizes of the images.

    Returns:
        Operations; None for an architecture that is not known here: a metric must not end a run.
    """
    if base.config.model_type not in FAMILIES:
        return None
    inner, text = base.model, base.config.get_text_config()
    tokens, predicted = layout.tokens, len(layout.predictors)
    total = 0.0
    for name, parameter in inner.language_model.named_parameters():
        if parameter.dim() == 2 and "embed_tokens" not in name:
            total += 2 * _size(parameter) * tokens * (2 + parameter.requires_grad)
    head = base.get_output_embeddings().weight
    total += 2 * _size(head) * predicted * (2 + head.requires_grad)
    pairs = sum(
        span.prompt * (span.prompt + 1) / 2 + sum(n * span.prompt + n * (n + 1) / 2 for n in span.captions)
        for span in layout.spans
    )
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    total += 3 * 4 * text.num_attention_heads * size * text.num_hidden_layers * pairs
    vision = [p for name, p in inner.named_parameters() if not name.startswith("language_model.")]
    times = 3 if any(p.requires_grad for p in vision) else 1
    return total + times * sum(_vision_flops(inner, base.config.vision_config, item) for item in items)


def _vision_flops(inner: Any, config: Any, item: dict[str, Tensor]) -> float:
    """Forward of the tower and of what joins it to the language model, for one image."""
    if "image_grid_thw" in item:
        patches, tower, join = int(item["image_grid_thw"].prod()), inner.visual, inner.visual.merger
        tokens = patches / config.spatial_merge_size**2
        width = getattr(config, "embed_dim", None) or config.hidden_size  # Qwen2-VL, Qwen2.5-VL
        pairs = config.depth * patches**2
        if hasattr(config, "fullatt_block_indexes"):
            whole = len(config.fullatt_block_indexes)
            window = (config.window_size // config.patch_size) ** 2
            pairs = whole * patches**2 + (config.depth - whole) * patches * min(window, patches)
        blocks = _weights(tower) - _weights(join)
    else:
        tokens = (config.image_size // config.patch_size) ** 2
        patches, tower, join = tokens + 1, inner.vision_tower, inner.multi_modal_projector
        width, pairs = config.hidden_size, config.num_hidden_layers * patches**2
        blocks = _weights(tower)
    return 2 * (patches * blocks + tokens * _weights(join)) + 4 * width * pairs


def _weights(module: Any) -> int:
    return sum(_size(p) for p in module.parameters() if p.dim() > 1)


def _size(parameter: Any) -> int:
    """Weights of a matrix; 4-bit ones lie packed, and remember their shape."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


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
