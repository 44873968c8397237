"""Log-probabilities of captions under a model: one padded forward, the prompt repeated for every caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from balcap.policy.families import family_of
from balcap.policy.prompts import PER_TOKEN, Prompts


def caption_logps(
    model: Any,
    prompts: Prompts,
    rows: Sequence[int],
    token_ids: Int[Tensor, "b G T"],
    mask: Bool[Tensor, "b G T"],
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Float[Tensor, "b G T"], Float[Tensor, "b G T"] | None]:
    """Log-probability, and on request entropy, of every caption token.

    Prompts are padded on the left and captions on the right, so that a prompt's last token stands right
    before its caption. Logits are divided by the sampling temperature: the distribution that the
    captions were drawn from, before top-p, is the one that is trained.

    Args:
        model: an HF image-text-to-text model.
        prompts: of the whole batch.
        rows: the images, positions in the batch.
        token_ids: of their captions.
        mask: True on caption tokens.
        temperature: > 0.
        entropy: whether to return entropies too (without gradient).

    Returns:
        float32 log-probs, 0 where masked; entropies in nats, likewise, or None.
    """
    T, flat = mask.shape[-1], mask.flatten(0, 1)
    width = max(1, int(flat.any(0).sum()))  # the longest caption of these rows
    flat = flat[:, :width]
    # Padding may hold any token, placeholders too: 0 is an ordinary one.
    ids = torch.where(flat, token_ids.flatten(0, 1)[:, :width], 0)
    logits = caption_logits(model, prompts, rows, ids, flat)
    logps = (logits.float() / temperature).log_softmax(-1)  # [b * G, width, V]

    def unflatten(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.where(flat, x, 0.0), (0, T - width)).view(mask.shape)

    chosen = unflatten(logps.gather(-1, ids[..., None]).squeeze(-1))
    if not entropy:
        return chosen, None
    with torch.no_grad():
        return chosen, unflatten(-(logps.exp() * logps).sum(-1))


def caption_logits(
    model: Any, prompts: Prompts, rows: Sequence[int], ids: Int[Tensor, "bG T"], mask: Bool[Tensor, "bG T"]
) -> Float[Tensor, "bG T V"]:
    """What each token of a caption was drawn from, in the model's dtype.

    Args:
        model: an HF image-text-to-text model.
        prompts: of the whole batch.
        rows: the b images, positions in the batch.
        ids: G captions of each, those of one image together; no image token, also where masked.
        mask: True on caption tokens, padding on the right.
    """
    inputs = prompts.inputs(rows, len(ids) // len(rows), ids.device)
    more = {"input_ids": ids, "attention_mask": mask}
    for key in PER_TOKEN:
        if key in inputs:
            captions = more.get(key, torch.zeros_like(ids)).to(inputs[key].dtype)
            inputs[key] = torch.cat([inputs[key], captions], 1)
    inputs |= family_of(model).sequence_inputs(inputs)
    return model(**inputs, logits_to_keep=ids.shape[1] + 1, use_cache=False).logits[:, :-1]
