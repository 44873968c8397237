"""Activations that are recomputed in backward, and how many tokens a forward takes, where the config says ``auto``.

Decided before each update, from its own forwards (`Policy.size`): their sizes are those of the images and captions of
the batch, and what is free depends on the engine, so nothing that is known at the start would be right later.

Recomputing a layer makes an update up to a third (full tuning) or a half (adapters) longer, and a forward of one image
with its captions, thousands of tokens, fills a GPU already where the model is large. So images are packed into a forward
as long as it fits without recomputation, and layers are checkpointed where a single image does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from balcap.policy.families import base_of, family_of
from balcap.policy.memory import Forward, UpdateCosts, update_costs
from balcap.policy.sharded_memory import costs_of_rank
from balcap.policy.sharding import local_nbytes
from balcap.utils.errors import UserError

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.policy.prompts import Prompts
    from balcap.types import Rollouts

MARGIN = 0.08
"""Share of the device's memory that is left alone: 6.8 GB of 80, 2 of 24. Blocks of the allocator that are cut up, work
space of matrix products, buffers of NCCL, and the estimate's error (within 4 % of what an H100 measured)."""

STEPS = 8
"""Checkpointed layers come in eighths of all: finer ones would change with every batch, for a fiftieth of an update."""

_DECIDED = "balcap_checkpointed"
"""Attribute of a model that is ``auto``: how many layers are checkpointed, None before the first update."""


class OutOfMemory(UserError):
    """An update does not fit the device."""


def prepare_checkpointing(model: Any, choice: bool | Literal["auto"]) -> None:
    """Checkpoint every layer of a model, none, or those that `DeviceFit.checkpoint` will decide on."""
    if choice is True:
        _enable(model)
    elif choice == "auto" and base_of(model).supports_gradient_checkpointing:
        setattr(base_of(model), _DECIDED, None)


