"""From what a sampler returned to `Rollouts`: where captions end, padding, texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def pack(
    encoder: PromptEncoder,
    batch: CaptionBatch,
    groups: Sequence[tuple[Sequence[str], Sequence[Tensor], Sequence[Tensor]]],
    stop_ids: Sequence[int],
    max_tokens: int,
    version: int,
) -> Rollouts:
    """`Rollouts` of the captions of all images.

    Args:
        encoder: counts references.
        batch: the B images.
        groups: ``[B]`` texts of an image's G captions, their tokens until they stop, each ``[t]`` with t > 0, and
            log-probs of these tokens, each at least as long.
        stop_ids: tokens that end a caption.
        max_tokens: the limit of sampling: a caption of that length without an end was cut.
        version: of the weights that sampled.
    """
    captions, tokens, logps = zip(*groups, strict=True)
    shape = len(batch), len(tokens[0]), -1
    rows = list(chain(*tokens))
    own = [logp[: len(row)] for logp, row in zip(chain(*logps), rows, strict=True)]
    sizes = torch.tensor([len(row) for row in rows])
    ended = torch.isin(torch.stack([row[-1] for row in rows]), torch.tensor(stop_ids))
    return Rollouts(
        batch=batch,
        captions=list(captions),
        token_ids=pad_sequence(rows, True, encoder.tokenizer.pad_token_id).view(shape),
        completion_mask=(torch.arange(int(sizes.max())) < sizes[:, None]).view(shape),
        sampler_logps=pad_sequence(own, True).float().view(shape),
        truncated=(~ended & (sizes >= max_tokens)).view(shape[:2]),
        lengths=(sizes - ended.long()).view(shape[:2]),
        reference_lengths=torch.tensor(encoder.count(batch.references), dtype=torch.long),
        weights_version=version,
    )
