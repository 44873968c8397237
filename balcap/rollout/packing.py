"""From what a sampler returned to `Rollouts`: where captions end, padding, texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from balcap.types import CaptionBatch, Rollouts

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import PromptEncoder


def stop_token_ids(policy: Policy) -> list[int]:
    """End-of-sequence tokens: the generation config's, and the tokenizer's."""
    own = policy.model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [*ids, policy.encoder.tokenizer.eos_token_id] if i is not None})


def until_stop(tokens: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """``[t]`` tokens up to and with the first that ends a caption; all where none does."""
    stops = torch.isin(tokens, torch.tensor(stop_ids)).nonzero()
    return tokens[: int(stops[0]) + 1] if len(stops) else tokens


def group_texts(encoder: PromptEncoder, tokens: Sequence[Tensor], stop_ids: Sequence[int]) -> list[str]:
    """``[G]`` captions from the sampled tokens of one image, each ``[t]``; what follows an end token is left out."""
    return encoder.texts([until_stop(one, stop_ids) for one in tokens])


def pack(
    encoder: PromptEncoder,
    batch: CaptionBatch,
    token_ids: Sequence[Tensor],
    logps: Sequence[Tensor],
    stop_ids: Sequence[int],
    max_tokens: int,
    version: int,
) -> Rollouts:
    """`Rollouts` of B·G captions that stand image by image.

    Args:
        encoder: counts references and decodes captions.
        batch: the B images.
        token_ids: ``[B*G]`` sampled tokens, each ``[t]``; what follows the first end token is left out.
        logps: ``[B*G]`` log-probs of these tokens, each at least as long.
        stop_ids: tokens that end a caption.
        max_tokens: the limit of sampling: a caption of that length without an end was cut.
        version: of the weights that sampled.
    """
    B = len(batch)
    G = len(token_ids) // B
    kept = [until_stop(tokens, stop_ids) for tokens in token_ids]
    own = [row[: len(tokens)] for row, tokens in zip(logps, kept, strict=True)]
    stops = torch.tensor(stop_ids)
    ended = torch.tensor([bool(len(tokens)) and bool(torch.isin(tokens[-1], stops)) for tokens in kept])
    sizes = torch.tensor([len(tokens) for tokens in kept])
    width = max(1, int(sizes.max()))
    texts = encoder.texts(kept)

    def padded(rows: Sequence[Tensor], value: float) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])

    return Rollouts(
        batch=batch,
        captions=[texts[b * G : (b + 1) * G] for b in range(B)],
        token_ids=padded(kept, encoder.tokenizer.pad_token_id).long().view(B, G, width),
        completion_mask=(torch.arange(width)[None] < sizes[:, None]).view(B, G, width),
        sampler_logps=padded(own, 0.0).float().view(B, G, width),
        truncated=(~ended & (sizes >= max_tokens)).view(B, G),
        lengths=(sizes - ended.long()).view(B, G),
        reference_lengths=torch.tensor(encoder.count(batch.references), dtype=torch.long),
        weights_version=version,
    )
