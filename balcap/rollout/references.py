"""The references in place of sampled captions: what supervised fine-tuning learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from balcap.rollout.base import pack, stop_token_ids, until_stop
from balcap.types import CaptionBatch, Rollouts

if TYPE_CHECKING:
    from balcap.policy.policy import Policy


def reference_rollouts(policy: Policy, batch: CaptionBatch, max_tokens: int, version: int) -> Rollouts:
    """The reference of each image as its one caption, G = 1, as if the policy had said it.

    It ends as the chat template ends an answer, else with the tokenizer's end-of-sequence token. A longer one than
    `max_tokens` is cut, has no end, and counts as truncated.

    Args:
        policy: whose tokens.
        batch: the images.
        max_tokens: of the longest caption, its end included.
        version: number of optimizer updates behind the policy's weights.
    """
    stop_ids, end = stop_token_ids(policy), torch.tensor([policy.encoder.tokenizer.eos_token_id])
    groups = []
    for ids in policy.encoder.answers(batch):
        kept = until_stop(torch.cat([ids, end]), stop_ids)[:max_tokens]
        groups.append((policy.encoder.texts([kept]), [kept], [torch.zeros(len(kept))]))
    return pack(policy.encoder, batch, groups, stop_ids, max_tokens, version)
