"""Gated delta nets (arXiv 2412.06464) over a packed sequence: each prompt once, captions from the state it leaves.

Such a layer sees earlier tokens through two things alone: the state of its recurrence, and the last k - 1 columns before its
causal convolution of width k. So the captions of an image are run as a batch that begins with what its prompt left of both,
which is exact, and gradients of all captions come back to the prompt through them.

Prompts are padded on the left and captions on the right. Padding has columns of zeros: before a prompt they leave the
state at zero, as the convolution's own padding does; behind a caption they change what nobody reads.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad, softplus

from balcap.policy.layout import AttentionLayout

CHUNK = 64
"""The most tokens of a chunk: transformers' own choice."""


class Recurrence(NamedTuple):
    """The packed sequence as rectangles, for a recurrence: indices of its N tokens, and N itself where there is padding.

    Attributes:
        prompts: ``[b, P]`` tokens of each prompt, at the end of its row.
        captions: ``[b * G, C + L]`` the last C tokens of the prompt, then those of the caption.
        order: ``[N]`` where each token stands in `prompts` followed by `captions` without their first C.
    """

    prompts: Int[Tensor, "b P"]
    captions: Int[Tensor, "bG C+L"]
    order: Int[Tensor, N]  # noqa: F821

    @classmethod
    def of(cls, layout: AttentionLayout, width: int) -> Recurrence:
        """Of a packed sequence; `width` is k, of the convolution. A shorter prompt has a smaller C."""
        (_, G, _), N, prompts = layout.own.shape, len(layout.order), layout.prompts
        if layout.prompt_mask is not None:
            shift = (~layout.prompt_mask).sum(1, keepdim=True)
            at = torch.arange(prompts.shape[1], device=prompts.device) - shift
            prompts = prompts.gather(1, at.clamp(min=0)).masked_fill(at < 0, N)
        own = layout.own.flatten(0, 1)
        places = torch.empty(N + 1, dtype=torch.long, device=prompts.device)
        both = torch.cat((prompts.flatten(), own.flatten()))
        places[both] = torch.arange(len(both), device=both.device)
        before = prompts[:, 1 - width :].repeat_interleave(G, 0)
        return cls(prompts, torch.cat((before, own), 1), places[:-1])


def install(language_model: Any) -> None:
    """Let the gated delta nets of a text model of transformers take the keyword ``recurrence``; without it they work as
    before. They compute with the functions that transformers chose for them, fast kernels where those are installed."""
    for module in language_model.modules():
        if hasattr(module, "A_log") and "forward" not in vars(module):
            code = sys.modules[type(module).__module__]
            kernels = (code.causal_conv1d_fn, code.torch_chunk_gated_delta_rule)
            module.forward = partial(_forward, module, module.forward, *kernels)


def chunk_size(length: int) -> int:
    """Tokens of a chunk: the rule pads rows to whole chunks, and this makes as many of them as 64 would, without most of the
    padding. What it computes does not depend on it."""
    return math.ceil(length / math.ceil(length / CHUNK))


@torch.compiler.disable  # the rule's loop over chunks would be compiled for each length
def _forward(
    net: Any,
    original: Any,
    convolve: Any,
    delta_rule: Any,
    hidden_states: Float[Tensor, "1 N H"],
    recurrence: Recurrence | None = None,
    **options: Any,
) -> Float[Tensor, "1 N H"]:
    """As the layer's own forward; of a packed sequence where there is a `recurrence`."""
    if recurrence is None:
        return original(hidden_states, **options)
    states, heads = hidden_states[0], net.num_v_heads
    parts = (net.in_proj_qkv(states), net.in_proj_b(states), net.in_proj_a(states))
    columns = pad(torch.cat(parts, -1), (0, 0, 0, 1))  # [N + 1, …], the last are zeros
    weight = net.conv1d.weight.squeeze(1)
    shared = heads // net.num_k_heads  # not every version of the rule knows heads that share keys

    def run(index: Tensor, before: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs of all rows but the first `before` of each, which are there for the convolution; last states."""
        rows = columns.index_select(0, index.flatten()).unflatten(0, index.shape)
        mixed, beta, decay = rows.split((net.conv_dim, heads, heads), -1)
        mixed = convolve(mixed.transpose(1, 2), weight, net.conv1d.bias, activation=net.activation)
        widths = (net.key_dim, net.key_dim, net.value_dim)
        query, key, value = mixed.transpose(1, 2)[:, before:].split(widths, -1)
        # The kernels for GPUs choose for themselves.
        size = {"chunk_size": chunk_size(query.shape[1])} if query.device.type == "cpu" else {}
        return delta_rule(
            query.unflatten(-1, (-1, net.head_k_dim)).repeat_interleave(shared, 2),
            key.unflatten(-1, (-1, net.head_k_dim)).repeat_interleave(shared, 2),
            value.unflatten(-1, (-1, net.head_v_dim)),
            g=-net.A_log.float().exp() * softplus(decay[:, before:].float() + net.dt_bias),
            beta=beta[:, before:].sigmoid(),
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            **size,
        )

    out, state = run(recurrence.prompts, 0, None)
    out = out.flatten(0, 1)
    before = min(net.conv_kernel_size - 1, recurrence.prompts.shape[1])
    if recurrence.captions.shape[1] > before:
        captions = len(recurrence.captions) // len(state)
        of_captions, _ = run(recurrence.captions, before, state.repeat_interleave(captions, 0))
        out = torch.cat((out, of_captions.flatten(0, 1)))
    gate = net.in_proj_z(states).unflatten(-1, (heads, -1))
    normed = net.norm(out.index_select(0, recurrence.order).flatten(0, 1), gate.flatten(0, 1))
    return net.out_proj(normed.unflatten(0, (-1, heads)).flatten(1))[None]
