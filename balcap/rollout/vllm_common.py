"""What vLLM in process and vLLM servers share: prompts, sampling settings, seeds, and the check that both sides agree.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balcap.rollout.base import EngineFailed, Sampling
from balcap.rollout.packing import stop_token_ids

if TYPE_CHECKING:
    from balcap.policy.policy import Policy

BAN = -1e30
"""Added to a logit, leaves no probability in float32, whatever the logit is; unlike -inf, JSON can carry it."""

COLDEST, HOTTEST = 0.01, 2.0
"""Temperatures that vLLM samples at; it would raise a lower one in silence."""

CHECK_EVERY = 100
"""Prompts are compared on the first call of generate, all of them, and then one on every call of this many."""


def collapse(input_ids: Sequence[int] | Tensor, image_token_id: int) -> list[int]:
    """Token ids ``[P]`` or ``[1, P]`` with each run of image tokens made one: what vLLM expands again."""
    ids = input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    out: list[int] = []
    for token, run in groupby(ids):
        out += [token] if token == image_token_id else list(run)
    return out


def rows_to_check(call: int, rows: int) -> range:
    """Rows of the batch whose prompts are compared in the `call`-th call of generate, counted from 0."""
    if call == 0:
        return range(rows)
    return range(min(1, rows)) if call % CHECK_EVERY == 0 else range(0)


def check_prompt(sample_id: str, engine_ids: Sequence[int], trainer_ids: Sequence[int] | Tensor) -> None:
    """EngineFailed where the engine saw another prompt than the trainer computes its log-probs for.

    Args:
        sample_id: named in the message.
        engine_ids: ``[P]`` prompt tokens as the engine reports them, image tokens expanded.
        trainer_ids: ``[P]`` or ``[1, P]`` of the trainer.
    """
    own = trainer_ids.flatten().tolist() if isinstance(trainer_ids, Tensor) else list(trainer_ids)
    theirs = list(engine_ids)
    if own == theirs:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), min(len(own), len(theirs))
    )
    raise EngineFailed(
        f"sample {sample_id!r}: vLLM's prompt differs from the trainer's from token {at} on: vLLM has "
        f"{theirs[at : at + 5]} ({len(theirs)} tokens in all), the trainer {own[at : at + 5]} ({len(own)}). "
        "Where the lengths differ, the image was scaled to another size: give mm_processor_kwargs of the engine the "
        "limits of model.policy.min_pixels and model.policy.max_pixels. Else the model folders differ: compare "
        "model.policy.model and model.policy.revision with what the engine loaded"
    )


def sampling_settings(policy: Policy, sampling: Sampling, num_captions: int, seed: int) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``SamplingParams``, and equally the JSON of its token-level endpoint.

    They draw from the policy's distribution at the temperature, and from nothing that the hub's generation config
    adds. Token ids of the result end with the stop token. A ban by `BAN` holds where the values arrive as they are;
    vLLM's OpenAI endpoints clip them to -100.

    Raises:
        EngineFailed: vLLM cannot sample at this temperature.
    """
    if not COLDEST <= sampling.temperature <= HOTTEST:
        raise EngineFailed(
            f"model.sampling.temperature: vLLM samples between {COLDEST} and {HOTTEST}, not at "
            f"{sampling.temperature}; change it, or sample with balcap.rollout.hf.HFGenerate"
        )
    return {
        "n": num_captions,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0,
        "stop_token_ids": stop_token_ids(policy),
        "ignore_eos": True,  # those ids are all that ends a caption
        "logit_bias": dict.fromkeys(policy.encoder.banned_token_ids, BAN),
        "logprobs": 0,  # of the sampled token alone
        "seed": seed,
        "detokenize": False,
    }


def logprobs_mode(temperature: float) -> str:
    """How vLLM must be started (``logprobs_mode``) so that its log-probs are those at the sampling temperature.

    ``raw_logprobs`` are before temperature, bans and top-p: exact at temperature 1. ``processed_logprobs`` are after
    all three: banned tokens have no share in them, and with top-p below 1 neither have the tails.
    """
    return "raw_logprobs" if temperature == 1 else "processed_logprobs"


def mm_processor_kwargs(processor: Any) -> dict[str, Any]:
    """What makes vLLM's processor scale images as the trainer's does; empty where there is nothing to set.

    The image area limits of the trainer's processor may differ from those in the model folder
    (`model.policy.min_pixels`, `model.policy.max_pixels`).

    Args:
        processor: the trainer's HF processor.
    """
    size = dict(getattr(processor.image_processor, "size", None) or {})
    limits = {key: int(size[key]) for key in ("shortest_edge", "longest_edge") if size.get(key)}
    return {"size": limits} if len(limits) == 2 else {}


def draw_seed() -> int:
    """The one seed of a call of generate, from torch's CPU generator."""
    return int(torch.randint(2**62, (1,)))


def image_seeds(seed: int, rows: int) -> list[int]:
    """``[rows]`` seeds in [0, 2^62), one for each image: those of its G captions follow one another from there."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (rows,), generator=generator).tolist()
