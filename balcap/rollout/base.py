"""The contract of a rollout engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from balcap.types import CaptionBatch, Rollouts
from balcap.utils.errors import RunStopped

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn.

    Args:
        temperature: > 0. The policy is trained as the distribution at this temperature.
        top_p: in (0, 1]. Below 1 the tails are cut while sampling only.
        max_tokens: longest caption; a longer one is cut and flagged.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512

    def problems(self, key: str = "model.sampling") -> Sequence[str]:
        """What is out of range, each with the key to change."""
        problems = []
        if not 0 < self.temperature < math.inf:
            problems.append(
                f"{key}.temperature: {self.temperature} must be above 0; exploration needs sampling"
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"{key}.top_p: {self.top_p} is outside (0, 1]")
        if self.max_tokens < 1:
            problems.append(f"{key}.max_tokens: {self.max_tokens} must be at least 1")
        return problems


OnGroupDone = Callable[[int, Sequence[str]], None]
"""Called with a row of the batch and its ``[G]`` captions, as soon as they are complete."""


class EngineFailed(RunStopped):
    """The engine cannot sample any more: gone, out of memory, silent, or with other weights than it should have.

    The message says what to change; the run ends with a checkpoint.
    """


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples captions. Image, video and vision tokens are banned while sampling.

    Attributes:
        on_policy: True where the sampler's log-probs are the policy's own computation; else the two differ
            by more than rounding, which training corrects (``model.importance_cap``).
    """

    on_policy: bool

    def attach(self, policy: Policy) -> None:
        """Called once, when the policy is on its device."""

    def generate(
        self,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        sampling: Sampling,
        on_group_done: OnGroupDone | None = None,
    ) -> Rollouts:
        """`num_captions` captions for each image of the batch.

        Args:
            on_group_done: called once for every image, in any order, from the calling thread.

        Raises:
            EngineFailed: see there.
        """

    def sync(self, policy: Policy, version: int) -> None:
        """Make the engine sample from these weights, the result of `version` optimizer updates."""

    def close(self) -> None:
        """Release what the engine holds. Safe to call twice."""
