"""What an update computes, counted over distinct tokens: model FLOPs, for model FLOPs utilisation (MFU).

Counted as in PaLM (arXiv 2204.02311, appendix B): a multiplication and an addition are two operations;
recomputation (gradient checkpointing, chunks of logits) and tokens that are forwarded twice are not work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Work:
    """One model's cost of a forward pass, and of what a backward pass adds.

    Attributes:
        language: FLOPs per token of the language model's layers, attention scores left out.
        scores: FLOPs per token and token that it attends to.
        head: FLOPs per predicted token.
        vision: FLOPs per patch of the vision tower.
        backward: what backward adds, in forward passes: 2 where weights are trained, 1 where only an adapter
            is (gradients of activations, not of weights).
        vision_backward: likewise for the tower; 0 where it is frozen.
    """

    language: float
    scores: float
    head: float
    vision: float
    backward: float
    vision_backward: float

    def update(
        self, prompts: Sequence[int], captions: Sequence[Sequence[int]], patches: Sequence[int]
    ) -> float:
        """FLOPs of forward and backward over images with their prompts once and all captions.

        Args:
            prompts: ``[b]`` prompt tokens.
            captions: ``[b][G]`` caption tokens.
            patches: ``[b]`` patches of the vision tower, pooled later or not.
        """
        total = 0.0
        for prompt, group in zip(prompts, captions, strict=True):
            tokens = prompt + sum(group)
            pairs = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in group)
            forward = self.language * tokens + self.scores * pairs + self.head * sum(group)
            total += (1 + self.backward) * forward
        return total + (1 + self.vision_backward) * self.vision * sum(patches)


def work_of(base: Any) -> Work:
    """`Work` of an HF image-text-to-text model, adapters within it left out of account."""
    text = base.config.get_text_config()
    layers, vision, language_trains, vision_trains = 0, 0, False, False
    for name, parameter in base.named_parameters():
        adapter = ".lora_" in name
        size = 0 if adapter or parameter.dim() < 2 else _size(parameter)
        if "language_model.layers." in name:
            layers += size
            language_trains |= parameter.requires_grad and not adapter
        elif "language_model" not in name and "lm_head" not in name:
            vision += size
            vision_trains |= parameter.requires_grad
    width = text.num_attention_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    return Work(
        language=2.0 * layers,
        scores=4.0 * width * text.num_hidden_layers,
        head=2.0 * text.vocab_size * text.hidden_size,
        vision=2.0 * vision,
        backward=2.0 if language_trains else 1.0,
        vision_backward=2.0 if vision_trains else 0.0,
    )


def _size(parameter: Any) -> int:
    """Weights of a matrix; 4-bit ones lie packed, and remember their shape."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel()
    size = 1
    for side in state.shape:
        size *= side
    return size


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU by the name that CUDA gives it, None if it is not in the table."""
    return next((peak for name, peak in PEAK.items() if name in device_name), None)
