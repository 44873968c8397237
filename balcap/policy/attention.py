"""Attention over a packed sequence: prompts causally, captions on [their prompt, themselves].

Registered with transformers under a name of its own; where no packed attention is given, as in ``generate``, the
attention that was there before does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from balcap.policy.layout import AttentionLayout
from balcap.policy.varlen import HALF, varlen_attention

PREFIX = "balcap_"
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3")

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Visible(NamedTuple):
    """What tokens see in a layer that does not attend to all tokens before and no others: True where a row sees a column.

    Attributes:
        prompts: ``[b, 1, P, P]`` tokens of prompts.
        captions: ``[b * G, 1, L, P + L]`` tokens of a caption, of its prompt and itself.
    """

    prompts: Bool[Tensor, "b 1 P P"]
    captions: Bool[Tensor, "bG 1 L P+L"]


def install(language_model: Any) -> None:
    """Let the forward of a text model of transformers take the keyword ``packed_attention``.

    It is called in every layer as ``(module, query, key, value, **options) -> [1, N, Hq, D]`` (`Family.attention`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = language_model.config._attn_implementation
    if name.startswith(PREFIX):
        return
    original = ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        packed_attention = options.pop("packed_attention", None)
        if packed_attention is None:
            return original(module, query, key, value, mask, **options)
        return packed_attention(module, query, key, value, **options), None

    AttentionInterface.register(PREFIX + name, attend)
    AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    language_model.set_attn_implementation(PREFIX + name)


def shared_prefix_attention(
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hkv N D"],
    value: Float[Tensor, "1 Hkv N D"],
    layout: AttentionLayout,
    scale: float | None = None,
    visible: Visible | None = None,
) -> Float[Tensor, "1 N Hq D"]:
    """Attention in a constant number of calls for all images: prompts on themselves, captions on their prompt and
    themselves.

    Exact: every token gets what it would get in a sequence of its prompt and its caption alone.

    Args:
        query, key, value: projections of the packed sequence, rotated to their positions.
        layout: where prompts and captions stand.
        scale: of the scores; None for 1 / sqrt(D).
        visible: what tokens see; None for all tokens before, and themselves.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as for torch's own attention
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attend: Callable[..., Tensor]
    if visible is not None:
        attend = partial(_expanded, visible=visible)
    elif device == "cpu":
        attend = _merged
    elif layout.varlen is not None and query.dtype in HALF and query.shape[-1] <= 256:
        attend = _varlen
    else:
        attend = _expanded
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    return attend(q, k, v, scale, layout)[None]


# ── a CPU: captions on their prompt and on themselves apart, merged by log-sum-exp ───────────────────


def _merged(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: AttentionLayout) -> Tensor:
    """``[N, Hq, D]``."""
    return _Merged.apply(query, key, value, scale, *layout[:-1])


class _Merged(torch.autograd.Function):
    """Attention to two sets of keys, o1 and o2 with the log-sum-exp of their scores l1 and l2, is attention to both::

        l = log(exp l1 + exp l2)        o = exp(l1 - l) o1 + exp(l2 - l) o2

    and its gradients are what the kernel's backward makes of each set, given o and l. So no prompt's keys are repeated for
    its captions, and nothing is masked but by causality.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, *index: Any) -> Tensor:
        layout = AttentionLayout(*index)
        q, k, v = (_of_prompts(x, layout) for x in (query, key, value))
        out, lse = map(_rows, _flash(q, k, v, 0.0, True, scale=scale))
        if layout.captions.shape[1]:
            q, own = _of_captions(query, layout), layout.own.flatten(0, 1)
            on_prompt, log_prompt = map(_rows, _flash(q, k, v, attn_mask=_additive(layout, q), scale=scale))
            q, k, v = (_some(x, own) for x in (query, key, value))
            places = layout.places.flatten()
            on_own, log_own = (_rows(x)[places] for x in _flash(q, k, v, 0.0, True, scale=scale))
            both = torch.logaddexp(log_prompt, log_own)
            share = (log_prompt - both).exp()[..., None].to(out.dtype)
            out = torch.cat((out, torch.lerp(on_own, on_prompt, share)))
            lse = torch.cat((lse, both))
        out, lse = _in_order(out, layout), _in_order(lse, layout)
        ctx.save_for_backward(query, key, value, out, lse, *index)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse, *index = ctx.saved_tensors
        layout = AttentionLayout(*index)
        # Of padding exp(score - lse) is 0, and so are its gradients.
        lse = torch.nn.functional.pad(lse, (0, 0, 0, 1), value=torch.inf)

        def gradients(parts: Any, index: Tensor, k: Tensor, v: Tensor, causal: bool, **mask: Any) -> Any:
            grad, q, out = parts
            return _flash_backward(
                grad, q, k, v, out, lse[index].transpose(1, 2), 0.0, causal, **mask, scale=ctx.scale
            )

        rows = (grad, query, out)
        k, v = _of_prompts(key, layout), _of_prompts(value, layout)
        of_prompts = gradients([_of_prompts(x, layout) for x in rows], layout.prompts, k, v, True)
        if not layout.captions.shape[1]:
            found = tuple(map(_rows, of_prompts))
        else:
            parts = [_of_captions(x, layout) for x in rows]
            mask = _additive(layout, parts[0])
            on_prompt = gradients(parts, layout.captions, k, v, False, attn_mask=mask)
            own = layout.own.flatten(0, 1)
            k, v = _some(key, own), _some(value, own)
            of_own = gradients([_some(x, own) for x in rows], own, k, v, True)
            of_q, of_k, of_v = (_rows(x)[layout.places.flatten()] for x in of_own)
            found = (
                torch.cat((_rows(of_prompts[0]), of_q.add_(_rows(on_prompt[0])))),
                torch.cat((_rows(of_prompts[1].add_(on_prompt[1])), of_k)),
                torch.cat((_rows(of_prompts[2].add_(on_prompt[2])), of_v)),
            )
        return *(_in_order(x, layout) for x in found), *(None for _ in range(1 + len(index)))


