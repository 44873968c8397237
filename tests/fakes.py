"""Stand-ins that satisfy the real protocols."""

from __future__ import annotations

import hashlib
import json
import os

import torch
from lightning.pytorch import Callback

from balcap.judge import BudgetSpent
from balcap.policy.policy import Policy
from balcap.policy.prompts import Prompts
from balcap.rollout import OnGroupDone, Sampling
from balcap.trainer.distributed import stop_together
from balcap.types import CaptionBatch, Rollouts
from examples.shapes.oracle import Oracle


class FixedEngine:
    """Captions made from the reference, the same for the same image wherever and whenever it is sampled."""

    on_policy = True

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.version = 0

    def attach(self, policy: Policy) -> None:
        self.policy = policy

    def sync(self, policy: Policy, version: int) -> None:
        self.policy, self.version = policy, version

    def close(self) -> None:
        self.policy = None

    def generate(
        self,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        sampling: Sampling,
        on_group_done: OnGroupDone | None = None,
    ) -> Rollouts:
        tokenizer = self.policy.encoder.tokenizer
        texts = [[self._caption(r, g) for g in range(num_captions)] for r in batch.references]
        for row, captions in enumerate(texts if on_group_done else []):
            on_group_done(row, captions)
        ids = [[tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in group] for group in texts]
        width = max(len(row) for group in ids for row in group)
        tokens = torch.full((len(ids), num_captions, width), tokenizer.pad_token_id)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for b, group in enumerate(ids):
            for g, row in enumerate(group):
                tokens[b, g, : len(row)] = torch.tensor(row)
                mask[b, g, : len(row)] = True
        return Rollouts(
            batch=batch,
            captions=texts,
            token_ids=tokens,
            completion_mask=mask,
            sampler_logps=torch.zeros(tokens.shape),
            truncated=torch.zeros(tokens.shape[:2], dtype=torch.bool),
            lengths=mask.sum(-1) - 1,
            reference_lengths=torch.tensor([len(tokenizer(r)["input_ids"]) for r in batch.references]),
            weights_version=self.version,
        )

    @staticmethod
    def _caption(reference: str, g: int) -> str:
        words = reference.split()
        return " ".join(words[: max(3, len(words) * (g + 1) // (g + 2))]) + "."


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
