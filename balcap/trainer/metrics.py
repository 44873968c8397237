"""What a step reports about itself: rewards, the update, the judge, time and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from balcap.algorithms import LengthMask, RewardTransform, length_ratio, within_length_bounds
from balcap.judge import JudgeStats, Judgments
from balcap.policy.flops import peak_flops, peak_memory
from balcap.rewards import b_capscore
from balcap.trainer.distributed import gather, sums
from balcap.trainer.pipeline import RolloutPipeline
from balcap.trainer.tally import Tally
from balcap.trainer.timeline import Timeline
from balcap.trainer.update import OptimizerLoop
from balcap.types import Rollouts

JUDGE_COUNTS = ("calls", "cache_hits", "tokens_in", "tokens_out")
PARTS = ("precision", "recall", "linguistic")


def reward_metrics(tally: Tally, names: Sequence[str], rewards: Tensor) -> None:
    """Add mean, spread within groups and share of constant groups of each reward.

    Args:
        tally: added to.
        names: ``[K]``.
        rewards: ``[B, G, K]`` before the reward transforms.
    """
    for k, name in enumerate(names):
        values = rewards[..., k].double()
        tally.add_values(name, values)
        spread = _group_std(values)
        tally.add_values(f"reward_std/{name}", spread)
        constant = torch.where(spread.isnan(), spread, (spread == 0).double())
        tally.add_values(f"zero_variance/{name}", constant)


def caption_scores(
    rollouts: Rollouts, names: Sequence[str], rewards: Tensor, transforms: Sequence[RewardTransform]
) -> dict[str, Tensor]:
    """What training and validation report beside the rewards; each ``[B, G]``.

    Args:
        rollouts: that were rewarded.
        names: ``[K]`` of the rewards.
        rewards: ``[B, G, K]`` before the reward transforms.
        transforms: of the run. Outside the bounds of its length mask, or of the paper's where there is none, a caption
            counts as ``length_masked``.
    """
    mask = next((one for one in transforms if isinstance(one, LengthMask)), LengthMask())
    lengths, references = rollouts.lengths, rollouts.reference_lengths
    scores = {
        "length_ratio": length_ratio(lengths, references),
        "caption_tokens": lengths.double(),
        "length_masked": (~within_length_bounds(lengths, references, mask.tau_low, mask.tau_high)).double(),
        "truncated": rollouts.truncated.double(),
    }
    if set(PARTS) <= set(names):
        scores["b_capscore"] = b_capscore(*(rewards[..., list(names).index(name)] for name in PARTS))
    return scores


def step_metrics(
    trainer: Trainer,
    pipeline: RolloutPipeline,
    loop: OptimizerLoop,
    tally: Tally,
    rollouts: Rollouts,
    judgments: Judgments,
    before: JudgeStats,
) -> dict[str, float]:
    """Everything that a training step logs, by name: over all ranks, but for ``time/*``, which is this rank's.

    Args:
        trainer: whose ranks.
        pipeline: that sampled and had captions judged.
        loop: that updated.
        tally: of the step.
        rollouts: of this rank.
        judgments: of them.
        before: the judge's counts at the beginning of the step.
    """
    logged = train_metrics(trainer, tally, loop)
    missing = sum(judgments.failures.values())
    logged |= judge_metrics(trainer, pipeline.judge_stats() - before, missing)
    logged |= judge_costs(trainer, pipeline)
    device = trainer.strategy.root_device
    logged |= time_metrics(pipeline.timeline, rollouts, device)
    logged["time/sync_gb"] = pipeline.sync_bytes() / 1e9
    return logged | utilisation(pipeline, logged.get("train/tflops"), peak_flops(device))


def train_metrics(trainer: Trainer, tally: Tally, loop: OptimizerLoop) -> dict[str, float]:
    """``train/*``: what the tally holds, over all ranks; skipped updates and the learning rate."""

    def everywhere(tensor: Tensor) -> Tensor:
        return gather(trainer, tensor)

    values = tally.means(everywhere) | tally.largest(everywhere)
    values |= {"skipped_updates": float(loop.skipped), "lr": loop.optimizer.param_groups[0]["lr"]}
    return {f"train/{name}": value for name, value in values.items()}


def judge_metrics(trainer: Trainer, spent: JudgeStats, missing: int) -> dict[str, float]:
    """Counts of one step over all ranks.

    Args:
        trainer: whose ranks.
        spent: of the step.
        missing: judgments that the step lacks.
    """
    counts = [float(getattr(spent, name)) for name in JUDGE_COUNTS] + [float(missing)]
    totals = sums(trainer, counts)
    return {f"judge/{name}": value for name, value in zip((*JUDGE_COUNTS, "failed"), totals, strict=True)}


def judge_costs(trainer: Trainer, pipeline: RolloutPipeline) -> dict[str, float]:
    """Dollars of the whole run, and per 1,000 rollouts that these processes have had judged. The judge hears what those
    have spent whose calls are not in its ledger."""
    judge = pipeline.judge
    if judge is None:
        return {}
    # The ranks of a machine share a ledger: one of them speaks for all.
    speaks, spent = judge.settings.ledger is None or trainer.local_rank == 0, judge.spent()
    total, here, rollouts = sums(
        trainer, [spent if speaks else 0.0, judge.stats().cost_usd, float(pipeline.judged)]
    )
    if judge.settings.ledger is None or trainer.num_nodes > 1:
        judge.spent_elsewhere(max(0.0, total - spent))
    return {"judge/cost_usd": total, "judge/usd_per_1k_rollouts": 1000 * here / max(1, rollouts)}


def time_metrics(timeline: Timeline, rollouts: Rollouts, device: torch.device) -> dict[str, float]:
    """Seconds of each stage of this rank's step, tokens per second, the share spent waiting, and memory.

    Args:
        timeline: of the step.
        rollouts: of the batch.
        device: that it ran on.
    """
    seconds, tokens = timeline.seconds(), float(rollouts.completion_mask.sum())
    times = {f"time/{name}_s": value for name, value in seconds.items()}
    times["time/idle_share"] = timeline.idle_share()
    for name in ("rollout", "update"):
        if seconds.get(name, 0.0) > 0:
            times[f"time/{name}_tokens_per_s"] = tokens / seconds[name]
    times["time/peak_memory_gb"] = peak_memory(device) / 1e9
    return times


def utilisation(pipeline: RolloutPipeline, tflops: float | None, peak: float | None) -> dict[str, float]:
    """Model FLOPs utilisation of this rank's step, each left out where FLOPs or the device's peak are not known:
    ``time/mfu`` of the update, and ``time/mfu_rollout`` of the rollout, where it ran on the same device.

    Args:
        pipeline: that sampled and timed the step.
        tflops: 10^12 operations of the update.
        peak: operations per second of the device.
    """
    seconds, sampled = pipeline.timeline.seconds(), pipeline.sampled
    out: dict[str, float] = {}
    if peak is None:
        return out
    if tflops is not None:
        out["time/mfu"] = 1e12 * tflops / (seconds["update"] * peak)
    if sampled is not None:
        flops = pipeline.policy.rollout_flops(sampled.rollouts, sampled.prompts)
        if flops is not None:
            out["time/mfu_rollout"] = flops / (seconds["rollout"] * peak)
    return out


def _group_std(values: Tensor) -> Tensor:
    """``[B, G]`` -> ``[B]`` standard deviation (ddof 1) of what is there; exactly 0 if constant, NaN below two."""
    out = []
    for group in values:
        known = group[~group.isnan()]
        if len(known) < 2:
            out.append(math.nan)
        else:
            out.append(0.0 if bool((known == known[0]).all()) else float(known.std()))
    return torch.tensor(out, dtype=torch.float64)