def _some(rows: Tensor, index: Tensor) -> Tensor:
    """``[b, H, L, D]`` of rows ``[N, H, D]``; for padding, whose index is N, the last one stands."""
    return _heads(rows, index.clamp(max=len(rows) - 1))


def _of_prompts(rows: Tensor, layout: AttentionLayout) -> Tensor:
    """``[b, H, P, D]`` of rows ``[N, H, D]``. One image's tokens stand side by side already."""
    if len(layout.prompts) > 1:
        return _some(rows, layout.prompts)
    return rows[: layout.prompts.shape[1]].transpose(0, 1)[None]


def _of_captions(rows: Tensor, layout: AttentionLayout) -> Tensor:
    """``[b, H, M, D]``, likewise."""
    if len(layout.prompts) > 1:
        return _some(rows, layout.captions)
    return rows[layout.prompts.shape[1] :].transpose(0, 1)[None]


def _in_order(rows: Tensor, layout: AttentionLayout) -> Tensor:
    """``[N, …]`` of the rows of all prompts followed by those of all captions."""
    return rows[layout.order] if len(layout.prompts) > 1 else rows


def _with_zero(*tensors: Tensor) -> Tensor:
    """``[N + 1, sum of H, …]`` of ``[N, H, …]`` each: a row of zeros where padding's index points, which have no gradient,
    and make none."""
    first = tensors[0]
    zeros = first.new_zeros(1, sum(x.shape[1] for x in tensors), *first.shape[2:])
    return torch.cat((torch.cat(tensors, 1) if len(tensors) > 1 else first, zeros))


