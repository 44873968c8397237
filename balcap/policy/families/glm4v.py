"""GLM-4.1V, GLM-4.5V and GLM-4.6V: the tokens and positions of Qwen2.5-VL, another tower, dense or a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from balcap.policy.families.qwen2_5_vl import Qwen2_5VL, tower_flops


class Glm4V(Qwen2_5VL):
    """``Glm4vForConditionalGeneration``, ``Glm4vMoeForConditionalGeneration`` and ``Glm46VForConditionalGeneration``.

    Of a mixture of experts, LoRA adapts attention alone: experts and routers are no linear layers.
    """

    model_types = ("glm4v", "glm4v_moe", "glm46v")
    text_types = ("glm4v_text", "glm4v_moe_text")

    def lora_targets(self, model: Any, layers: Sequence[str]) -> list[str]:
        """All but the head; of a mixture of experts, what makes queries, keys, values and the output of attention.

        There peft takes ``gate_proj``, ``up_proj`` and ``down_proj``, in whatever layer, for the experts of old checkpoints.
        """
        if model.config.get_text_config().model_type != "glm4v_moe_text":
            return super().lora_targets(model, layers)
        return [name for name in layers if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj", "qkv"))]

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> float:
        """Patches through the tower, merged ones through what merges them."""
        tower = model.model.visual
        return tower_flops(
            model.config.vision_config,
            item,
            (tower.patch_embed, tower.blocks),
            (tower.downsample, tower.merger),
        )
