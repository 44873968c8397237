"""One rollout batch to one or more optimizer steps: micro-batches, clipping, skipping what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from balcap.algorithms import loss_normalizer, policy_loss, truncated_importance
from balcap.policy.prompts import Prompts
from balcap.trainer.tally import Tally
from balcap.types import Rollouts

if TYPE_CHECKING:
    from balcap.module import BalCapModule


class UpdatesDiverged(RuntimeError):
    """Too many optimizer updates in a row had a non-finite gradient."""


def update(module: BalCapModule, rollouts: Rollouts, prompts: Prompts, advantages: Tensor) -> Tally:
    """`module.updates_per_rollout` optimizer steps on one batch of rollouts.

    Every optimizer step sees the whole batch, in micro-batches whose losses share one denominator: the
    tokens (or sequences) of all ranks. Gradients are reduced on each rank's last backward pass. The first
    step's own log-probs are the old ones. A group whose advantages are all 0 moves nothing without a KL term, and
    is not forwarded then. Where the sampler's log-probs are others than the trainer's, because of its arithmetic
    or of older weights, the truncated importance ratio corrects it.

    Returns:
        Sums for ``train/loss``, ``kl``, ``clip_fraction``, ``entropy`` and ``grad_norm``, over what was
        forwarded, the size of one pass (`_book_size`) and the distance to the sampler (`_book_mismatch`).

    Raises:
        UpdatesDiverged: more than `module.max_skipped_updates` steps in a row were skipped because their
            gradient was not finite. The weights are those of the last good step.
    """
    tally, device = Tally(), module.device
    rows = _that_matter(advantages, module.kl_coef)
    micro = list(_micro_batches(module, rollouts, prompts, rows))
    world = module.trainer.world_size
    normalizer = loss_normalizer(rollouts.completion_mask, module.loss_aggregation)
    normalizer = module.gather(normalizer.to(device).float()).sum() / world  # DDP averages what ranks sum
    temperature = module.sampling.temperature
    ref = None
    if module.kl_coef:
        ref = [module.policy.reference_logps(rollouts, prompts, rows, temperature) for rows in micro]
    old: list[Tensor] = []
    importance: list[Tensor | None] = []
    cap = module.importance_cap if module.corrects else None
    _book_size(tally, module, rollouts, prompts, micro)
    module.policy.model.train()
    optimizer = module.optimizers()
    assert isinstance(optimizer, LightningOptimizer)
    for step in range(module.updates_per_rollout):
        optimizer.zero_grad()
        for i, rows in enumerate(micro):
            logps, entropy = module.policy.logps(rollouts, prompts, rows, temperature, entropy=step == 0)
            mask = rollouts.completion_mask[rows].to(device)
            if step == 0:
                sampler = rollouts.sampler_logps[rows].to(device)
                old.append(logps.detach())
                importance.append(truncated_importance(old[i], sampler, mask, cap) if cap else None)
                _book_mismatch(tally, old[i], sampler, mask, module.mismatch_threshold, cap)
            part = policy_loss(
                logps,
                old[i],
                advantages[rows].to(device),
                mask,
                ref[i] if ref else None,
                module.kl_coef,
                module.clip_eps_low,
                module.clip_eps_high,
                module.loss_aggregation,
                normalizer,
                importance[i],
            )
            with _without_sync(module, i < len(micro) - 1):
                module.manual_backward(part.loss)
            tally.add("loss", part.loss.detach(), 1 / len(micro))
            tally.add("clip_fraction", part.clipped, part.tokens)
            if part.kl is not None:
                tally.add("kl", part.kl, part.tokens)
            if entropy is not None:
                tally.add("entropy", entropy.sum(), part.tokens)
        tally.add("grad_norm", _step(module, optimizer), 1)
    return tally


def _that_matter(advantages: Tensor, kl_coef: float) -> list[int]:
    """Images with something to learn from; at least one, so that every rank takes part in the reduction."""
    if kl_coef:
        return list(range(len(advantages)))
    rows = advantages.ne(0).any(-1).nonzero()[:, 0].tolist()
    return rows or [0]


def _micro_batches(
    module: BalCapModule, rollouts: Rollouts, prompts: Prompts, rows: Sequence[int]
) -> Iterator[list[int]]:
    """Images that are forwarded together: at most `micro_batch_size`, and `max_tokens_per_forward` tokens
    unless one image alone has more."""
    most_images = module.micro_batch_size or len(rollouts)
    most_tokens = module.max_tokens_per_forward or float("inf")
    batch: list[int] = []
    for row in rows:
        fits = not batch or module.policy.size(rollouts, prompts, [*batch, row]).forwarded <= most_tokens
        if len(batch) == most_images or not fits:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _book_size(
    tally: Tally, module: BalCapModule, rollouts: Rollouts, prompts: Prompts, micro: Sequence[Sequence[int]]
) -> None:
    """``tokens_forwarded`` in one pass, the share of tokens that separate sequences would forward beyond
    that (``tokens_saved``), the share of padding in what attention or the forward works on, and ``tflops``,
    10^12 operations of the policy's forward and backward over distinct tokens in all passes, where they are known."""
    sizes = [module.policy.size(rollouts, prompts, rows) for rows in micro]
    forwarded, separate = sum(s.forwarded for s in sizes), sum(s.separate for s in sizes)
    tally.add("tokens_forwarded", forwarded, 1)
    tally.add("tokens_saved", separate - forwarded, separate)
    tally.add("padding", sum(s.padding * s.forwarded for s in sizes), forwarded)
    flops = [module.policy.flops(rollouts, prompts, rows) for rows in micro]
    if None not in flops:
        total = sum(part for part in flops if part is not None)
        tally.add("tflops", module.updates_per_rollout * total / 1e12, 1)


