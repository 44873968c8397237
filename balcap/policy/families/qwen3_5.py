"""Qwen3.5 and 3.6: three gated delta nets to one layer of attention. Positions are Qwen2.5-VL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from balcap.policy import delta_net
from balcap.policy.families.base import ImageFeatures
from balcap.policy.families.qwen2_5_vl import Qwen2_5VL
from balcap.policy.layout import AttentionLayout


class Qwen3_5(Qwen2_5VL):  # noqa: N801
    """``Qwen3_5ForConditionalGeneration`` and ``Qwen3_5MoeForConditionalGeneration``."""

    model_types = ("qwen3_5", "qwen3_5_moe")
    text_types = ("qwen3_5_text", "qwen3_5_moe_text")
    layer_types = ("full_attention", "linear_attention")

    def prepare_shared_prefix(self, model: Any) -> None:
        """Attention as in other families, and delta nets."""
        super().prepare_shared_prefix(model)
        delta_net.install(self.language_model(model))

    def language_model_inputs(
        self, model: Any, features: Sequence[ImageFeatures], placeholders: Tensor, layout: AttentionLayout
    ) -> dict[str, Any]:
        """How delta nets take the sequence apart."""
        width = model.config.get_text_config().linear_conv_kernel_dim
        return {"recurrence": delta_net.Recurrence.of(layout, width)}

    def vision_flops(self, model: Any, item: dict[str, Tensor]) -> None:
        """None: operations of the language model are counted as those of a decoder that attends in all layers."""
