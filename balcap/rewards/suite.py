"""The rewards of a run: gather what they need, once, then score."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from balcap.judge import Group, Judge, Judgments, Task
from balcap.judge.tasks import DecomposeSpans
from balcap.rewards.base import Reward
from balcap.types import CaptionBatch, Rollouts

_REASONS = 5


class RewardSuite(nn.Module):
    """K rewards in a fixed order.

    Args:
        rewards: at least one; their names must differ.
        spans: also gather the words that each assertion comes from, which costs the judge some more tokens.
        coverage: also gather what rewards need to say which assertions earn them (`Reward.needs_for_spans`).

    Raises:
        ValueError: if there is none or two share a name.
    """

    def __init__(self, rewards: Sequence[Reward], spans: bool = False, coverage: bool = False):
        super().__init__()
        names = [reward.name for reward in rewards]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if not names or twice:
            wrong = f"two rewards are called {', '.join(twice)}" if twice else "there is no reward"
            raise ValueError(f"model.rewards: {wrong}; name at least one, each under its own name")
        self.rewards = nn.ModuleList(rewards)
        self.names = tuple(names)
        needed = [task for reward in rewards for task in reward.needs] + [DecomposeSpans] * spans
        needed += [task for reward in rewards for task in reward.needs_for_spans] * coverage
        self.needs: tuple[type[Task[Any]], ...] = tuple(dict.fromkeys(needed))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Reward:
        """The reward of this name; KeyError if there is none."""
        if name not in self.names:
            raise KeyError(name)
        reward = self.rewards[self.names.index(name)]
        assert isinstance(reward, Reward)
        return reward

    def gather(self, judge: Judge, rollouts: Rollouts) -> Judgments:
        """All judgments that the rewards need, all groups at once; waits for them.

        A judgment that fails is None. The judge's failures raise nothing; an unusable cache does.

        Raises:
            StoreError: if the judge's cache or ledger cannot be used.
        """

        async def everything() -> Judgments:
            groups = enumerate(rollouts.captions)
            return merge(
                await asyncio.gather(*(self.gather_group(judge, rollouts.batch, *group) for group in groups))
            )

        return judge.run(everything())

    async def gather_group(
        self, judge: Judge, batch: CaptionBatch, row: int, captions: Sequence[str]
    ) -> Judgments:
        """The judgments of the ``[G]`` captions of one image of a batch, as a batch of B = 1; runs on the judge's loop.

        `merge` puts groups together that were gathered one by one, as their captions came.
        """
        files, reference = batch.image_bytes[row], batch.references[row]
        columns = {name: values[row] for name, values in batch.extras.items()}
        units = columns.get("reference_units")
        group = Group(judge, batch.sample_ids[row], files, reference, captions, units, columns)
        return await group.judgments(self.needs)

    def forward(self, rollouts: Rollouts, judgments: Judgments) -> Float[Tensor, "B G K"]:
        """Scores in [0, 1], float32, in the order of `names`; NaN where missing. Accumulates every reward."""
        return torch.stack([reward(rollouts, judgments) for reward in self.rewards], dim=-1)


def merge(groups: Sequence[Judgments]) -> Judgments:
    """The judgments of several groups as one batch, in this order.

    `failures` counts the answers that are missing per task, over ``[B, G]``: a caption whose decomposition
    failed misses its verify and match answers too, and counts once under each name. What the provider did
    is in `Judge.stats`, where only decompose counts then.
    """
    return Judgments(
        answers={
            name: [row for group in groups for row in group[name]]
            for name in (groups[0].answers if groups else ())
        },
        units=[units for group in groups for units in group.units],
        failures=sum((group.failures for group in groups), Counter()),
        reasons=list(dict.fromkeys(reason for group in groups for reason in group.reasons))[:_REASONS],
    )
