"""What both vLLM engines do with a batch: seeds, the check that prompts agree, and rollouts from what was drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balcap.rollout.base import EngineFailed, OnGroupDone, Sampling
from balcap.rollout.packing import group_texts, pack
from balcap.rollout.vllm.requests import sampling_settings
from balcap.types import CaptionBatch, Rollouts

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts

CHECK_EVERY = 100
"""Prompts are compared on the first call of generate, all of them, and then one on every call of this many."""

Group = tuple[int, Sequence[int], list[Tensor], list[Tensor]]
"""Row of the batch, prompt ids ``[P]`` that the engine saw, token ids and log-probs of G captions, each ``[t]``."""


class VLLMEngine(ABC):
    """The part of `RolloutEngine` that does not depend on where vLLM runs."""

    on_policy = False

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._version = -1  # last synced
        self._calls = 0

    @torch.no_grad()
    def generate(
        self,
        batch: CaptionBatch,
        prompts: Prompts,
        num_captions: int,
        sampling: Sampling,
        on_group_done: OnGroupDone | None = None,
    ) -> Rollouts:
        """See `RolloutEngine.generate`; tensors come back on the CPU."""
        policy = self._policy
        if policy is None or self._version < 0:
            raise RuntimeError("the rollout engine has no policy; call attach and sync first")
        settings = sampling_settings(policy, sampling, num_captions)
        stop_ids = settings["stop_token_ids"]
        seeds = image_seeds(draw_seed(), len(batch))
        to_check = rows_to_check(self._calls, len(batch))
        tokens: list[list[Tensor]] = [[] for _ in seeds]
        logps: list[list[Tensor]] = [[] for _ in seeds]
        with closing(self._draw(policy, batch, prompts, settings, seeds)) as groups:
            for row, prompt_ids, *group in groups:
                if row in to_check:
                    check_prompt(batch.sample_ids[row], prompt_ids, prompts.items[row]["input_ids"])
                tokens[row], logps[row] = group
                if on_group_done is not None:
                    on_group_done(row, group_texts(policy.encoder, tokens[row], stop_ids))
        self._calls += 1
        flat = list(chain(*tokens)), list(chain(*logps))
        return pack(policy.encoder, batch, *flat, stop_ids, sampling.max_tokens, self._version)

    @abstractmethod
    def _draw(
        self,
        policy: Policy,
        batch: CaptionBatch,
        prompts: Prompts,
        settings: dict[str, Any],
        seeds: list[int],
    ) -> Generator[Group]:
        """All groups of the batch, as they come. Closed early, it leaves nothing under way."""


def rows_to_check(call: int, rows: int) -> range:
    """Rows of the batch whose prompts are compared in the `call`-th call of generate, counted from 0."""
    if call == 0:
        return range(rows)
    return range(min(1, rows)) if call % CHECK_EVERY == 0 else range(0)


def check_prompt(sample_id: str, engine_ids: Sequence[int], trainer_ids: Tensor) -> None:
    """EngineFailed where the engine saw another prompt than the trainer computes its log-probs for.

    Args:
        sample_id: named in the message.
        engine_ids: ``[P]`` prompt tokens as the engine reports them, image tokens expanded.
        trainer_ids: ``[P]`` or ``[1, P]`` of the trainer.
    """
    own, theirs = trainer_ids.flatten().tolist(), list(engine_ids)
    if own == theirs:
        return
    pairs = enumerate(zip(theirs, own, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(own), len(theirs)))
    raise EngineFailed(
        f"sample {sample_id!r}: vLLM's prompt differs from the trainer's from token {at} on: vLLM has "
        f"{theirs[at : at + 5]} ({len(theirs)} tokens in all), the trainer {own[at : at + 5]} ({len(own)}). "
        "Where the lengths differ, the image was scaled to another size: give mm_processor_kwargs of the engine the "
        "limits of model.policy.min_pixels and model.policy.max_pixels. Else the model folders differ: compare "
        "model.policy.model and model.policy.revision with what the engine loaded"
    )


def check_lengths(
    batch: CaptionBatch, prompts: Prompts, settings: dict[str, Any], limit: int, engine: str, key: str
) -> None:
    """EngineFailed where vLLM would cut captions at its own limit, unnoticed.

    Args:
        settings: of sampling; the longest caption is in them.
        limit: of prompt and caption together, in tokens.
        engine: whose limit it is, for the message.
        key: what raises the limit.
    """
    longest = settings["max_tokens"]
    for sample_id, item in zip(batch.sample_ids, prompts.items, strict=True):
        needed = item["input_ids"].shape[1] + longest
        if needed > limit:
            raise EngineFailed(
                f"sample {sample_id!r}: its prompt and a caption of model.sampling.max_tokens: {longest} make {needed} "
                f"tokens, the limit of {engine} is {limit}; raise {key}, or lower model.policy.max_pixels or "
                "model.sampling.max_tokens"
            )


def draw_seed() -> int:
    """The one seed of a call of generate, from torch's CPU generator."""
    return int(torch.randint(2**62, (1,)))


def image_seeds(seed: int, rows: int) -> list[int]:
    """``[rows]`` seeds in [0, 2^62), one for each image: those of its G captions follow one another from there."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (rows,), generator=generator).tolist()