def _book_mismatch(
    tally: Tally, logps: Tensor, sampler: Tensor, mask: Tensor, threshold: float, cap: float | None
) -> None:
    """|log-prob of the trainer - log-prob of the sampler| over tokens, in nats: mean, largest, share beyond
    `threshold`; and the share of tokens whose importance ratio was cut at `cap`."""
    difference = (logps - sampler)[mask].double()
    distance, tokens = difference.abs(), mask.sum()
    tally.add("mismatch_mean", distance.sum(), tokens)
    tally.add("mismatch_share", (distance > threshold).sum(), tokens)
    tally.add_max("mismatch_max", distance.max() if len(distance) else 0.0)
    if cap is not None:
        tally.add("importance_capped", (difference > math.log(cap)).sum(), tokens)


def _without_sync(module: BalCapModule, active: bool) -> AbstractContextManager:
    """No gradient reduction in this backward pass, where the strategy has one to leave out."""
    wrapped = module.trainer.strategy.model
    no_sync = getattr(wrapped, "no_sync", None)
    return no_sync() if active and no_sync is not None else nullcontext()


def _step(module: BalCapModule, optimizer: Any) -> float:
    """Clip and step, or skip: gradients are already reduced, so that all ranks decide alike."""
    gradients = [p.grad for p in module.policy.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if not torch.isfinite(torch.tensor(norm)):
        optimizer.zero_grad()
        module.skipped_in_a_row += 1
        module.skipped_total += 1
        module.say(
            f"step {module.global_step}: the gradient is not finite; the update is skipped "
            f"({module.skipped_in_a_row} in a row)"
        )
        if module.skipped_in_a_row > module.max_skipped_updates:
            raise UpdatesDiverged(
                f"{module.skipped_in_a_row} updates in a row had a non-finite gradient. The weights are those of the "
                "last good update. Lower the learning rate (model.optimizer), clip harder (model.max_grad_norm), or "
                "use float32 weights (model.policy.dtype); model.max_skipped_updates is the limit"
            )
        return float("nan")
    module.skipped_in_a_row = 0
    if module.max_grad_norm is not None:
        module.clip_gradients(
            optimizer, gradient_clip_val=module.max_grad_norm, gradient_clip_algorithm="norm"
        )
    optimizer.step()
    scheduler = module.lr_schedulers()
    if scheduler is not None:
        scheduler.step()  # type: ignore[union-attr]
    return norm
