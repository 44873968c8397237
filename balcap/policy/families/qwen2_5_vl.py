"""Qwen2.5-VL and Qwen2-VL: images of any size, positions in three dimensions (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from balcap.policy import windows
from balcap.policy.families.base import Family, num_weights


def tower_flops(
    config: Any, item: dict[str, Tensor], of_patches: Sequence[Any], of_tokens: Sequence[Any]
) -> float:
    """Model FLOPs of a tower whose patches see all of their image.

    Args:
        config: of the tower.
        item: an encoded prompt.
        of_patches: modules that each patch passes through.
        of_tokens: modules that each token of the language model passes through, which is made of several patches.
    """
    of_images = item["image_grid_thw"].prod(-1)
    patches, squares = int(of_images.sum()), int((of_images**2).sum())
    per_patch, per_token = (
        num_weights(*(weight for module in modules for weight in module.parameters()))
        for modules in (of_patches, of_tokens)
    )
    weights = patches * per_patch + patches / config.spatial_merge_size**2 * per_token
    return 2 * weights + 4 * config.hidden_size * config.depth * squares


class Qwen2_5VL(Family):  # noqa: N801
    """``Qwen2_5_VLForConditionalGeneration`` and ``Qwen2VLForConditionalGeneration``."""

    model_types: tuple[str, ...] = ("qwen2_5_vl", "qwen2_vl")
    text_types: tuple[str, ...] = ("qwen2_5_vl_text", "qwen2_vl_text")

    def speed_up(self, model: Any) -> None:
        """Windows of the tower in batches."""
        windows.install(model.model.visual)

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int:
        """Patches of the images' grids, merged two by two."""
        return int(item["image_grid_thw"].prod(-1).sum()) // config.vision_config.spatial_merge_size**2

    def prompt_positions(self, model: Any, item: dict[str, Tensor]) -> Tensor:
        """``[3, P]``: time, height and width; ``[1, P]`` of a prompt without an image."""
        if "image_grid_thw" not in item:
            return super().prompt_positions(model, item)
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, _ = model.model.get_rope_index(**{key: item[key] for key in keys})
        return positions[:, 0].cpu()

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float | None:
        """Patches through the tower, with windows in most of Qwen2.5-VL's layers, merged ones through the merger."""
        config, tower = model.config.vision_config, model.model.visual
        of_images = item["image_grid_thw"].prod(-1)
        patches, squares = int(of_images.sum()), int((of_images**2).sum())
        pairs = config.depth * squares
        if hasattr(config, "fullatt_block_indexes"):
            full = len(config.fullatt_block_indexes)
            window = (config.window_size // config.patch_size) ** 2
            windowed = int((of_images * of_images.clamp(max=window)).sum())
            pairs = full * squares + (config.depth - full) * windowed
        width = getattr(config, "embed_dim", None) or config.hidden_size  # Qwen2-VL, Qwen2.5-VL
        merger = num_weights(*tower.merger.parameters())
        weights = patches * (num_weights(*tower.parameters()) - merger)
        return 2 * (weights + patches / config.spatial_merge_size**2 * merger) + 4 * width * pairs
