"""Rollouts on the policy itself: always the current weights, needs nothing else."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from balcap.policy.families import base_of
from balcap.rollout.base import Drawn, RolloutEngine, Sampling, check_init_args, stop_token_ids
from balcap.rollout.decode import can_decode, decode
from balcap.types import CaptionBatch

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts


class _Recorder:
    """A logits processor that keeps the log-prob of every sampled token and bans tokens.

    HF offers the scores of all steps only as ``[T][N, V]``; this keeps one step's.
    """

    def __init__(self, banned: list[int], temperature: float) -> None:
        self.banned, self.temperature = banned, temperature
        self.logps: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finish(input_ids)
        self._last = (scores.float() / self.temperature).log_softmax(-1)
        scores = scores.clone()
        scores[:, self.banned] = -torch.inf
        return scores

    def finish(self, input_ids: Tensor) -> None:
        """Record the log-prob of the token that was drawn from the scores seen last."""
        if self._last is not None:
            self.logps.append(self._last.gather(1, input_ids[:, -1:]))
            self._last = None


@contextmanager
def _for_sampling(model: Any) -> Iterator[None]:
    """Evaluation mode, and none of the generation settings that the hub ships with the weights.

    A model in training mode with checkpointing would forgo its cache. HF fills every setting that a call
    leaves open from the model's own: a ``min_p`` or ``no_repeat_ngram_size`` there would change the distribution.
    """
    from transformers import GenerationConfig

    inner = base_of(model)  # peft's wrapper holds no settings
    was_training, own = model.training, inner.generation_config
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.train(was_training)
        inner.generation_config = own


class HFGenerate(RolloutEngine):
    """Sampling on the policy itself: each prompt read once where its family allows it, else HF ``generate``.

    Args:
        max_sequences: captions that are sampled at once; more are sampled in turns.
        shared_prompts: read each prompt, and its image, once for all its captions, and let captions that have ended leave
            the batch (`balcap.rollout.decode`); false, and families that share no prefix, use HF ``generate``.
    """

    on_policy = True

    def __init__(self, max_sequences: int = 256, shared_prompts: bool = True) -> None:
        check_init_args({f"max_sequences: {max_sequences} must be at least 1": max_sequences >= 1})
        super().__init__()
        self.max_sequences, self.shared_prompts = max_sequences, shared_prompts

    def _draw(
        self, policy: Policy, batch: CaptionBatch, prompts: Prompts, num_captions: int, sampling: Sampling
    ) -> Generator[Drawn]:
        if self.shared_prompts and can_decode(policy.model) and num_captions <= self.max_sequences:
            yield from self._decode(policy, prompts, len(batch), num_captions, sampling)
            return
        rows = [b for b in range(len(batch)) for _ in range(num_captions)]
        drawn: list[tuple[Tensor, Tensor]] = []  # tokens and log-probs of captions
        done = 0
        with _for_sampling(policy.model):
            for start in range(0, len(rows), self.max_sequences):
                turn = rows[start : start + self.max_sequences]
                drawn += zip(*_turn(policy, prompts, turn, sampling), strict=True)
                while len(drawn) >= (done + 1) * num_captions:
                    tokens, logps = zip(*drawn[done * num_captions :][:num_captions], strict=True)
                    yield done, tokens, logps
                    done += 1

    def _decode(
        self, policy: Policy, prompts: Prompts, images: int, num_captions: int, sampling: Sampling
    ) -> Generator[Drawn]:
        """Whole images at a time."""
        stops, banned = stop_token_ids(policy), policy.encoder.banned_token_ids
        size = self.max_sequences // num_captions
        with _for_sampling(policy.model):
            for start in range(0, images, size):
                turn = range(start, min(start + size, images))
                tokens, logps = decode(
                    policy.model, prompts, turn, num_captions, sampling, stops, banned, policy.device
                )
                groups = zip(turn, tokens.split(num_captions), logps.split(num_captions), strict=True)
                for image, of_image, their_logps in groups:
                    yield image, list(of_image), list(their_logps)


def _turn(policy: Policy, prompts: Prompts, rows: list[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs ``[len(rows), T]`` of one call, on the CPU."""
    from transformers import GenerationConfig, LogitsProcessorList

    inputs = prompts.inputs(rows, 1, policy.device)
    recorder = _Recorder(policy.encoder.banned_token_ids, sampling.temperature or 1.0)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}  # HF's default is 50
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
        max_new_tokens=sampling.max_tokens,
        eos_token_id=stop_token_ids(policy),
        pad_token_id=policy.encoder.tokenizer.pad_token_id,
        use_cache=True,
    )
    model: Any = policy.model
    out = model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([recorder]))
    recorder.finish(out)
    tokens = out[:, inputs["input_ids"].shape[1] :]
    # Where asking the device is slow (mps), HF sees one step late that all captions ended, and drops that step.
    return tokens.cpu(), torch.cat(recorder.logps, 1)[:, : tokens.shape[1]].cpu()
