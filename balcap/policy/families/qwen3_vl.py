"""Qwen3-VL and its mixture of experts: M-RoPE, and features of several vision layers (DeepStack, arXiv 2406.04334)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balcap.policy.families.base import ImageFeatures
from balcap.policy.families.qwen2_5_vl import Qwen2_5VL, tower_flops
from balcap.policy.layout import AttentionLayout


class Qwen3VL(Qwen2_5VL):
    """``Qwen3VLForConditionalGeneration`` and ``Qwen3VLMoeForConditionalGeneration``.

    Of a mixture of experts, LoRA adapts attention alone: experts and routers are no linear layers, and stay as they are.
    """

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    text_types = ("qwen3_vl_text", "qwen3_vl_moe_text")

    def speed_up(self, model: Any) -> None:
        """Images of one size in one call, and features added without waiting for the device."""
        super().speed_up(model)
        self.language_model(model)._deepstack_process = add_features

    def image_features(self, model: Any, images: dict[str, Tensor]) -> list[ImageFeatures]:
        """``extra`` holds what is added to the states behind the first layers of the language model, ``[tokens, H]`` for
        each of them."""
        out = model.model.get_image_features(**images, return_dict=True)
        layers = out.deepstack_features
        return [
            ImageFeatures(embeds, tuple(layer[image] for layer in layers))
            for image, embeds in enumerate(out.pooler_output)
        ]

    def language_model_inputs(
        self, model: Any, features: Sequence[ImageFeatures], placeholders: Tensor, layout: AttentionLayout
    ) -> dict[str, Any]:
        """Where image features stand, and for each of the first layers those of all images."""
        layers = zip(*(image.extra for image in features), strict=True)
        return {
            "visual_pos_masks": placeholders,
            "deepstack_visual_embeds": [torch.cat(of_images) for of_images in layers],
        }

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float:
        """Patches through the tower, merged ones through the merger of each layer whose features are used."""
        tower = model.model.visual
        return tower_flops(
            model.config.vision_config,
            item,
            (tower.patch_embed, tower.blocks),
            (tower.merger, tower.deepstack_merger_list),
        )


def add_features(
    states: Float[Tensor, "B S H"], placeholders: Bool[Tensor, "B S"], features: Float[Tensor, "M H"]
) -> Float[Tensor, "B S H"]:
    """The states with the M features added where placeholders are True. The model's own takes those states out, whose
    number the host must ask the device for."""
    places = (placeholders.flatten().cumsum(0) - 1).clamp(min=0).view_as(placeholders)
    return states + torch.where(placeholders[..., None], features.to(states.dtype)[places], 0)
