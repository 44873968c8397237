"""Log-probabilities of captions with one vision pass and one prompt per image, whatever G is.

Exact: log-probs and gradients are those of one sequence per caption (`balcap.policy.logps`). Captions attend
to the prompt's states, so the prompt's part of the language model keeps its gradient, from all G captions
at once. For P prompt tokens and captions of T tokens, P + G·T tokens are forwarded instead of G·(P + T).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from balcap.policy.families import ImageFeatures, base_of, family_of
from balcap.policy.head import Chunk, token_logps
from balcap.policy.layout import Layout
from balcap.policy.prompts import Prompts

logger = logging.getLogger(__name__)


def prepare_shared_prefix(model: Any) -> bool:
    """Set the model up for `shared_prefix_logps`; False, with one line in the log, where it cannot be."""
    base, family = base_of(model), family_of(model)
    obstacle = family.obstacle(base)
    if obstacle:
        logger.warning(
            "model.policy.shared_prefix: %s; captions repeat their prompt in each forward", obstacle
        )
        return False
    family.prepare_shared_prefix(base)
    return True


def shared_prefix_logps(
    model: Any,
    prompts: Prompts,
    rows: Sequence[int],
    token_ids: Int[Tensor, "b G T"],
    mask: Bool[Tensor, "b G T"],
    features: Sequence[ImageFeatures],
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: Chunk | None = None,
) -> tuple[Float[Tensor, "b G T"], Float[Tensor, "b G T"] | None]:
    """As `caption_logps`, for all captions of some images in one packed sequence.

    Args:
        model: prepared by `prepare_shared_prefix`.
        prompts: of the whole batch.
        rows: the images, positions in the batch.
        token_ids: of their captions, on the CPU: what is picked by a mask on a device, the host must wait for.
        mask: True on caption tokens; on the CPU.
        features: ``[b]`` of each image, from `Family.image_features`.
        temperature: > 0.
        entropy: whether to return entropies too (nats, without gradient).
        chunk: of the head, see `token_logps`.

    Returns:
        float32 log-probs on the model's device, 0 where masked; entropies likewise or None.
    """
    base, family, device = base_of(model), family_of(model), features[0].embeds.device

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    items = [prompts.items[row] for row in rows]
    layout = Layout([item["input_ids"].shape[1] for item in items], mask.sum(-1).tolist(), device)
    prompt_positions = [family.prompt_positions(base, item) for item in items]
    ids, positions = _sequence(items, prompt_positions, token_ids, layout)
    embeds = base.get_input_embeddings()(there(ids))
    placeholders = ids == prompts.image_token_id
    places = there(placeholders[0].nonzero()[:, 0])
    pixels = torch.cat([of_image.embeds for of_image in features]).to(embeds.dtype)
    states = family.language_model(base)(
        inputs_embeds=embeds.index_copy(1, places, pixels[None]),
        attention_mask=embeds.new_zeros(1, 1, 1, 1),  # four dimensions: transformers makes none of its own
        position_ids=there(positions),
        use_cache=False,
        packed_attention=partial(family.attention, layout=layout.attention),
        **family.language_model_inputs(base, features, there(placeholders), layout.attention),
    ).last_hidden_state[0]
    logps, entropies = token_logps(
        base.get_output_embeddings(),
        states[layout.predictors],
        there(token_ids[mask]),
        temperature,
        entropy,
        chunk=chunk,
    )
    tokens = there(mask.flatten().nonzero()[:, 0])

    def unpacked(values: Tensor) -> Tensor:
        return values.new_zeros(mask.numel()).index_copy(0, tokens, values).view(mask.shape)

    return unpacked(logps), None if entropies is None else unpacked(entropies)


def _sequence(
    items: Sequence[dict[str, Tensor]], prompt_positions: Sequence[Tensor], token_ids: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Token ids ``[1, N]`` and positions, ``[3, 1, N]`` with M-RoPE and ``[1, N]`` without; on the CPU."""
    ids, positions = [], []
    images = zip(items, prompt_positions, token_ids, layout.spans, strict=True)
    for item, prompt, captions, span in images:
        start = int(prompt.max()) + 1
        ids.append(item["input_ids"][0])
        ids += [caption[:n] for caption, n in zip(captions, span.captions, strict=True)]
        steps = torch.cat([torch.arange(start, start + n) for n in span.captions])
        positions += [prompt, steps.expand(len(prompt), -1)]
    packed = torch.cat(positions, 1)  # [R, N]
    return torch.cat(ids)[None], packed[:, None] if len(packed) == 3 else packed
