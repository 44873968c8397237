"""Supervised fine-tuning: one batch of references to one or more optimizer steps on their cross-entropy."""

from __future__ import annotations

from contextlib import nullcontext

from balcap.algorithms import aggregate
from balcap.policy.checkpointing import explained_out_of_memory
from balcap.policy.policy import Policy
from balcap.policy.prompts import Prompts
from balcap.trainer.tally import Tally
from balcap.trainer.update import (
    OptimizerLoop,
    UpdateSettings,
    keep_step,
    optimizer_step,
    prepare_passes,
    record_size,
)
from balcap.types import Rollouts


@explained_out_of_memory()
def supervised_update(
    policy: Policy, settings: UpdateSettings, references: Rollouts, prompts: Prompts, loop: OptimizerLoop
) -> Tally:
    """`settings.updates_per_rollout` optimizer steps on the negative log-likelihood of the references, at temperature 1.

    With ``token_mean`` the loss is the mean over the tokens of all ranks, their ends included: the cross-entropy that
    transformers computes from ``labels``. Micro-batches, clipping and steps are those of `update`.

    Args:
        policy: what is trained.
        settings: how; those of clipping, KL and importance are not used.
        references: of this rank (`balcap.rollout.references`).
        prompts: of the same images.
        loop: the trainer's part.

    Returns:
        Sums for ``train/loss``, ``nll`` (nats per token) and ``grad_norm``, and the size of one pass (`record_size`).

    Raises:
        OutOfMemory: an update does not fit the device.
        UpdatesDiverged: as of `update`.
    """
    tally = Tally()
    micro, spare, normalizer = prepare_passes(
        policy, settings, references, prompts, range(len(references)), loop
    )
    policy.model.train()
    for _ in range(settings.updates_per_rollout):
        loop.optimizer.zero_grad()
        for i, rows in enumerate(micro):
            logps, _ = policy.logps(references, prompts, rows)
            mask = references.completion_mask[rows].to(policy.device, non_blocking=True)
            loss = aggregate(-logps, mask, settings.loss_aggregation, normalizer)
            with nullcontext() if i == len(micro) - 1 else loop.no_sync():
                loop.backward(loss)
            tally.add("loss", loss.detach(), 1 / len(micro))
            tally.add("nll", aggregate(-logps.detach(), mask, "token_mean", 1.0), mask.sum())
        keep_step(policy, references, prompts, spare, loop)
        tally.add("grad_norm", optimizer_step(policy, settings, loop), 1)
    record_size(tally, policy, settings, references, prompts, micro)
    return tally
