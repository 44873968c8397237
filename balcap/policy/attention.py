"""Attention over a packed sequence: prompts causally, captions on [their prompt, themselves].

Registered with transformers under a name of its own; where no packed attention is given, as in ``generate``, the
attention that was there before does the work.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from balcap.policy.layout import Layout

PREFIX = "balcap_"
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")


def install(language_model: Any) -> None:
    """Let the forward of a text model of transformers take the keyword ``packed_attention``.

    It is called in every layer as ``(module, query, key, value, **options) -> [1, N, Hq, D]`` (`Family.attention`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = language_model.config._attn_implementation
    if name.startswith(PREFIX):
        return
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        packed_attention = options.pop("packed_attention", None)
        if packed_attention is None:
            return original(module, query, key, value, mask, **options)
        return packed_attention(module, query, key, value, **options), None

    AttentionInterface.register(PREFIX + name, attend)
    AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    language_model.set_attn_implementation(PREFIX + name)


def shared_prefix_attention(
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hkv N D"],
    value: Float[Tensor, "1 Hkv N D"],
    layout: Layout,
    scale: float | None = None,
) -> Float[Tensor, "1 N Hq D"]:
    """Attention in two parts per image: the prompt on itself, then its captions as a batch of G.

    Exact: every token gets what it would get in a sequence of its prompt and its caption alone.

    Args:
        query, key, value: projections of the packed sequence, rotated to their positions.
        layout: where prompts and captions stand.
        scale: of the scores; None for 1 / sqrt(D).
    """
    key, value, grouped = _heads(query, key, value)
    heads, shared = query.shape[1], key.shape[1]
    qkv = torch.cat((query, key, value), 1)[0].transpose(0, 1)  # [N, Hq + 2 Hkv, D]
    out = []
    for span, padded, mask in zip(layout.spans, layout.padded, layout.masks, strict=True):
        prompt = qkv[None, span.start : span.start + span.prompt]
        q, k, v = (x.transpose(1, 2) for x in prompt.split((heads, shared, shared), 2))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        out.append(attended[0].transpose(0, 1))  # [P, Hq, D]
        if not sum(span.captions):
            continue
        G, L = padded.shape
        captions = qkv.index_select(0, padded.tokens).unflatten(0, (G, L))
        seen = torch.cat((prompt[:, :, heads:].expand(G, -1, -1, -1), captions[:, :, heads:]), 1)
        q, (k, v) = captions[:, :, :heads].transpose(1, 2), seen.transpose(1, 2).split(shared, 1)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        out.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, padded.kept))
    return torch.cat(out)[None]


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Keys and values for all heads, or whether the kernel shares them itself: on a CPU none does."""
    repeat = query.shape[1] // key.shape[1]
    if repeat == 1 or query.is_cuda:
        return key, value, repeat > 1
    return key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), False
