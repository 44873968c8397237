"""Idefics3, SmolVLM and SmolVLM2: square tiles of an image and one picture of the whole; neighbouring patches make one
feature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from balcap.policy.families.base import Family, products, transformer_flops
from balcap.policy.families.llava import side


class Idefics3(Family):
    """``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``."""

    model_types = ("idefics3", "smolvlm")
    text_types = ("llama",)

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int:
        """As many of each tile."""
        of_tile = side(config.vision_config) ** 2 // config.scale_factor**2
        return item["pixel_values"].shape[1] * of_tile

    def patches_per_token(self, config: Any) -> int:
        return config.scale_factor**2

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float:
        """All tiles through the tower, their features through the connector."""
        config, tower = model.config, model.model.vision_model
        patches = side(config.vision_config) ** 2
        flops = transformer_flops(config.vision_config, patches, tower.embeddings, tower.encoder)
        flops += 2 * patches // config.scale_factor**2 * products(model.model.connector)
        return item["pixel_values"].shape[1] * flops