def _enable(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # HF makes embeddings, the vision tower's too, require gradients: re-entrant checkpointing needs that. Here it
    # would only send a backward pass through a frozen tower.
    model.disable_input_require_grads()


def _checkpoint_first(model: Any, count: int) -> None:
    """Checkpoint the first layers of the language model; where those are all, the tower's too."""
    if count:
        _enable(model)
    base = base_of(model)
    layers = _layers(family_of(model).language_model(base))
    first = set(layers[:count])
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = module in first if module in layers else count == len(layers)


def _layers(module: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


# ── pure ─────────────────────────────────────────────────────────────────────────────────────────────


def layers_to_checkpoint(costs: UpdateCosts, forwards: Sequence[Forward], room: float) -> int:
    """The fewest layers, in `STEPS`, with which every forward and its backward fit into so many bytes; all of them where
    that is not enough."""
    counts = [math.ceil(costs.layers * step / STEPS) for step in range(STEPS + 1)]
    fitting = (m for m in counts if all(costs.estimate(one, m).forward <= room for one in forwards))
    return next(fitting, costs.layers)


def forward_fits(costs: UpdateCosts, forward: Forward, room: float, always: bool) -> bool:
    """Whether a forward and its backward fit into so many bytes: without checkpointing, unless all layers `always` are."""
    return costs.estimate(forward, costs.layers if always else 0).forward <= room


def room_for_forward(
    costs: UpdateCosts, free: int, total: int, gradients_there: int, optimizer_is_there: bool
) -> float:
    """Bytes for a forward and its backward: what is free, without what gradients and optimizer will still take, and
    without the margin.

    Args:
        costs: of the model.
        free: bytes of the device that this process could allocate now.
        total: bytes of the device.
        gradients_there: bytes of those that are allocated.
        optimizer_is_there: whether its state is; it comes with the first step.
    """
    missing = costs.gradients - gradients_there + (0 if optimizer_is_there else costs.optimizer)
    return free - missing - MARGIN * total


# ── on a device ──────────────────────────────────────────────────────────────────────────────────────


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of a CUDA device, None of others. Free is what this process could allocate now: what others
    hold, an engine in this process that does not sleep among them, is not."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


class DeviceFit:
    """What of an update fits the device; on a CPU everything does.

    Args:
        policy: that is updated.
        rollouts: of this rank.
        prompts: of the same images.
        optimizer: of the policy; None where its state has not been made.
    """

    def __init__(self, policy: Policy, rollouts: Rollouts, prompts: Prompts, optimizer: Any = None) -> None:
        self._policy, self._rollouts, self._prompts = policy, rollouts, prompts
        self._memory, self._costs, self._room = device_memory(policy.device), None, 0.0
        if self._memory is None:
            return
        device = policy.device
        autocast = torch.is_autocast_enabled(device.type)
        self._costs = update_costs(policy.model, device.type, autocast, compiled=policy.is_compiled)
        if self._costs is not None and policy.is_sharded:
            self._costs = costs_of_rank(self._costs, policy.model, dist.get_world_size(), autocast)
        if self._costs is not None:
            there = sum(local_nbytes(p.grad) for p in policy.model.parameters() if p.grad is not None)
            state = getattr(getattr(optimizer, "optimizer", optimizer), "state", None)  # Lightning wraps it
            self._room = room_for_forward(self._costs, *self._memory, there, bool(state))

    def holds(self, rows: Sequence[int]) -> bool:
        """Whether a forward of these images, with all their captions, fits: without checkpointing, unless the config asks
        for it. Images of an architecture whose memory is not known go one by one."""
        if self._memory is None:
            return True
        if self._costs is None:
            return False
        base = base_of(self._policy.model)
        always = not hasattr(base, _DECIDED) and any(layer.gradient_checkpointing for layer in _layers(base))
        return forward_fits(self._costs, self._forward(rows), self._room, always)

    def checkpoint(self, micro_batches: Sequence[Sequence[int]]) -> None:
        """Checkpoint as few layers as it takes to fit these forwards, where the config leaves it open."""
        model = self._policy.model
        if self._memory is None or not hasattr(base_of(model), _DECIDED):
            return
        count = all_layers = len(_layers(family_of(model).language_model(base_of(model))))
        why = "of an unknown architecture"
        if self._costs is not None:
            forwards = [self._forward(rows) for rows in micro_batches]
            count = layers_to_checkpoint(self._costs, forwards, self._room)
            largest = max(forwards, key=lambda one: one.tokens)
            without, now = (self._costs.estimate(largest, m).forward / 1e9 for m in (0, count))
            why = (
                f"the largest forward, {largest.tokens:,} tokens, takes {without:.1f} GB without, {now:.1f} GB so; "
                f"{self._room / 1e9:.1f} GB are free for it"
            )
        if count != getattr(base_of(model), _DECIDED):
            rank_zero_info(f"gradient checkpointing: {count} of {all_layers} layers; {why}")
            _checkpoint_first(model, count)
            setattr(base_of(model), _DECIDED, count)

    def _forward(self, rows: Sequence[int]) -> Forward:
        ids = [self._prompts.items[row]["input_ids"] for row in rows]
        lengths = self._rollouts.completion_mask[list(rows)].sum(-1)  # [b, G]
        size, captions = self._policy.size(self._rollouts, self._prompts, rows), lengths.shape[1]
        images = sum(int((of_prompt == self._prompts.image_token_id).sum()) for of_prompt in ids)
        if not self._policy.shared_prefix:
            return Forward(
                size.forwarded, int(lengths.sum()), image_tokens=images * captions, shared_prefix=False
            )
        seen = lengths.numel() * (max(of_prompt.shape[1] for of_prompt in ids) + int(lengths.max()))
        return Forward(size.forwarded, int(lengths.sum()), seen, images)


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """An update that does not fit the device, as an error that names what to change.

    Raises:
        OutOfMemory: CUDA has no memory left.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "the update does not fit the device. Set model.policy.gradient_checkpointing: true, or lower "
            "model.max_tokens_per_forward (tokens per forward pass; an image with its captions is never cut), "
            "model.policy.max_pixels, model.num_captions, model.sampling.max_tokens, or what an engine in this process "
            f"holds (model.engine.init_args.gpu_memory_utilization). {str(error).splitlines()[0]}"
        ) from error
