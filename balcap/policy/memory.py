"""Memory of one update on one device, by arithmetic: nothing is allocated, models on the meta device will do.

What autograd keeps for the backward pass of a decoder layer, in bytes per token. H is the hidden size, I the MLP's, Q and
K the widths of all query heads and of all key heads; e is the size of a number in the residual stream, b in matrix products
(2 under autocast), l in adapters::

    each RMSNorm       4 H + 4            input in float32, and the inverse of its root mean square
                       e H                normalised, where the norm's own weight is trained
      of queries, keys                     likewise with Q and K instead of H, and 4 for each head
    q, k, v            b (Q + 2 K)        packed, after rotation (rotation itself keeps but its sines)
    attention          b Q + 4 heads      output and log-sum-exp
      not on a CPU     b 2 K              of each key that captions see: their prompt once per caption
      apart            b 2 (Q - K)        without a shared prefix: keys for each query head
    MLP                3 b I              gate, its activation, up
    inputs of q k v, of o, of gate and up, of down:
      matrix trained   b width            once for all that read it; under autocast once for each
      adapter trained  l width            once for each where l is not e, or with dropout; else once for all
                       b or l times rank  between its two matrices, for each

A checkpointed layer keeps e H per token, its input, and makes the rest again in backward, one layer at a time.

Checkpointed layers are the first ones: when backward comes to them, what the others kept is free again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from balcap.policy.families import base_of, family_of
from balcap.policy.head import CELLS

_READERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)
"""Linear layers of a dense decoder layer, those with the same input together; GLM's has one for gate and up."""

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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device, by what they are for; `total` says what of it is there at once.

    Attributes:
        weights: all, 4-bit ones as they lie.
        reference: a frozen copy for the KL term of full tuning.
        gradients: of what is trained.
        optimizer: its state, two numbers per trained weight (Adam).
        casts: float32 matrices once more in the dtype of autocast, which keeps them during an update.
        activations: kept for backward, of all layers.
        recomputed: what a checkpointed layer makes again in its backward.
        backward: gradients of activations within a layer.
        head: logits of a chunk, or of all captions without a shared prefix; the gradient of its matrix.
        vision: of a pass of the tower; with a trained tower it is kept.
        optimizer_step: temporaries of the optimizer, one number per trained weight (AdamW on CUDA).
        checkpoints: of `activations` the inputs of checkpointed layers.
        vision_is_kept: whether the tower is trained.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    recomputed: int
    backward: int
    head: int
    vision: int
    optimizer_step: int
    checkpoints: int
    vision_is_kept: bool

    @property
    def resident(self) -> int:
        """From the first optimizer step on, between updates too."""
        return self.weights + self.reference + self.gradients + self.optimizer

    @property
    def forward(self) -> int:
        """The most that a forward and its backward hold beyond `resident`."""
        peak = self.activations + max(self.head, self.backward)
        if self.recomputed:  # what the layers behind kept is free then
            peak = max(peak, self.checkpoints + self.recomputed + self.backward)
        return self.casts + (peak + self.vision if self.vision_is_kept else max(peak, self.vision))

    @property
    def total(self) -> int:
        """At the worst moment of an update."""
        return self.resident + max(self.forward, self.optimizer_step)


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
    casts: int
    layers: int
    per_token: float
    per_seen_key: float
    apart: float
    checkpointed: float
    gradient: float
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
            recomputed=math.ceil(layer) if checkpointed else 0,
            backward=math.ceil(self.gradient * forward.tokens),
            head=_LOGIT * logits + self.head_gradient,
            vision=math.ceil((tower or self.vision_pass) * forward.image_tokens),
            optimizer_step=self.gradients,
            checkpoints=math.ceil(checkpoints),
            vision_is_kept=self.vision_kept > 0,
        )


