"""Memory of a decoder layer's forward and backward, by arithmetic.

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

A mixture of experts has, in place of the MLP's, with k experts of I for each token and E in all::

    experts            3 b k I + b k H    as of an MLP, and what each expert says, before it is weighted
    router             b E + 4 E + 20 k   its scores, their softmax, and the weights and numbers of those chosen
    inputs of experts  b k (H + I)        where they are trained

Where layers are compiled, torch's partitioner keeps what matrix products and attention read in backward, or leave, and
makes what lies between again::

    each RMSNorm       e H + 4            input as it is (b of queries, keys), and the inverse of its root mean square
    MLP                2 b I              gate and up
    inputs             as above, but once for all that read it, unless there is dropout
"""

from __future__ import annotations

from typing import Any

_READERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)
"""Linear layers of a dense decoder layer, those with the same input together; GLM's has one for gate and up."""


def decoder_layers(language_model: Any) -> list[Any]:
    """Its layers, dense or mixtures of experts; empty where one of them is neither, and its memory is not known."""
    layers = [m for m in language_model.modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]
    text = language_model.config.get_text_config()
    dense = all(map(_is_dense, map(_linears, layers))) and not hasattr(text, "num_experts_per_tok")
    return layers if dense or all(map(_is_mixture, layers)) else []


def layer_costs(
    layers: list[Any], text: Any, stream: int, product: int, autocast: bool, compiled: bool, merged: bool
) -> dict[str, float]:
    """Bytes that the dearest of these layers takes, by the attributes of `balcap.policy.memory.UpdateCosts`.

    Args:
        layers: of `decoder_layers`.
        text: config of the language model.
        stream: bytes of a number in the residual stream.
        product: in matrix products.
        autocast: whether those are cast.
        compiled: whether layers are compiled.
        merged: whether captions attend to their prompt where it lies, as on CPUs.
    """
    linears = [_linears(layer) for layer in layers]
    mixed = _is_mixture(layers[0])
    hidden, heads = text.hidden_size, text.num_attention_heads
    chosen = text.num_experts_per_tok if mixed else 0
    middle = chosen * text.moe_intermediate_size if mixed else linears[0]["down_proj"].in_features
    size = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * size, text.num_key_value_heads * size
    widths = {"q_norm": queries, "k_norm": keys}
    named = ((name.rsplit(".", 1)[-1], module) for name, module in layers[0].named_modules())
    norms = [
        (name, module) for name, module in named if "norm" in name
    ]  # those of the layer itself come last
    adapters = _adapters(linears[0]).values()
    wide = any(first.weight.element_size() > product for first in adapters) and not autocast
    spoken = 2 * product * chosen * hidden  # by experts, before and after it is weighted
    return {
        "per_token": sum(
            _norm(module, widths.get(name, hidden), product if name in widths else stream, compiled)
            for name, module in norms
        )
        + product * (2 * queries + 2 * keys + (2 if compiled else 3) * middle)
        + 4 * heads
        + (_kept_of_experts(layers[0].mlp, chosen, product) if mixed else 0)
        + max(_kept_inputs(found, stream, product, autocast, compiled) for found in linears),
        "per_seen_key": 0 if merged else product * 2 * keys,
        "apart": product * 2 * (queries - keys),
        "checkpointed": stream * hidden,
        "gradient": middle * (4 * product + (4 if wide else 0)) + spoken,
        "inference": 3 * product * middle + (4 + 2 * stream) * hidden + spoken,
        "outside": _norm(norms[-1][1], hidden, stream, False),
    }


def _norm(module: Any, width: int, size: int, compiled: bool) -> int:
    """Bytes per token that an RMSNorm keeps, of a token's `width` numbers of `size` bytes; those of queries and keys work on
    each head."""
    root = 4 * (width // len(module.weight))
    if compiled:
        return size * width + root
    return 4 * width + root + (size * width if module.weight.requires_grad else 0)


def _linears(layer: Any) -> dict[str, Any]:
    """Of a decoder layer, by name; those with an adapter are its modules around them."""
    names = {name for group in _READERS for name in group}
    found = ((name.rsplit(".", 1)[-1], module) for name, module in layer.named_modules())
    return {name: module for name, module in found if name in names}


def _is_dense(linears: dict[str, Any]) -> bool:
    """Whether these are all linear layers of a dense decoder layer."""
    known = {name for group in _READERS for name in group}
    return set(linears) in (known - {"gate_up_proj"}, known - {"gate_proj", "up_proj"})


def _is_mixture(layer: Any) -> bool:
    """Whether a decoder layer has experts for an MLP, and no other."""
    parts = {name for name, _ in layer.mlp.named_children()}
    return (
        parts == {"gate", "experts"}
        and {"gate_up_proj", "down_proj"} <= dict(layer.mlp.experts.named_parameters()).keys()
    )


def _kept_of_experts(mlp: Any, chosen: int, product: int) -> int:
    """Bytes per token that a mixture keeps beyond an MLP as wide as the experts of a token."""
    count, hidden, middle = mlp.experts.down_proj.shape
    inputs = (hidden + middle) if mlp.experts.down_proj.requires_grad else 0
    return product * chosen * (hidden + inputs) + (product + 4) * count + 20 * chosen


def _adapters(linears: dict[str, Any]) -> dict[str, Any]:
    """The first matrix of each trained adapter, by the name of its linear layer."""
    firsts = (
        (name, first) for name, linear in linears.items() for first in getattr(linear, "lora_A", {}).values()
    )
    return {name: first for name, first in firsts if first.weight.requires_grad}


def _kept_inputs(linears: dict[str, Any], stream: int, product: int, autocast: bool, compiled: bool) -> float:
    """Bytes per token that a layer keeps of the inputs of its linear layers, and between the matrices of adapters."""
    total, adapters = 0, _adapters(linears)
    for group in _READERS:
        kept: set[int] = set()  # sizes of the numbers of what the readers of this input keep of it
        for name in group:
            if (linear := linears.get(name)) is None:
                continue
            width = linear.in_features
            cast_each = autocast and not compiled
            if getattr(linear, "base_layer", linear).weight.requires_grad and (
                cast_each or product not in kept
            ):
                total += product * width
                kept.add(product)
            if (first := adapters.get(name)) is None:
                continue
            own = product if autocast else first.weight.element_size()
            dropout = any(getattr(part, "p", 0) for part in linear.lora_dropout.values())
            cast_each = (autocast or own != stream) and not compiled
            if cast_each or dropout or own not in kept:
                total += own * width
                kept.add(own)
            total += own * first.out_features
    return total
