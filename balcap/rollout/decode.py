"""Sampling on transformers' own models, token by token: each prompt is read once for its G captions, and captions that have
ended leave the batch.

transformers' ``generate`` reads a prompt, and its image, once for each caption, and computes until the longest caption of
the batch ends. Here only the models do the work; what is drawn follows the same distribution.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from balcap.policy.families import base_of, family_of
from balcap.policy.prompts import Prompts
from balcap.rollout.base import Sampling

ROOM = 64
"""Tokens that a cache is extended by."""

LEAVE = 0.75
"""Share of captions still under way below which the others leave the batch: that copies the cache."""


def can_decode(model: Any) -> bool:
    """Whether the positions of this model's captions are known, as the shared prefix needs them too."""
    return not family_of(model).obstacle(base_of(model))


class _WriteBehind:
    """``update`` of a cache layer that writes new keys and values behind those that are there, into room for more of them.
    transformers' own copies all of them at every step.

    Args:
        layer: a ``DynamicLayer`` of transformers that holds the prompts.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._rooms: list[Tensor] = []

    def __call__(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        layer = self.layer
        seen = layer.keys.shape[-2]
        end = seen + keys.shape[-2]
        # Captions that leave the batch take their rows along, and the room behind the others.
        if not self._rooms or len(self._rooms[0]) != len(keys) or self._rooms[0].shape[-2] < end:
            self._rooms = [_with_room(old, end + ROOM) for old in (layer.keys, layer.values)]
        for room, new in zip(self._rooms, (keys, values), strict=True):
            room[..., seen:end, :] = new
        layer.keys, layer.values = (room[..., :end, :] for room in self._rooms)
        return layer.keys, layer.values


def _with_room(states: Tensor, length: int) -> Tensor:
    """``[n, H, length, D]`` that begins with ``[n, H, t, D]``."""
    room = states.new_empty(*states.shape[:2], length, states.shape[-1])
    room[..., : states.shape[-2], :] = states
    return room


@dataclass
class _Batch:
    """Captions under way.

    Attributes:
        rows: ``[n]`` which of the captions they are.
        cache: keys and values of what they have seen.
        mask: ``[n, P + t]`` True on what they may see.
        positions: ``[n]`` of the next token.
        logits: ``[n, V]`` of the next token.
    """

    rows: Int[Tensor, n]  # noqa: F821
    cache: Any
    mask: Bool[Tensor, "n P+t"]
    positions: Int[Tensor, n]  # noqa: F821
    logits: Float[Tensor, "n V"]

    def keep(self, places: Int[Tensor, m]) -> None:  # noqa: F821
        """The others leave."""
        self.cache.reorder_cache(places)
        self.rows, self.mask, self.positions = self.rows[places], self.mask[places], self.positions[places]


def decode(
    model: Any,
    prompts: Prompts,
    images: Sequence[int],
    num_captions: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    banned: Sequence[int],
    device: torch.device,
) -> tuple[Int[Tensor, "bG T"], Float[Tensor, "bG T"]]:
    """Tokens and log-probs of G captions of each of b images, those of one image together; on the CPU.

    After a caption's end stands padding; log-probs there mean nothing. Log-probs are at the temperature, before top-p and
    bans.

    Args:
        model: of `can_decode`, in evaluation mode.
        prompts: of the whole batch.
        images: which, positions in the batch.
        num_captions: G.
        sampling: how.
        stop_ids: tokens that end a caption.
        banned: tokens that are never drawn.
        device: of the model.
    """
    cached = "cache" if "cache" in inspect.signature(base_of(model).forward).parameters else "past_key_values"
    under_way = _prefill(model, prompts, images, num_captions, device)
    count, steps = len(images) * num_captions, sampling.max_tokens
    tokens = torch.full((count, steps), prompts.pad_token_id, dtype=torch.long, device=device)
    logps = torch.zeros(count, steps, device=device)
    stops, forbidden = (
        torch.tensor(list(ids), dtype=torch.long, device=device) for ids in (stop_ids, banned)
    )
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(steps):
        drawn, scores = _draw(under_way.logits, sampling, forbidden)
        alive = ~ended
        tokens[under_way.rows, step] = torch.where(alive, drawn, prompts.pad_token_id)
        logps[under_way.rows, step] = scores
        ended = ended | torch.isin(drawn, stops)
        left = int((~ended).sum())
        if not left or step == steps - 1:
            return tokens[:, : step + 1].cpu(), logps[:, : step + 1].cpu()
        if left <= LEAVE * len(ended):
            places = (~ended).nonzero()[:, 0]
            under_way.keep(places)
            drawn, ended = drawn[places], ended[places]
        under_way.mask = torch.nn.functional.pad(under_way.mask, (0, 1), value=1)
        out = model(
            input_ids=drawn[:, None],
            attention_mask=under_way.mask,
            position_ids=under_way.positions[:, None],
            use_cache=True,
            **{cached: under_way.cache},
        )
        under_way.positions, under_way.logits = under_way.positions + 1, out.logits[:, -1]
    raise AssertionError("sampling.max_tokens is at least 1")


def _prefill(
    model: Any, prompts: Prompts, images: Sequence[int], num_captions: int, device: torch.device
) -> _Batch:
    """The prompts, each read once, and then standing there for each of its captions."""
    from transformers.cache_utils import DynamicLayer

    family, base = family_of(model), base_of(model)
    inputs = prompts.inputs(images, 1, device)
    out = model(**inputs, **family.sequence_inputs(inputs), use_cache=True, logits_to_keep=1)
    starts = [int(family.prompt_positions(base, prompts.items[image]).max()) + 1 for image in images]
    cache = getattr(out, "cache", None) or out.past_key_values
    # What beam search needs, recurrent layers have too.
    cache.reorder_cache(torch.arange(len(images), device=device).repeat_interleave(num_captions))
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.update = _WriteBehind(layer)  # type: ignore[method-assign, assignment]
    return _Batch(
        torch.arange(len(images) * num_captions, device=device),
        cache,
        inputs["attention_mask"].repeat_interleave(num_captions, 0),
        torch.tensor(starts, device=device).repeat_interleave(num_captions),
        out.logits[:, -1].repeat_interleave(num_captions, 0),
    )


def _draw(logits: Tensor, sampling: Sampling, banned: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row, and its log-prob."""
    logps = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
    scores = logps.index_fill(1, banned, -torch.inf)
    if sampling.temperature == 0:
        drawn = scores.argmax(-1)
    else:
        probabilities = scores.softmax(-1)
        if sampling.top_p < 1:
            probabilities = _nucleus(probabilities, sampling.top_p)
        drawn = torch.multinomial(probabilities, 1)[:, 0]
    return drawn, logps.gather(1, drawn[:, None])[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Without the tail: the likeliest tokens whose sum reaches `top_p`, at least one (arXiv 1904.09751)."""
    ordered, places = probabilities.sort(-1, descending=True)
    tail = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.scatter(1, places, ordered.masked_fill(tail, 0.0))
