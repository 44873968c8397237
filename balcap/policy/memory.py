"""Memory of one update on one device, by arithmetic: nothing is allocated, models on the meta device will do.

What autograd keeps of a decoder layer is in `balcap.policy.layer_memory`. A checkpointed layer keeps e H per token, its
input, and makes the rest again in backward, one layer at a time.

Checkpointed layers are the first ones: when backward comes to them, what the others kept is free again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from balcap.policy.families import base_of, family_of
from balcap.policy.families.base import num_weights
from balcap.policy.head import CELLS
from balcap.policy.layer_memory import decoder_layers, layer_costs

_FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: itself, an 8-bit scale for 64 of them, a float32 scale for 256 scales."""

_LOGIT = 12
"""Bytes of a logit at the worst moment of the head: three times float32 (log-softmax and entropies or gradients)."""


@dataclass(frozen=True)
class Forward:
    """What one forward pass works on.

    Attributes:
        tokens: that the language model works on, padding included.
        captions: of them those of captions, which are predicted.
        seen: keys of the captions, their prompt counted for each, padding included; 0 without a shared prefix.
        image_tokens: of the images in it, each counted once per pass of the vision tower.
        shared_prefix: whether captions share their prompt, and the head works in chunks.
    """

    tokens: int
    captions: int
    seen: int = 0
    image_tokens: int = 0
    shared_prefix: bool = True

    @classmethod
    def of_images(
        cls,
        images: int,
        prompt: int,
        image_tokens: int,
        captions: int,
        longest: int,
        shared_prefix: bool = True,
    ) -> Forward:
        """Of images that are all alike.

        Args:
            images: that are forwarded together.
            prompt: tokens of each prompt, those of its image included.
            image_tokens: of them.
            captions: of each image.
            longest: tokens of each caption, its end included; with a shared prefix the last one is not forwarded.
            shared_prefix: see `Forward`.
        """
        count = images * captions
        if not shared_prefix:
            return cls(count * (prompt + longest), count * longest, 0, count * image_tokens, False)
        tokens = images * prompt + count * (longest - 1)
        return cls(tokens, count * longest, count * (prompt + longest), images * image_tokens)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, by what they are for; `peak` says what of it is there at once.

    Attributes:
        weights: all, 4-bit ones as they lie.
        reference: a frozen copy for the KL term of full tuning.
        gradients: of what is trained.
        optimizer: its state.
        casts: float32 matrices once more in the dtype of autocast, which keeps them during an update; of those in 4 bits
            the largest one, unpacked for its product.
        activations: kept for backward, of all layers.
        layer: of them those of one layer; where it is checkpointed it makes them again in its backward.
        backward: gradients of activations within a layer.
        head: logits of a chunk, or of all captions without a shared prefix; the gradient of its matrix.
        head_sum: what chunks before have added to that gradient, which stands apart until all have.
        vision: of a pass of the tower; with a trained tower it is kept.
        optimizer_step: temporaries of the optimizer.
        checkpoints: of `activations` the inputs of checkpointed layers.
        checkpointed: share of the layers, in [0, 1].
        vision_is_kept: whether the tower is trained.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    layer: int
    backward: int
    head: int
    head_sum: int
    vision: int
    optimizer_step: int
    checkpoints: int
    checkpointed: float
    vision_is_kept: bool

    @property
    def resident(self) -> int:
        """From the first optimizer step on, between updates too."""
        return self.weights + self.reference + self.gradients + self.optimizer

    @property
    def forward(self) -> int:
        """The most that a forward and its backward hold beyond `resident`."""
        return max(sum(parts.values()) for _, parts in self._moments())

    @property
    def total(self) -> int:
        """At the worst moment of an update."""
        return sum(self.peak().values())

    def peak(self, first: bool = False) -> dict[str, int]:
        """What is there at the worst moment of an update, by the attribute's name; its sum is the peak.

        Args:
            first: whether the update has one forward. There are no gradients before its backward: those of a layer come
                when its activations go. Else all are there from the beginning.
        """
        resident = {"weights": self.weights, "reference": self.reference, "optimizer": self.optimizer}
        moments = [
            {**resident, "gradients": int(self.gradients * (share if first else 1)), **parts}
            for share, parts in self._moments(first)
        ]
        step = {**resident, "gradients": self.gradients, "optimizer_step": self.optimizer_step}
        return max([*moments, step], key=lambda parts: sum(parts.values()))

    def _moments(self, first: bool = False) -> list[tuple[float, dict[str, int]]]:
        """The worst moments of a forward and its backward, in order: the share of the gradients that has come by then, and
        what there is beyond `resident`."""
        kept, again = {"activations": self.activations}, {"layer": self.layer, "backward": self.backward}
        moments: list[tuple[float, dict[str, int]]] = [
            (0.0, kept | {"head": self.head + (self.head_sum if first else 0)}),
            (0.0, kept | {"backward": self.backward}),
        ]
        if self.checkpointed:  # what the layers behind kept is free then
            moments.append((1 - self.checkpointed, again | {"activations": self.checkpoints}))
        moments.append((1.0, again))
        vision = {"vision": self.vision}
        if self.vision_is_kept:
            moments = [(share, parts | vision) for share, parts in moments]
        else:
            moments.append((0.0, vision))
        return [(share, parts | {"casts": self.casts}) for share, parts in moments]


