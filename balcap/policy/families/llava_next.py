"""LLaVA-NeXT and LLaVA-OneVision: a small picture of the whole image, then square tiles of it at the resolution that suits
its shape, without the bars that filled the tiles, and with a learned feature at the end of each row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from balcap.policy.families.base import Family
from balcap.policy.families.llava import side, square_flops


class LlavaNext(Family):
    """``LlavaNextForConditionalGeneration``."""

    several_images = False
    model_types = ("llava_next",)
    text_types: tuple[str, ...] = ("llama", "mistral", "qwen2")

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int:
        """Of the small picture, and of the rows and columns that are left of the tiles."""
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        vision, (size,) = config.vision_config, item["image_sizes"]
        shape = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        tiles = torch.empty(1, *(n * side(vision) for n in shape), device="meta")
        rows, columns = self._kept(config, *unpad_image(tiles, size).shape[1:])
        return side(vision) ** 2 + rows * (columns + 1)

    def _kept(self, config: Any, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns

    def patches_per_token(self, config: Any) -> float:
        """About: half of the tiles may be bars."""
        return 2

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float:
        """Of all tiles."""
        inner = model.model
        of_tile = square_flops(model.config.vision_config, inner.vision_tower, inner.multi_modal_projector)
        return item["pixel_values"].shape[1] * of_tile


class LlavaOnevision(LlavaNext):
    """``LlavaOnevisionForConditionalGeneration``: features of many tiles are scaled down to those of nine."""

    model_types = ("llava_onevision",)
    text_types = ("qwen2",)

    def _kept(self, config: Any, rows: int, columns: int) -> tuple[int, int]:
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * side(config.vision_config) ** 2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def patches_per_token(self, config: Any) -> float:
        """At most, bars left out: of 36 tiles nine are left."""
        return 4
