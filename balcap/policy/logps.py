"""Log-probabilities of captions under a model: one padded forward, the prompt repeated for every caption."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def caption_logps(
    model: Any,
    inputs: dict[str, Tensor],
    token_ids: Int[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"] | None]:
    """Log-probability, and on request entropy, of every caption token.

    Prompts are padded on the left and captions on the right, so that a prompt's last token stands right
    before its caption. Logits are divided by the sampling temperature: the distribution that the
    captions were drawn from, before top-p, is the one that is trained.

    Args:
        model: an HF image-text-to-text model.
        inputs: prompt inputs ``[N, P]`` as `Prompts.inputs` makes them.
        token_ids: ``[N, T]``.
        mask: ``[N, T]``, True on caption tokens.
        temperature: > 0.
        entropy: whether to return entropies too (without gradient).

    Returns:
        ``[N, T]`` float32 log-probs, 0 where masked; ``[N, T]`` entropies in nats or None.
    """
    width = token_ids.shape[1]
    full = dict(inputs)
    pad = torch.where(mask, token_ids, inputs["input_ids"].new_zeros(()))  # padding may be any ordinary token
    full["input_ids"] = torch.cat([inputs["input_ids"], pad], 1)
    full["attention_mask"] = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"].dtype)], 1)
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in full:
            full[key] = torch.cat([full[key], torch.zeros_like(token_ids).to(full[key].dtype)], 1)
    if "image_grid_thw" not in full:  # 1-D positions; M-RoPE models compute their own from the grid
        full["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**full, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
    logits = logits.float() / temperature
    logps = logits.log_softmax(-1)
    chosen = logps.gather(-1, pad[..., None]).squeeze(-1)
    spread = None
    if entropy:
        with torch.no_grad():
            spread = torch.where(mask, -(logps.exp() * logps).sum(-1), 0.0)
    return torch.where(mask, chosen, 0.0), spread