class OptimizerCosts(NamedTuple):
    """Bytes for each byte of what is trained.

    Attributes:
        state: kept from step to step; torch's Adam and AdamW keep two numbers per weight.
        temporaries: during a step; of those of torch that work on many tensors at once, as on CUDA, one number per weight.
    """

    state: float = 2.0
    temporaries: float = 1.0


@dataclass(frozen=True)
class UpdateCosts:
    """Bytes of an update of one model: fixed ones, and those that grow with what is forwarded; see the module.

    Attributes:
        layers: of the language model.
        per_token: that a layer keeps.
        per_seen_key: likewise.
        apart: per token, that it keeps beyond that without a shared prefix.
        checkpointed: per token, of a layer that is checkpointed.
        gradient: per token, that a layer's backward holds at once.
        inference: per token, that a layer's forward without gradient holds at once.
        outside: per token, that the last norm keeps.
        vocabulary: V.
        head_gradient: of the head's matrix, made for each chunk; 0 where it is frozen.
        vision_pass: per image token, that a pass of the vision tower needs.
        vision_kept, vision_checkpointed: per image token, that a trained tower keeps; 0 where it is frozen.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    optimizer_step: int
    casts: int
    layers: int
    per_token: float
    per_seen_key: float
    apart: float
    checkpointed: float
    gradient: float
    inference: float
    outside: float
    vocabulary: int
    head_gradient: int
    vision_pass: float
    vision_kept: float
    vision_checkpointed: float

    def estimate(self, forward: Forward, checkpointed: int = 0) -> MemoryEstimate:
        """Of an update whose largest forward is this.

        Args:
            forward: with gradient.
            checkpointed: layers, the first ones; where all are, the layers of a trained tower are too.
        """
        per_token = self.per_token + (0 if forward.shared_prefix else self.apart)
        layer = per_token * forward.tokens + self.per_seen_key * forward.seen
        checkpoints = checkpointed * self.checkpointed * forward.tokens
        kept = (self.layers - checkpointed) * layer + checkpoints + self.outside * forward.tokens
        logits = forward.captions * self.vocabulary
        if forward.shared_prefix:
            logits = min(logits, CELLS)
        tower = self.vision_checkpointed if checkpointed == self.layers else self.vision_kept
        return MemoryEstimate(
            weights=self.weights,
            reference=self.reference,
            gradients=self.gradients,
            optimizer=self.optimizer,
            casts=self.casts,
            activations=math.ceil(kept),
            layer=math.ceil(layer),
            backward=math.ceil(self.gradient * forward.tokens),
            head=_LOGIT * logits + self.head_gradient,
            head_sum=self.head_gradient if logits < forward.captions * self.vocabulary else 0,
            vision=math.ceil((tower or self.vision_pass) * forward.image_tokens),
            optimizer_step=self.optimizer_step,
            checkpoints=math.ceil(checkpoints),
            checkpointed=checkpointed / self.layers,
            vision_is_kept=self.vision_kept > 0,
        )


def update_costs(
    model: Any,
    device_type: str = "cuda",
    autocast: bool = False,
    with_reference: bool = False,
    load_in_4bit: bool = False,
    compiled: bool = False,
    optimizer: OptimizerCosts = OptimizerCosts(),  # noqa: B008  immutable
) -> UpdateCosts | None:
    """Of a model as `balcap.policy.loading.prepare` returns it, on any device.

    Args:
        model: adapters in, frozen parts marked.
        device_type: where it would be trained.
        autocast: whether in 16 bits under ``bf16-mixed``.
        with_reference: whether a frozen copy is kept for the KL term; beside an adapter none is.
        load_in_4bit: count matrices as if they were in 4 bits, where they are not yet.
        compiled: whether its layers are, see `balcap.policy.compiled`.
        optimizer: of the optimizer.

    Returns:
        None for a language model whose layers are not those of a dense decoder or of a mixture of experts without
        shared ones, or do not all attend to all tokens before, or an unusual tower.
    """
    base, family = base_of(model), family_of(model)
    if set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}:
        return None
    vision_config = getattr(base.config, "vision_config", None)
    layers, text = decoder_layers(family.language_model(base)), base.config.get_text_config()
    if not layers or vision_config is None:
        return None
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    stream = embedding.element_size()
    product = 2 if autocast else stream
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    packed = [
        (p, hasattr(p, "quant_state") or (load_in_4bit and _would_be_4bit(p, embedding, head)))
        for p in model.parameters()
    ]
    casts = sum(2 * p.numel() for p in trained if p.dim() > 1 and p.element_size() == 4) if autocast else 0
    return UpdateCosts(
        weights=sum(_nbytes(p, in_4bit) for p, in_4bit in packed),
        reference=sum(p.nbytes for p in model.parameters()) if with_reference and base is model else 0,
        gradients=gradients,
        optimizer=math.ceil(optimizer.state * gradients),
        optimizer_step=math.ceil(optimizer.temporaries * gradients),
        casts=casts + max((2 * num_weights(p) for p, in_4bit in packed if in_4bit), default=0),
        layers=len(layers),
        vocabulary=text.vocab_size,
        head_gradient=head.nbytes if head.requires_grad else 0,
        **layer_costs(layers, text, stream, product, autocast, compiled, merged=device_type == "cpu"),
        **_vision(
            vision_config, family.patches_per_token(base.config), product, family.vision_is_frozen(base)
        ),
    )


def _vision(config: Any, patches: float, product: int, frozen: bool) -> dict[str, float]:
    """Costs of the vision tower per image token, of which each is made of so many patches."""
    width = getattr(config, "embed_dim", None) or config.hidden_size
    middle = getattr(config, "intermediate_size", None) or width * getattr(config, "mlp_ratio", 4)
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    layer = 2 * (4 + 2 * product) * width + product * (8 * width + 4 * middle)
    one_pass = patches * (layer + 8 * width)  # queries and keys are rotated in float32
    return {
        "vision_pass": one_pass,
        "vision_kept": 0 if frozen else patches * depth * layer + one_pass,
        "vision_checkpointed": 0 if frozen else patches * depth * product * width + one_pass,
    }


def _would_be_4bit(parameter: torch.nn.Parameter, embedding: Any, head: Any) -> bool:
    """Matrices of linear layers that are not trained, the head left out."""
    tables = (embedding, head)
    return (
        parameter.dim() == 2 and not parameter.requires_grad and all(parameter is not one for one in tables)
    )


def _nbytes(parameter: torch.nn.Parameter, as_4bit: bool) -> int:
    """Of a weight; of one in 4 bits with its scales."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return math.ceil(parameter.numel() * _FOUR_BIT) if as_4bit else parameter.nbytes
    scales = (state.absmax, *([state.state2.absmax] if state.nested else []))
    return parameter.nbytes + sum(scale.nbytes for scale in scales)
