"""LLaVA-1.5: CLIP, a projector, Llama. Every image is cropped to one size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from balcap.policy.families.base import Family, num_weights

_ONE_SIZE = ("clip_vision_model", "siglip_vision_model")
"""Towers that make as many features of every image; Pixtral's, in the same architecture, does not."""


class Llava(Family):
    """``LlavaForConditionalGeneration``."""

    model_types = ("llava",)
    text_types = ("llama", "qwen2")

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int | None:
        """One per patch of each image, and the class token where the config keeps it."""
        if config.vision_config.model_type not in _ONE_SIZE:
            return super().num_features(config, item)
        each = _patches(config.vision_config) + (config.vision_feature_select_strategy == "full")
        return len(item["pixel_values"]) * each

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float | None:
        """All patches and the class token through the tower, the patches through the projector."""
        config, inner = model.config.vision_config, model.model
        if config.model_type not in _ONE_SIZE:
            return super().vision_flops(model, item)
        tokens = _patches(config)
        pairs = config.num_hidden_layers * (tokens + 1) ** 2
        weights = (tokens + 1) * num_weights(*inner.vision_tower.parameters())
        weights += tokens * num_weights(*inner.multi_modal_projector.parameters())
        return len(item["pixel_values"]) * (2 * weights + 4 * config.hidden_size * pairs)


def _patches(vision_config: Any) -> int:
    return (vision_config.image_size // vision_config.patch_size) ** 2
