"""One rollout batch to one or more optimizer steps: micro-batches, clipping, skipping what is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from balcap.algorithms import loss_normalizer, policy_loss, truncated_importance
from balcap.algorithms.loss import LossAggregation, PolicyLoss
from balcap.policy.checkpointing import DeviceFit, explained_out_of_memory
from balcap.policy.policy import Policy
from balcap.policy.prompts import Prompts
from balcap.policy.sharding import whole
from balcap.trainer.tally import Tally
from balcap.types import Rollouts
from balcap.utils.errors import UserError

log = logging.getLogger(__name__)


class UpdatesDiverged(UserError):
    """Too many optimizer updates in a row had a non-finite gradient."""


@dataclass(frozen=True)
class UpdateSettings:
    """How a batch of rollouts becomes optimizer steps.

    Args:
        clip_eps_low: lower clip range of the importance ratio, in (0, 1).
        clip_eps_high: upper clip range, above 0.
        loss_aggregation: ``token_mean`` over all caption tokens of the step, or ``sequence_mean``, the mean
            over captions of their token means.
        kl_coef: weight of the KL (k3) to the reference; 0 keeps no reference.
        importance_cap: where another engine or older weights sampled, a token's loss is multiplied with the
            importance ratio of trainer to sampler, at most this (truncated importance sampling); null
            corrects nothing. Samples of the policy itself with lag 0 need no correction.
        mismatch_threshold: nats of difference between the log-probs of sampler and trainer beyond which a token
            counts in ``train/mismatch_share``.
        updates_per_rollout: optimizer steps on each batch of rollouts.
        micro_batch_size: images (with their G captions) per forward pass; null takes all at once.
        max_tokens_per_forward: tokens per forward pass, all images packed into it together; an image with more
            has a pass of its own; null for no limit. The memory of an update grows with it. ``auto``: as many as fit
            the CUDA device without gradient checkpointing, or with it where it is always on; no limit on other devices.
        max_grad_norm: clip the gradient to this norm; null does not clip.
        max_skipped_updates: end the run when more updates in a row than this had a non-finite gradient.
    """

    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    loss_aggregation: LossAggregation = "token_mean"
    kl_coef: float = 0.0
    importance_cap: float | None = 2.0
    mismatch_threshold: float = 0.1
    updates_per_rollout: int = 1
    micro_batch_size: int | None = None
    max_tokens_per_forward: int | Literal["auto"] | None = "auto"
    max_grad_norm: float | None = 1.0
    max_skipped_updates: int = 5

    def problems(self, key: str = "model") -> list[str]:
        """What is out of range, each with the key to change."""
        cap, norm = self.importance_cap, self.max_grad_norm
        rules = [
            ("clip_eps_low", 0 < self.clip_eps_low < 1, "is outside (0, 1)"),
            ("clip_eps_high", 0 < self.clip_eps_high < math.inf, "must be above 0"),
            ("kl_coef", 0 <= self.kl_coef < math.inf, "would reward drifting away; use 0 or more"),
            ("mismatch_threshold", 0 <= self.mismatch_threshold < math.inf, "must be at least 0"),
            ("max_grad_norm", norm is None or 0 < norm < math.inf, "must be above 0, or null"),
            ("max_skipped_updates", self.max_skipped_updates >= 0, "must be at least 0"),
            (
                "importance_cap",
                cap is None or 1 <= cap < math.inf,
                "would reduce the weight of captions that sampler and trainer agree on; use 1 or more, or null",
            ),
        ]
        for name in ("updates_per_rollout", "micro_batch_size", "max_tokens_per_forward"):
            value = getattr(self, name)
            rules.append((name, value in (None, "auto") or value >= 1, "must be at least 1"))
        return [f"{key}.{name}: {getattr(self, name)} {rule}" for name, holds, rule in rules if not holds]


@dataclass
class OptimizerLoop:
    """What an update needs of the trainer, and what it counts over the run.

    Attributes:
        optimizer: of the trainable parameters.
        scheduler: of the learning rate, stepped after each optimizer step, or None.
        backward: of a loss.
        clip: the gradients to a norm.
        no_sync: context in which a backward pass reduces no gradients over ranks.
        all_gather: ``[...]`` -> ``[ranks, ...]``, or itself on one rank.
        world_size: number of ranks.
        skipped: updates of the run that were skipped because their gradient was not finite.
        skipped_in_a_row: of them the latest ones.
    """

    optimizer: Any
    scheduler: Any
    backward: Callable[[Tensor], None]
    clip: Callable[[float], None]
    no_sync: Callable[[], AbstractContextManager[Any]]
    all_gather: Callable[[Tensor], Tensor]
    world_size: int = 1
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def of(
        cls, module: LightningModule, all_gather: Callable[[Tensor], Tensor], skipped: int = 0
    ) -> OptimizerLoop:
        """Of a module with one optimizer, in a fit."""
        optimizer = module.optimizers()

        def clip(norm: float) -> None:
            module.clip_gradients(optimizer, gradient_clip_val=norm, gradient_clip_algorithm="norm")  # type: ignore[arg-type]

        no_sync = getattr(module.trainer.strategy.model, "no_sync", nullcontext)
        world_size = module.trainer.world_size
        return cls(
            optimizer,
            module.lr_schedulers(),
            module.manual_backward,
            clip,
            no_sync,
            all_gather,
            world_size,
            skipped,
        )


@explained_out_of_memory()
def update(
    policy: Policy,
    settings: UpdateSettings,
    rollouts: Rollouts,
    prompts: Prompts,
    advantages: Tensor,
    loop: OptimizerLoop,
    temperature: float = 1.0,
    needs_importance_correction: bool = False,
) -> Tally:
    """`settings.updates_per_rollout` optimizer steps on one batch of rollouts.

    Every optimizer step sees the whole batch, in micro-batches whose losses share one denominator: the
    tokens (or sequences) of all ranks. Gradients are reduced on each rank's last backward pass. An
    optimizer step reads one number from the device, the gradient's norm; what the tally holds stays there. The first
    step's own log-probs are the old ones. A group whose advantages are all 0 moves nothing without a KL term, and
    is not forwarded then.

    Args:
        policy: what is trained.
        settings: how.
        rollouts: of this rank.
        prompts: of the same images.
        advantages: ``[B, G]``, or ``[B, G, T]`` for one per token.
        loop: the trainer's part.
        temperature: that the captions were sampled at.
        needs_importance_correction: whether the sampler's distribution is another than the policy's, because of
            its arithmetic or of older weights; the truncated importance ratio then corrects it.

    Returns:
        Sums for ``train/loss``, ``kl``, ``clip_fraction``, ``entropy`` and ``grad_norm``, over what was
        forwarded, the size of one pass (`record_size`) and the distance to the sampler (`record_mismatch`).

    Raises:
        OutOfMemory: an update does not fit the device.
        UpdatesDiverged: more than `settings.max_skipped_updates` steps in a row were skipped because their
            gradient was not finite. The weights are those of the last good step.
    """
    tally, device = Tally(), policy.device

    def there(tensor: Tensor) -> Tensor:
        """On the device, without waiting for what it has to do before."""
        return tensor.to(device, non_blocking=True)

    rows = rows_with_nonzero_advantage(advantages, settings.kl_coef)
    micro, spare, normalizer = prepare_passes(policy, settings, rollouts, prompts, rows, loop)
    ref = None
    if settings.kl_coef:
        passes = [*micro, *spare]
        ref = [policy.reference_logps(rollouts, prompts, rows, temperature) for rows in passes]
    old: list[Tensor] = []
    importance: list[Tensor | None] = []
    cap = settings.importance_cap if needs_importance_correction else None
    policy.model.train()
    for step in range(settings.updates_per_rollout):
        loop.optimizer.zero_grad()
        for i, rows in enumerate(micro):
            logps, entropy = policy.logps(rollouts, prompts, rows, temperature, entropy=step == 0)
            mask = there(rollouts.completion_mask[rows])
            if step == 0:
                sampler = there(rollouts.sampler_logps[rows])
                old.append(logps.detach())
                importance.append(truncated_importance(old[i], sampler, mask, cap) if cap else None)
                record_mismatch(tally, old[i], sampler, mask, settings.mismatch_threshold, cap)
            part = policy_loss(
                logps,
                old[i],
                there(advantages[rows]),
                mask,
                ref[i] if ref else None,
                settings.kl_coef,
                settings.clip_eps_low,
                settings.clip_eps_high,
                settings.loss_aggregation,
                normalizer,
                importance[i],
            )
            with nullcontext() if i == len(micro) - 1 else loop.no_sync():
                loop.backward(part.loss)
            _record_loss(tally, part, entropy, 1 / len(micro))
        keep_step(policy, rollouts, prompts, spare, loop)
        tally.add("grad_norm", optimizer_step(policy, settings, loop), 1)
    record_size(tally, policy, settings, rollouts, prompts, micro)
    return tally


def prepare_passes(
    policy: Policy,
    settings: UpdateSettings,
    rollouts: Rollouts,
    prompts: Prompts,
    rows: Sequence[int],
    loop: OptimizerLoop,
) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """How an update goes through these images.

    Returns:
        The micro-batches; those that a rank with fewer passes than others forwards once more for `keep_step`, where the
        policy is sharded; and the denominator that losses share: that of all ranks.
    """
    fit = DeviceFit(policy, rollouts, prompts, loop.optimizer)
    micro = list(micro_batches(policy, settings, rollouts, prompts, rows, fit))
    fit.checkpoint(micro)
    normalizer = loss_normalizer(rollouts.completion_mask, settings.loss_aggregation)
    everywhere = loop.all_gather(normalizer.to(policy.device, non_blocking=True).float())
    spare = []
    if policy.is_sharded:
        most = int(loop.all_gather(torch.tensor(len(micro), device=policy.device)).max())
        smallest = min(chain(*micro), key=lambda row: policy.size(rollouts, prompts, [row]).forwarded)
        spare = [[smallest]] * (most - len(micro))
    return micro, spare, everywhere.sum() / loop.world_size  # DDP and FSDP average what ranks sum


def keep_step(
    policy: Policy, rollouts: Rollouts, prompts: Prompts, spare: Sequence[Sequence[int]], loop: OptimizerLoop
) -> None:
    """Forward and backward without effect: passes of a sharded policy are collectives, and other ranks have more of them.

    Args:
        policy: that is updated.
        rollouts: of this rank.
        prompts: of the same images.
        spare: of `prepare_passes`.
        loop: the trainer's part.
    """
    for rows in spare:
        logps, _ = policy.logps(rollouts, prompts, rows)
        loop.backward(logps.sum() * 0)


def rows_with_nonzero_advantage(advantages: Tensor, kl_coef: float) -> list[int]:
    """Images with something to learn from; at least one, so that every rank takes part in the reduction.

    Of a group without spread whitening leaves the mean over the batch, which is 0 up to rounding.
    """
    if kl_coef:
        return list(range(len(advantages)))
    rows = (advantages.flatten(1).abs() > 1e-5).any(-1).nonzero()[:, 0].tolist()
    return rows or [0]


def micro_batches(
    policy: Policy,
    settings: UpdateSettings,
    rollouts: Rollouts,
    prompts: Prompts,
    rows: Sequence[int],
    fit: DeviceFit | None = None,
) -> Iterator[list[int]]:
    """Images that are forwarded together: at most `micro_batch_size`, and `max_tokens_per_forward` tokens
    unless one image alone has more. What is ``auto`` there, `fit` knows; without it everything fits."""
    most_images = settings.micro_batch_size or len(rollouts)
    most_tokens = settings.max_tokens_per_forward or math.inf

    def fits(together: list[int]) -> bool:
        if most_tokens == "auto":
            return fit is None or fit.holds(together)
        return policy.size(rollouts, prompts, together).forwarded <= most_tokens

    batch: list[int] = []
    for row in rows:
        if batch and (len(batch) == most_images or not fits([*batch, row])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _record_loss(tally: Tally, part: PolicyLoss, entropy: Tensor | None, share: float) -> None:
    """Of one micro-batch, which is this share of the optimizer step."""
    tally.add("loss", part.loss.detach(), share)
    tally.add("clip_fraction", part.clipped, part.tokens)
    if part.kl is not None:
        tally.add("kl", part.kl, part.tokens)
    if entropy is not None:
        tally.add("entropy", entropy.sum(), part.tokens)


def record_size(
    tally: Tally,
    policy: Policy,
    settings: UpdateSettings,
    rollouts: Rollouts,
    prompts: Prompts,
    micro: Sequence[Sequence[int]],
) -> None:
    """``tokens_forwarded`` in one pass, the share of tokens that separate sequences would forward beyond
    that (``tokens_saved``), the share of padding in what attention or the forward works on, and ``tflops``,
    10^12 operations of forward and backward over distinct tokens in all passes, where they are known; and the share of
    images whose features were read from the cache (``features_cached``), where there is one."""
    sizes = [policy.size(rollouts, prompts, rows) for rows in micro]
    forwarded, separate = sum(s.forwarded for s in sizes), sum(s.separate for s in sizes)
    tally.add("tokens_forwarded", forwarded, 1)
    tally.add("tokens_saved", separate - forwarded, separate)
    tally.add("padding", sum(s.padding * s.forwarded for s in sizes), forwarded)
    flops = [policy.flops(rollouts, prompts, rows) for rows in micro]
    if None not in flops:
        total = sum(part for part in flops if part is not None)
        tally.add("tflops", settings.updates_per_rollout * total / 1e12, 1)
    if policy.feature_cache is not None:
        tally.add("features_cached", len(prompts.cached), len(prompts.features))


def record_mismatch(
    tally: Tally, logps: Tensor, sampler: Tensor, mask: Tensor, threshold: float, cap: float | None
) -> None:
    """|log-prob of the trainer - log-prob of the sampler| over tokens, in nats: mean, largest, share beyond
    `threshold`; and the share of tokens whose importance ratio was cut at `cap`."""
    difference = torch.where(mask, logps - sampler, 0.0).double()  # to pick tokens by a mask, the host waits
    distance, tokens = difference.abs(), mask.sum()
    tally.add("mismatch_mean", distance.sum(), tokens)
    tally.add("mismatch_share", (distance > threshold).sum(), tokens)
    tally.add_max("mismatch_max", distance.max())
    if cap is not None:
        tally.add("importance_capped", (difference > math.log(cap)).sum(), tokens)


def optimizer_step(policy: Policy, settings: UpdateSettings, loop: OptimizerLoop) -> float:
    """Clip and step, or skip; the gradient's norm, NaN where skipped. Gradients are reduced: all ranks decide alike."""
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    norm = float(whole(torch.nn.utils.get_total_norm(gradients))) if gradients else 0.0
    if not math.isfinite(norm):
        loop.optimizer.zero_grad()
        loop.skipped_in_a_row += 1
        loop.skipped += 1
        rank_zero_only(log.warning)(
            "the gradient is not finite; the update is skipped (%d in a row)", loop.skipped_in_a_row
        )
        if loop.skipped_in_a_row > settings.max_skipped_updates:
            raise UpdatesDiverged(
                f"{loop.skipped_in_a_row} updates in a row had a non-finite gradient. The weights are those of the "
                "last good update. Lower the learning rate (model.optimizer), clip harder (model.max_grad_norm), or "
                "use float32 weights (model.policy.dtype); model.max_skipped_updates is the limit"
            )
        return math.nan
    loop.skipped_in_a_row = 0
    if settings.max_grad_norm is not None:
        loop.clip(settings.max_grad_norm)
    loop.optimizer.step()
    if loop.scheduler is not None:
        loop.scheduler.step()
    return norm
