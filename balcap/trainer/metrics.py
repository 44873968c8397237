"""What a step reports about itself: rewards, the update, the judge, time and memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from balcap.algorithms import length_ratio, within_length_bounds
from balcap.judge import Judgments
from balcap.policy.flops import peak_flops, peak_memory
from balcap.rewards import b_capscore
from balcap.trainer.tally import Tally
from balcap.types import Rollouts

if TYPE_CHECKING:
    from balcap.judge import JudgeStats
    from balcap.module import BalCapModule

COUNTS = ("calls", "cache_hits", "tokens_in", "tokens_out")


def step_metrics(
    module: BalCapModule,
    tally: Tally,
    rollouts: Rollouts,
    judgments: Judgments,
    rewards: Tensor,
    before: JudgeStats,
) -> dict[str, float]:
    """Everything that a training step logs, by name: over all ranks, but for ``time/*``, which is this rank's.

    Args:
        tally: of the update; rewards are added to it.
        rewards: ``[B, G, K]`` before the length gate.
        before: the judge's counts at the beginning of the step.
    """
    for k, name in enumerate(module.rewards.names):
        values = rewards[..., k].double()
        tally.add_values(name, values)
        spread = _group_std(values)
        tally.add_values(f"reward_std/{name}", spread)
        constant = torch.where(spread.isnan(), spread, (spread == 0).double())
        tally.add_values(f"zero_variance/{name}", constant)
    for name, values in caption_scores(module, rollouts, rewards).items():
        tally.add_values(name, values)
    means = tally.means(module.gather) | tally.largest(module.gather)
    metrics = {f"train/{name}": value for name, value in means.items()}
    metrics["train/skipped_updates"] = float(module.skipped_total)
    metrics["train/lr"] = module.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
    now = module.judge.stats()
    counts = [getattr(now, name) - getattr(before, name) for name in COUNTS]
    counts.append(sum(judgments.failures.values()))
    totals = _sums(module, counts)
    metrics |= {f"judge/{name}": value for name, value in zip((*COUNTS, "failed"), totals, strict=True)}
    return metrics | judge_costs(module) | _times(module, rollouts, means.get("tflops"))


def caption_scores(module: BalCapModule, rollouts: Rollouts, rewards: Tensor) -> dict[str, Tensor]:
    """What training and validation report beside the rewards; each ``[B, G]``."""
    lengths, references = rollouts.lengths, rollouts.reference_lengths
    inside = within_length_bounds(lengths, references, module.tau_low, module.tau_high)
    scores = {
        "length_ratio": length_ratio(lengths, references),
        "caption_tokens": lengths.double(),
        "length_masked": (~inside).double(),
        "truncated": rollouts.truncated.double(),
    }
    names, three = module.rewards.names, ("precision", "recall", "linguistic")
    if set(three) <= set(names):
        scores["b_capscore"] = b_capscore(*(rewards[..., names.index(name)] for name in three))
    return scores


def judge_costs(module: BalCapModule) -> dict[str, float]:
    """Dollars of the whole run, and per 1,000 rollouts that these processes have had judged."""
    # The ranks of a machine share a ledger: one of them speaks for all.
    speaks = module.judge.settings.ledger is None or module.trainer.local_rank == 0
    spent = module.judge.spent() if speaks else 0.0
    total, here, judged = _sums(module, [spent, module.judge.stats().cost_usd, module.judged])
    return {"judge/cost_usd": total, "judge/usd_per_1k_rollouts": 1000 * here / max(1, judged)}


def _times(module: BalCapModule, rollouts: Rollouts, tflops: float | None) -> dict[str, float]:
    """Seconds of each stage of this step, what they come to per second, the share spent waiting, and memory.

    Model FLOPs utilisation, ``time/mfu``, is left out for devices whose peak is not known.
    """
    seconds, tokens = module.timeline.seconds(), float(rollouts.completion_mask.sum())
    times = {f"time/{name}_s": value for name, value in seconds.items()}
    times["time/idle_share"] = module.timeline.idle_share()
    for name in ("rollout", "update"):
        if seconds.get(name, 0.0) > 0:
            times[f"time/{name}_tokens_per_s"] = tokens / seconds[name]
    if tflops is not None and (peak := peak_flops(module.device)):
        times["time/mfu"] = 1e12 * tflops / (seconds["update"] * peak)
    times["time/peak_memory_gb"] = peak_memory(module.device) / 1e9
    return times


def _sums(module: BalCapModule, values: list[float]) -> list[float]:
    """Of all ranks."""
    local = torch.tensor(values, dtype=torch.float64)
    return module.gather(local).reshape(-1, len(values)).sum(0).tolist()


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
