"""Gemma 3: layers with a sliding window, and images whose tokens see each other in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from balcap.policy.attention import Visible, shared_prefix_attention
from balcap.policy.families.base import Family, ImageFeatures
from balcap.policy.layout import AttentionLayout


class Gemma3(Family):
    """``Gemma3ForConditionalGeneration``.

    Each run of placeholders is a block: the picture, and each crop of it where the processor makes some ("pan and scan").
    """

    model_types = ("gemma3",)
    text_types = ("gemma3_text",)
    layer_types = ("full_attention", "sliding_attention")

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int:
        """As many of each crop."""
        return len(item["pixel_values"]) * config.mm_tokens_per_image

    def language_model_inputs(
        self, model: Any, features: Sequence[ImageFeatures], placeholders: Tensor, layout: AttentionLayout
    ) -> dict[str, Any]:
        """What tokens see in layers of each kind."""
        window = model.config.get_text_config().sliding_window
        windows = {"full_attention": None, "sliding_attention": window}
        return {"visible": {kind: _visible(layout, placeholders[0], size) for kind, size in windows.items()}}

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, **options: Any
    ) -> Float[Tensor, "1 N Hq D"]:
        """To what tokens see in a layer of this kind."""
        visible = options["visible"][module.layer_type]
        return shared_prefix_attention(query, key, value, layout, options.get("scaling"), visible)


def _visible(layout: AttentionLayout, placeholders: Tensor, window: int | None) -> Visible:
    """A token sees what is less than a window before it, and within its block also what is behind it.

    Args:
        layout: of the packed sequence.
        placeholders: ``[N]`` True on tokens of images; captions hold none.
        window: in tokens of a prompt and one of its captions; None for all of them.
    """
    (b, P), (_, G, L), device = layout.prompts.shape, layout.own.shape, placeholders.device
    window = P + L if window is None else window
    begins = placeholders & ~pad(placeholders, (1, 0))[:-1]
    blocks = pad(torch.where(placeholders, begins.cumsum(0), 0), (0, 1))[layout.prompts]  # 0: no block
    same = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, :, None] > 0)
    at = torch.arange(P, device=device)
    prompts = (same | (at <= at[:, None])) & (at > at[:, None] - window)
    of_prompt, own = layout.prompts < len(placeholders), torch.arange(L, device=device)
    places = (
        of_prompt.sum(1, keepdim=True) + own
    )  # [b, L] in the sequence of the prompt and the caption alone
    on_prompt = of_prompt[:, None] & (at > places[:, :, None] - window)
    on_own = (own <= own[:, None]) & (own > own[:, None] - window)
    captions = torch.cat((on_prompt, on_own.expand(b, L, L)), 2).repeat_interleave(G, 0)
    return Visible(prompts[:, None], captions[:, None])
