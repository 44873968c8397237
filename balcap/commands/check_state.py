"""What checks share: the parts of the run, what a check finds, and how close two computations must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from balcap.trainer.tally import Tally
from balcap.trainer.update import record_mismatch

if TYPE_CHECKING:
    from balcap.policy import PolicyConfig
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts
    from balcap.rollout import RolloutEngine, Sampling
    from balcap.types import CaptionBatch, Rollouts


@dataclass(frozen=True)
class Result:
    """Of one check.

    Attributes:
        passed: None where it was skipped.
        found: what, in words.
        way_out: what to change where it failed.
    """

    passed: bool | None
    found: str
    way_out: str = ""


class Skipped(Exception):
    """There is nothing to check; the message says why."""


@dataclass(frozen=True)
class Tolerance:
    """Within which two computations of the same thing count as equal.

    Attributes:
        logps: mean of the differences of log-probs over tokens, in nats.
        gradient: norm of the difference of two gradients, relative to one of them.
        tie: a token that is so much less likely than the likeliest is as likely, in nats.
    """

    logps: float
    gradient: float
    tie: float


EXACT = Tolerance(1e-3, 1e-2, 1e-3)
"""Of float32."""

ROUNDED = Tolerance(0.05, 0.2, 0.5)
"""Of bfloat16, float16 and 4-bit weights: logits of 16 to 32 lie 0.125 apart in bfloat16."""


@dataclass
class State:
    """The parts of a run, and what earlier checks leave for later ones.

    Attributes:
        config: of the policy.
        policy: in evaluation mode, on its device.
        engine: of the run.
        batch: the images.
        sampling: of the run, with short captions.
        load: a policy of another config, placed as this one.
        tolerance: of what is computed by the policy.
        threshold: nats beyond which a token counts in the share of those that differ.
        encoded: prompts of the batch, once they are encoded.
        sampled: captions by the engine, once there are some.
    """

    config: PolicyConfig
    policy: Policy
    engine: RolloutEngine
    batch: CaptionBatch
    sampling: Sampling
    load: Callable[[PolicyConfig], Policy]
    tolerance: Tolerance = EXACT
    threshold: float = 0.1
    encoded: Prompts | None = field(default=None, repr=False)
    sampled: Rollouts | None = field(default=None, repr=False)

    @property
    def prompts(self) -> Prompts:
        """Skipped where there are none."""
        if self.encoded is None:
            raise Skipped("there are no prompts, see placeholders")
        return self.encoded

    @property
    def rollouts(self) -> Rollouts:
        """Skipped where there are none."""
        if self.sampled is None:
            raise Skipped("there are no captions, see engine's prompts")
        return self.sampled


def mismatch(ours: Tensor, theirs: Tensor, mask: Tensor, threshold: float) -> tuple[float, str]:
    """Mean difference of log-probs over tokens in nats, and all statistics of it in words; those of
    ``train/mismatch_*``."""
    tally = Tally()
    ours, theirs = ours.detach().float(), theirs.detach().to(ours.device).float()
    record_mismatch(tally, ours, theirs, mask.to(ours.device), threshold, None)
    mean, share, most = *tally.means().values(), tally.largest()["mismatch_max"]
    text = f"log-probs of {int(mask.sum()):,} tokens differ by {mean:.2g} nats on average, {most:.2g} at most"
    return mean, f"{text}, {share:.1%} by more than {threshold:g}"
