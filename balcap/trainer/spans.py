"""From the words that assertions come from to the tokens of captions."""

from __future__ import annotations

from typing import Any

import torch

from balcap.judge import Judgments
from balcap.judge.tasks import DecomposeSpans
from balcap.policy.offsets import token_offsets, tokens_of
from balcap.rewards import RewardSuite
from balcap.types import AssertionSpans, Rollouts


def assertion_spans(
    suite: RewardSuite, rollouts: Rollouts, judgments: Judgments, tokenizer: Any
) -> AssertionSpans:
    """Which tokens the assertions of each caption come from, and what each reward holds of them.

    Args:
        suite: of the K rewards.
        rollouts: of the captions.
        judgments: of them, with the words of each assertion.
        tokenizer: of the policy.
    """
    said, told = judgments[DecomposeSpans.name], [suite[name].verdicts(judgments) for name in suite.names]
    count = max((len(one) for row in said for one in row if one), default=0)
    shape = *rollouts.token_ids.shape[:2], count
    tokens = torch.zeros(*shape, rollouts.token_ids.shape[-1], dtype=torch.bool)
    verdicts = torch.full((*shape, len(suite)), torch.nan)
    for b, row in enumerate(said):
        for g, assertions in enumerate(row):
            if not assertions:
                continue
            ids = rollouts.token_ids[b, g][rollouts.completion_mask[b, g]].tolist()
            offsets = token_offsets(tokenizer, ids, rollouts.captions[b][g])
            for n, assertion in enumerate(assertions):
                if assertion.span is not None:
                    tokens[b, g, n, tokens_of(assertion.span, offsets)] = True
            for k, of_reward in enumerate(told):
                own = None if of_reward is None else of_reward[b][g]
                if own is not None:
                    verdicts[b, g, : len(assertions), k] = torch.tensor(own, dtype=torch.float32)
    return AssertionSpans(tokens, verdicts, rollouts.completion_mask)