def update_costs(
    model: Any,
    device_type: str = "cuda",
    autocast: bool = False,
    with_reference: bool = False,
    load_in_4bit: bool = False,
) -> UpdateCosts | None:
    """Of a model as `balcap.policy.loading.prepare` returns it, on any device.

    Args:
        model: adapters in, frozen parts marked.
        device_type: where it would be trained.
        autocast: whether in 16 bits under ``bf16-mixed``.
        with_reference: whether a frozen copy is kept for the KL term; beside an adapter none is.
        load_in_4bit: count matrices as if they were in 4 bits, where they are not yet.

    Returns:
        None for a language model whose layers are not those of a dense decoder (`_READERS`), or do not all attend to all
        tokens before, or an unusual tower.
    """
    base, family = base_of(model), family_of(model)
    if set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}:
        return None
    vision_config = getattr(base.config, "vision_config", None)
    layers = [
        m for m in family.language_model(base).modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")
    ]
    linears = [_linears(layer) for layer in layers]
    text = base.config.get_text_config()
    dense = all(map(_is_dense, linears)) and not hasattr(text, "num_experts_per_tok")
    if not layers or vision_config is None or not dense:
        return None
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    stream = embedding.element_size()
    product = 2 if autocast else stream
    hidden, heads, middle = text.hidden_size, text.num_attention_heads, linears[0]["down_proj"].in_features
    size = getattr(text, "head_dim", None) or hidden // heads
    queries, keys, merged = heads * size, text.num_key_value_heads * size, device_type == "cpu"
    widths = {"q_norm": queries, "k_norm": keys}
    named = ((name.rsplit(".", 1)[-1], module) for name, module in layers[0].named_modules())
    norms = [_norm(module, widths.get(name, hidden), stream) for name, module in named if "norm" in name]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    wide = (
        any(first.weight.element_size() > product for first in _adapters(linears[0]).values())
        and not autocast
    )
    return UpdateCosts(
        weights=sum(
            _nbytes(p, load_in_4bit and _would_be_4bit(p, embedding, head)) for p in model.parameters()
        ),
        reference=sum(p.nbytes for p in model.parameters()) if with_reference and base is model else 0,
        gradients=gradients,
        optimizer=2 * gradients,
        casts=sum(2 * p.numel() for p in trained if p.dim() > 1 and p.element_size() == 4) if autocast else 0,
        layers=len(layers),
        per_token=sum(norms)
        + product * (2 * queries + 2 * keys + 3 * middle)
        + 4 * heads
        + max(_kept_inputs(found, stream, product, autocast) for found in linears),
        per_seen_key=0 if merged else product * 2 * keys,
        apart=product * 2 * (queries - keys),
        checkpointed=stream * hidden,
        gradient=middle * (4 * product + (4 if wide else 0)),
        outside=norms[-1],  # those of the layer itself come last
        vocabulary=text.vocab_size,
        head_gradient=head.nbytes if head.requires_grad else 0,
        **_vision(
            vision_config, family.patches_per_token(base.config), product, family.vision_is_frozen(base)
        ),
    )


def _norm(module: Any, width: int, stream: int) -> int:
    """Bytes per token that an RMSNorm keeps, of a token's `width` numbers; those of queries and keys work on each head."""
    trained = stream * width if module.weight.requires_grad else 0
    return 4 * width + 4 * (width // len(module.weight)) + trained


def _linears(layer: Any) -> dict[str, Any]:
    """Of a decoder layer, by name; those with an adapter are its modules around them."""
    names = {name for group in _READERS for name in group}
    found = ((name.rsplit(".", 1)[-1], module) for name, module in layer.named_modules())
    return {name: module for name, module in found if name in names}


def _is_dense(linears: dict[str, Any]) -> bool:
    """Whether these are all linear layers of a dense decoder layer."""
    known = {name for group in _READERS for name in group}
    return set(linears) in (known - {"gate_up_proj"}, known - {"gate_proj", "up_proj"})


def _adapters(linears: dict[str, Any]) -> dict[str, Any]:
    """The first matrix of each trained adapter, by the name of its linear layer."""
    firsts = (
        (name, first) for name, linear in linears.items() for first in getattr(linear, "lora_A", {}).values()
    )
    return {name: first for name, first in firsts if first.weight.requires_grad}


def _kept_inputs(linears: dict[str, Any], stream: int, product: int, autocast: bool) -> float:
    """Bytes per token that a layer keeps of the inputs of its linear layers, and between the matrices of adapters."""
    total, adapters = 0, _adapters(linears)
    for group in _READERS:
        shared = False
        for name in group:
            if (linear := linears.get(name)) is None:
                continue
            width = linear.in_features
            if getattr(linear, "base_layer", linear).weight.requires_grad and (autocast or not shared):
                total, shared = total + product * width, True
            if (first := adapters.get(name)) is None:
                continue
            own = product if autocast else first.weight.element_size()
            dropout = any(getattr(part, "p", 0) for part in linear.lora_dropout.values())
            if autocast or dropout or own != stream or not shared:
                total += own * width
                shared = shared or own == stream
            total += own * first.out_features
    return total


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
