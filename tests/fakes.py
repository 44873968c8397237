"""Stand-ins for an engine and a judge's model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from typing import ClassVar

import torch
from lightning.pytorch import Callback

from balcap.judge import BudgetSpent
from balcap.policy.policy import Policy
from balcap.policy.prompts import Prompts
from balcap.rollout import RolloutEngine, Sampling
from balcap.rollout.base import Drawn
from balcap.trainer.distributed import stop_together
from balcap.types import CaptionBatch
from examples.shapes.oracle import Oracle


class FixedEngine(RolloutEngine):
    """Captions made from the reference, the same for the same image wherever and whenever it is sampled."""

    on_policy = True

    def _draw(
        self, policy: Policy, batch: CaptionBatch, prompts: Prompts, num_captions: int, sampling: Sampling
    ) -> Generator[Drawn]:
        tokenizer = policy.encoder.tokenizer
        for row, reference in enumerate(batch.references):
            texts = [self._caption(reference, g) for g in range(num_captions)]
            tokens = [torch.tensor([*tokenizer(t)["input_ids"], tokenizer.eos_token_id]) for t in texts]
            yield row, tokens, [torch.zeros(len(caption)) for caption in tokens]

    @staticmethod
    def _caption(reference: str, g: int) -> str:
        words = reference.split()
        return " ".join(words[: max(3, len(words) * (g + 1) // (g + 2))]) + "."


class CountingEngine(FixedEngine):
    """Remembers of which versions it was given the weights."""

    versions: ClassVar[list[int]] = []

    def attach(self, policy: Policy) -> None:
        super().attach(policy)
        self.versions.clear()

    def sync(self, policy: Policy, version: int) -> None:
        super().sync(policy, version)
        self.versions.append(version)


class CountingOracle(Oracle):
    """The oracle, which writes down every request that reaches it, in the file named by ``ORACLE_LOG``."""

    async def acompletion(self, *args, **kwargs):
        digest = hashlib.sha256(json.dumps(kwargs["messages"], sort_keys=True).encode()).hexdigest()
        with open(os.environ["ORACLE_LOG"], "a") as file:
            file.write(f"{digest}\n")
        return await super().acompletion(*args, **kwargs)


class SpendOnOneRank(Callback):
    """After the first step the budget is spent, and the last rank alone has noticed."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        noticed = trainer.global_rank == trainer.world_size - 1
        stop_together(trainer, BudgetSpent("the budget is spent") if noticed else None)
