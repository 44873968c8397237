"""InternVL3 and InternVL3.5: square tiles of an image and one picture of the whole; four patches make one feature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from balcap.policy.families.base import Family, products, transformer_flops


class InternVL(Family):
    """``InternVLForConditionalGeneration``."""

    model_types = ("internvl",)
    text_types = ("qwen2", "qwen3", "qwen3_moe")

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int:
        """As many of each tile."""
        return int(len(item["pixel_values"]) * _patches(config) / self.patches_per_token(config))

    def patches_per_token(self, config: Any) -> float:
        return config.downsample_ratio**-2

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float:
        """All tiles through the tower, each with a class token, their features through the projector."""
        config, tower = model.config, model.model.vision_tower
        patches = _patches(config)
        flops = transformer_flops(config.vision_config, patches, tower.embeddings, tower.encoder, True)
        flops += 2 * patches / self.patches_per_token(config) * products(model.model.multi_modal_projector)
        return len(item["pixel_values"]) * flops


def _patches(config: Any) -> int:
    """Of a tile."""
    vision = config.vision_config
    (height, width), (rows, columns) = vision.image_size, vision.patch_size
    return (height // rows) * (width // columns)