def _heads(rows: Tensor, index: Tensor) -> Tensor:
    """``[b, H, L, D]`` of rows ``[N + 1, H, D]``."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _rows(heads: Tensor) -> Tensor:
    """``[b * L, H, …]`` of ``[b, H, L, …]``."""
    return heads.transpose(1, 2).flatten(0, 1)


def _additive(layout: AttentionLayout, like: Tensor) -> Tensor | None:
    """``[b, 1, M, P]`` -inf on the padding of shorter prompts."""
    if layout.prompt_mask is None:
        return None
    mask = like.new_zeros(layout.prompt_mask.shape).masked_fill(~layout.prompt_mask, -torch.inf)
    return mask[:, None, None].expand(-1, 1, layout.captions.shape[1], -1)


# ── GPUs with flash attention: prompts and captions are sequences of one call ────────────────────────


def _varlen(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: AttentionLayout) -> Tensor:
    """``[N, Hq, D]``. A caption's queries are the last ones of its keys, and causal attention counts from the end."""
    varlen: Any = layout.varlen
    keys, values = (_Copied.apply(rows, varlen.keys, varlen.copies) for rows in (key, value))
    return varlen_attention(
        query, keys, values, varlen.bounds, varlen.key_bounds, varlen.longest, scale, causal=True
    )


class _Copied(torch.autograd.Function):
    """Rows ``[N, H, D]`` at an index ``[S]``, with the index of their copies ``[N, 1 + G]`` for the gradient: a sum in
    float32 and in one order, where torch's own would add the copies up one by one in their dtype, in any order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Int[Tensor, S], copies: Tensor) -> Tensor:  # noqa: F821
        ctx.save_for_backward(copies)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (copies,) = ctx.saved_tensors
        grad = torch.cat((grad, grad.new_zeros(1, *grad.shape[1:])))
        return grad[copies].sum(1), None, None


# ── the others: torch's attention, with the prompt's keys beside each caption's own ──────────────────


def _expanded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    layout: AttentionLayout,
    visible: Visible | None = None,
) -> Tensor:
    """``[N, Hq, D]``, in two calls."""
    heads = (query.shape[1], key.shape[1], key.shape[1])
    qkv = _with_zero(query, key, value)
    of_prompts = _heads(qkv, layout.prompts)
    q, k, v = of_prompts.split(heads, 1)
    if visible is None:
        grouped = heads[0] > heads[1]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        out = _masked(q, k, v, visible.prompts, scale)
    out = _rows(out)
    if layout.captions.shape[1]:
        (_, G, L), P, own = layout.own.shape, layout.prompts.shape[1], _heads(qkv, layout.own.flatten(0, 1))
        prompts = of_prompts[:, None, heads[0] :].expand(-1, G, -1, -1, -1).flatten(0, 1)
        k, v = torch.cat((prompts, own[:, heads[0] :]), 2).split(heads[1:], 1)
        if visible is not None:
            mask = visible.captions
        else:
            mask = torch.ones(L, P + L, dtype=torch.bool, device=k.device).tril(P)
            if layout.prompt_mask is not None:
                of_prompt = torch.nn.functional.pad(layout.prompt_mask, (0, L), value=True)
                mask = mask & of_prompt.repeat_interleave(G, 0)[:, None, None]
        attended = _masked(own[:, : heads[0]], k, v, mask, scale)
        out = torch.cat((out, _rows(attended).index_select(0, layout.places.flatten())))
    return out.index_select(0, layout.order)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``[n, Hq, L, D]``. Queries that share keys stand behind one another, because few kernels take a mask and shared heads
    at once."""
    shared, length = query.shape[1] // key.shape[1], query.shape[2]
    stacked = query.unflatten(1, (-1, shared)).flatten(2, 3)  # [n, Hkv, shared * L, D]
    out = scaled_dot_product_attention(stacked, key, value, torch.cat([mask] * shared, -2), scale=scale)
    return out.unflatten(2, (shared, length)).flatten(1, 2)
