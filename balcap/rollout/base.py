"""The contract of a rollout engine, and what all engines share: captions are reported as they come, then packed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from balcap.types import CaptionBatch, Rollouts
from balcap.utils.errors import RunStopped

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import PromptEncoder, Prompts

KEY = "model.engine.init_args"


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn.

    Args:
        temperature: > 0 in training: the policy is trained as the distribution at this temperature. 0 takes the
            likeliest token.
        top_p: in (0, 1]. Below 1 the tails are cut while sampling only.
        max_tokens: longest caption; a longer one is cut and flagged.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512

    def problems(self, key: str = "model.sampling") -> Sequence[str]:
        """What is out of range, each with the key to change."""
        sound = {
            f"temperature: {self.temperature} must be above 0; exploration needs sampling": 0
            < self.temperature
            < math.inf,
            f"top_p: {self.top_p} is outside (0, 1]": 0 < self.top_p <= 1,
            f"max_tokens: {self.max_tokens} must be at least 1": self.max_tokens >= 1,
        }
        return [f"{key}.{problem}" for problem in unsound(sound)]


def unsound(sound: Mapping[str, bool]) -> list[str]:
    """The problems that there are, from problem -> whether all is well."""
    return [problem for problem, well in sound.items() if not well]


def check_init_args(sound: Mapping[str, bool]) -> None:
    """ValueError with all problems in the settings of an engine, each of which begins with its key."""
    if problems := unsound(sound):
        raise ValueError("; ".join(f"{KEY}.{problem}" for problem in problems))


OnGroupDone = Callable[[int, Sequence[str]], None]
"""Called with a row of the batch and its ``[G]`` captions, as soon as they are complete."""

Drawn = tuple[int, Sequence[Tensor], Sequence[Tensor]]
"""Row of the batch, token ids and log-probs of its G captions, each ``[t]``."""


class EngineFailed(RunStopped):
    """The engine cannot sample any more: gone, out of memory, silent, or with other weights than it should have.

    The message says what to change; the run ends with a checkpoint.
    """


class RolloutEngine(ABC):
    """Samples captions. Image, video and vision tokens are banned while sampling.

    An engine is `_draw`, and what it does beyond keeping the policy when it is given one.

    Attributes:
        on_policy: True where the sampler's log-probs are the policy's own computation; else the two differ
            by more than rounding, which training corrects (``model.importance_cap``).
        own_device: True where captions are sampled on the device of the policy.
    """

    on_policy = False
    own_device = True

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._version = 0  # last synced

    def attach(self, policy: Policy) -> None:
        """Called once, when the policy is on its device; with several ranks, by all."""
        self._policy = policy

    def sync(self, policy: Policy, version: int) -> None:
        """Make the engine sample from these weights, the result of `version` optimizer updates.

        With several ranks all call it, and none samples before it has returned on all.
        """
        self._policy, self._version = policy, version

    def close(self) -> None:
        """Release what the engine holds. Safe to call twice."""
        self._policy = None

    @torch.no_grad()
    def generate(
        self,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        sampling: Sampling,
        on_group_done: OnGroupDone | None = None,
    ) -> Rollouts:
        """`num_captions` captions for each image of the batch; tensors are on the CPU.

        Args:
            on_group_done: called once for every image, in any order, from the calling thread.

        Raises:
            EngineFailed: see there.
        """
        policy = self._policy
        if policy is None:
            raise RuntimeError("the rollout engine has no policy; call attach and sync first")
        stop_ids = stop_token_ids(policy)
        groups: dict[int, tuple[list[str], Sequence[Tensor], Sequence[Tensor]]] = {}
        with closing(self._draw(policy, batch, prompts, num_captions, sampling)) as drawn:
            for row, tokens, logps in drawn:
                kept = [until_stop(one, stop_ids) for one in tokens]
                groups[row] = policy.encoder.texts(kept), kept, logps
                if on_group_done is not None:
                    on_group_done(row, groups[row][0])
        in_order = [groups[row] for row in range(len(batch))]
        return pack(policy.encoder, batch, in_order, stop_ids, sampling.max_tokens, self._version)

    @abstractmethod
    def _draw(
        self, policy: Policy, batch: CaptionBatch, prompts: Prompts, num_captions: int, sampling: Sampling
    ) -> Generator[Drawn]:
        """All groups of the batch, as they come. Closed early, it leaves nothing under way."""


# ── from sampled tokens to rollouts ──────────────────────────────────────────────────────────────────


def stop_token_ids(policy: Policy) -> list[int]:
    """End-of-sequence tokens: the generation config's, and the tokenizer's."""
    own = policy.model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [*ids, policy.encoder.tokenizer.eos_token_id] if i is not None})


def until_stop(tokens: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """``[t]`` tokens up to and with the first that ends a caption; all where none does."""
    stops = torch.isin(tokens, torch.tensor(stop_ids)).nonzero()
    return tokens[: int(stops[0]) + 1] if len(stops) else tokens


def pack(
    encoder: PromptEncoder,
    batch: CaptionBatch,
    groups: Sequence[tuple[Sequence[str], Sequence[Tensor], Sequence[Tensor]]],
    stop_ids: Sequence[int],
    max_tokens: int,
    version: int,
) -> Rollouts:
    """`Rollouts` of the captions of all images.

    Args:
        encoder: counts references.
        batch: the B images.
        groups: ``[B]`` texts of an image's G captions, their tokens until they stop, each ``[t]`` with t > 0, and
            log-probs of these tokens, each at least as long.
        stop_ids: tokens that end a caption.
        max_tokens: the limit of sampling: a caption of that length without an end was cut.
        version: of the weights that sampled.
    """
    captions, tokens, logps = zip(*groups, strict=True)
    shape = len(batch), len(tokens[0]), -1
    rows = list(chain(*tokens))
    own = [logp[: len(row)] for logp, row in zip(chain(*logps), rows, strict=True)]
    sizes = torch.tensor([len(row) for row in rows])
    ended = torch.isin(torch.stack([row[-1] for row in rows]), torch.tensor(stop_ids))
    return Rollouts(
        batch=batch,
        captions=list(captions),
        token_ids=pad_sequence(rows, True, encoder.tokenizer.pad_token_id).view(shape),
        completion_mask=(torch.arange(int(sizes.max())) < sizes[:, None]).view(shape),
        sampler_logps=pad_sequence(own, True).float().view(shape),
        truncated=(~ended & (sizes >= max_tokens)).view(shape[:2]),
        lengths=(sizes - ended.long()).view(shape[:2]),
        reference_lengths=torch.tensor(encoder.count(batch.references), dtype=torch.long),
        weights_version=version,
    )
