"""Log-probabilities of captions with one vision pass and one prompt per image, whatever G is.

Exact: log-probs and gradients are those of one sequence per caption (`balcap.policy.logps`). Captions attend
to the prompt's states, so the prompt's part of the language model keeps its gradient, from all G captions
at once. For P prompt tokens and captions of T tokens, P + G·T tokens are forwarded instead of G·(P + T).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from balcap.policy.attention import KNOWN, PREFIX, install
from balcap.policy.head import token_logps
from balcap.policy.layout import Layout
from balcap.policy.prompts import Prompts

logger = logging.getLogger(__name__)

# Families whose image features enter as plain embeddings, and text models whose attention sees everything
# before it: what the layout assumes. Others (deep-stacked features, sliding windows) take the naive path.
FAMILIES = {"qwen2_5_vl", "qwen2_vl", "llava"}
TEXT_MODELS = {"qwen2_5_vl_text", "qwen2_vl_text", "llama", "qwen2"}


def prepare_shared_prefix(model: Any) -> bool:
    """Set the model up for `shared_prefix_logps`; False, with one line in the log, where it cannot be."""
    base = base_of(model)
    why = _obstacle(base)
    if why:
        logger.warning("model.policy.shared_prefix: %s; every caption is forwarded with its own prompt", why)
        return False
    install(base.model.language_model)
    return True


def _obstacle(base: Any) -> str:
    config = base.config
    text = config.get_text_config()
    if config.model_type not in FAMILIES or text.model_type not in TEXT_MODELS:
        return f"not written for the architecture {config.model_type}/{text.model_type}"
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "the language model attends within sliding windows"
    implementation = text._attn_implementation.removeprefix(PREFIX)
    if implementation not in KNOWN:
        return f"attn_implementation is {implementation}, it works with {', '.join(KNOWN)}"
    return ""


def base_of(model: Any) -> Any:
    """The HF model itself, out of its adapter (which works inside it)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def shared_prefix_logps(
    model: Any,
    prompts: Prompts,
    rows: Sequence[int],
    token_ids: Int[Tensor, "b G T"],
    mask: Bool[Tensor, "b G T"],
    features: Sequence[Tensor],
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Float[Tensor, "b G T"], Float[Tensor, "b G T"] | None]:
    """As `caption_logps`, for all captions of some images in one packed sequence.

    Args:
        model: prepared by `prepare_shared_prefix`.
        prompts: of the whole batch.
        rows: the images, positions in the batch.
        token_ids: of their captions.
        mask: True on caption tokens.
        features: ``[b]`` image features of each, as `image_features` gives them.
        temperature: > 0.
        entropy: whether to return entropies too (nats, without gradient).

    Returns:
        float32 log-probs, 0 where masked; entropies likewise or None.
    """
    base, device = base_of(model), token_ids.device
    lengths = mask.sum(-1).tolist()
    items = [prompts.items[row] for row in rows]
    layout = Layout([item["input_ids"].shape[1] for item in items], lengths, device)
    ids, positions = _sequence(base, items, token_ids, lengths)
    embeds = base.get_input_embeddings()(ids.to(device))
    placeholders = (ids == prompts.image_token_id).to(device)
    pixels = torch.cat(list(features)).to(embeds.dtype)
    embeds = embeds.masked_scatter(placeholders[..., None], pixels)
    states = base.model.language_model(
        inputs_embeds=embeds,
        attention_mask=embeds.new_zeros(1, 1, 1, 1),  # four dimensions: transformers makes none of its own
        position_ids=positions.to(device),
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    logps, spread = token_logps(
        base.get_output_embeddings(), states[layout.predictors], token_ids[mask], temperature, entropy
    )
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=device)
    filled = empty.masked_scatter(mask, logps)
    return filled, None if spread is None else empty.masked_scatter(mask, spread)


def image_features(model: Any, prompts: Prompts, rows: Sequence[int], device: torch.device) -> list[Tensor]:
    """Features ``[tokens, H]`` of the images of these rows: one pass of the vision tower for all."""
    inner = base_of(model).model
    inputs = {
        key: torch.cat([prompts.items[row][key] for row in rows]).to(device)
        for key in ("pixel_values", "image_grid_thw", "image_sizes")
        if key in prompts.items[rows[0]]
    }
    features = inner.get_image_features(**inputs, return_dict=True).pooler_output
    return [part.reshape(-1, part.shape[-1]) for part in features]


def _sequence(
    base: Any, items: Sequence[dict[str, Tensor]], token_ids: Tensor, lengths: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Token ids ``[1, N]`` and positions, ``[3, 1, N]`` with M-RoPE and ``[1, N]`` without; on the CPU."""
    ids, positions = [], []
    captions = token_ids.cpu()
    for item, group, own in zip(items, captions, lengths, strict=True):
        where = _prompt_positions(base, item)  # [R, P], R = 3 or 1
        ids.append(item["input_ids"][0])
        positions.append(where)
        follow = int(where.max()) + 1
        for caption, tokens in zip(group, own, strict=True):
            forwarded = max(0, tokens - 1)
            ids.append(caption[:forwarded])
            positions.append((follow + torch.arange(forwarded)).expand(len(where), -1))
    packed = torch.cat(positions, 1)
    return torch.cat(ids)[None], packed[:, None] if len(packed) == 3 else packed


def _prompt_positions(base: Any, item: dict[str, Tensor]) -> Tensor:
    if "image_grid_thw" not in item:
        return torch.arange(item["input_ids"].shape[1])[None]
    found, _ = base.model.get_rope_index(
        item["input_ids"],
        mm_token_type_ids=item["mm_token_type_ids"],
        image_grid_thw=item["image_grid_thw"],
        attention_mask=item["attention_mask"],
    )
    return found[:, 0].cpu()
