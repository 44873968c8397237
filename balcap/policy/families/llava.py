"""LLaVA-1.5: CLIP, a projector, Llama; and with Pixtral's tower, for images of any size, Pixtral and Mistral Small 3."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from balcap.policy.families.base import Family, products, transformer_flops

_ONE_SIZE = ("clip_vision_model", "siglip_vision_model")
"""Towers whose images are cropped to one size."""


class Llava(Family):
    """``LlavaForConditionalGeneration``."""

    model_types = ("llava",)
    text_types: tuple[str, ...] = ("llama", "qwen2", "mistral")

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int | None:
        """One per patch of each image, and the class token where the config keeps it."""
        vision = config.vision_config
        if vision.model_type == "pixtral":
            return int(sum(pixtral_patches(vision, item)) / self.patches_per_token(config))
        if vision.model_type not in _ONE_SIZE:
            return super().num_features(config, item)
        full = config.vision_feature_select_strategy == "full" and has_class_token(vision)
        return len(item["pixel_values"]) * (side(vision) ** 2 + full)

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float | None:
        """All patches and the class token through the tower, the features through the projector."""
        config, tower, projector = model.config, model.model.vision_tower, model.model.multi_modal_projector
        vision = config.vision_config
        if vision.model_type == "pixtral":
            of_images = pixtral_patches(vision, item)
            flops = sum(transformer_flops(vision, n, tower.patch_conv, tower.transformer) for n in of_images)
            return flops + 2 * sum(of_images) / self.patches_per_token(config) * products(projector)
        if vision.model_type not in _ONE_SIZE:
            return super().vision_flops(model, item)
        return len(item["pixel_values"]) * square_flops(vision, tower, projector)


class Mistral3(Llava):
    """``Mistral3ForConditionalGeneration``: Mistral Small 3, Ministral 3."""

    model_types = ("mistral3",)
    text_types = ("mistral", "ministral3")

    def patches_per_token(self, config: Any) -> int:
        return config.spatial_merge_size**2


def side(vision: Any) -> int:
    """Patches along an edge of a square image."""
    return vision.image_size // vision.patch_size


def has_class_token(vision: Any) -> bool:
    """SigLIP has none."""
    return vision.model_type == "clip_vision_model"


def square_flops(vision: Any, tower: Any, projector: Any) -> float:
    """Of one square image through CLIP or SigLIP, and its patches through the projector."""
    patches = side(vision) ** 2
    flops = transformer_flops(vision, patches, tower.embeddings, tower.encoder, has_class_token(vision))
    return flops + 2 * patches * products(projector)


def pixtral_patches(vision: Any, item: dict[str, Tensor]) -> list[int]:
    """Of each image, whose sides the processor has made multiples of a patch's."""
    return (item["image_sizes"] // vision.patch_size).prod(-1).tolist()
