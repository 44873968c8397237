"""What `torch.nn.attention.varlen.varlen_attn` computes, on any device and in any dtype, one sequence after the other; for
backward it keeps what the kernel keeps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """``[N, Hq, D]`` of queries ``[N, Hq, D]``, keys and values ``[S, Hkv, D]``; see torch."""
    bounds = [torch.tensor(each.tolist()) for each in (cu_seq_q, cu_seq_k)]
    assert all(each.dtype == torch.int32 for each in (cu_seq_q, cu_seq_k))
    assert all(int(each.diff().max()) <= most for each, most in zip(bounds, (max_q, max_k), strict=True))
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size in ((-1, 0), (-1, -1))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Varlen.apply(query, key, value, *map(Tensor.tolist, bounds), scale, window_size[1] == 0)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        out = _by_hand(q, k, v, *settings)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:2], dtype=torch.float32))  # log-sum-exp
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        qkv = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
        with torch.enable_grad():
            out = _by_hand(*qkv, *ctx.settings)
        return *torch.autograd.grad(out, qkv, grad), None, None, None, None


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int], scale: float, causal: bool
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    parts = []
    for (start, end), (first, last) in zip(pairwise(queries), pairwise(keys), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[first:last]).float() * scale
        if causal:  # the last query sees the last key
            seen = torch.ones_like(scores[0], dtype=torch.bool).tril(last - first - (end - start))
            scores = scores.masked_fill(~seen, -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v[first:last]))
    return torch.cat(parts)
