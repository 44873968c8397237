"""Attention of a vision tower over windows: all in one call where the device has a kernel for it, else those of one size in
one batched call, where transformers makes a call each. Its patches embedded by one matrix product, where transformers makes
a convolution; its MLP with a width that fast kernels take.

Exact: attention within a window does not depend on the others. A picture of Qwen2.5-VL's has up to a hundred windows of
at most four sizes (whole ones, and those cut by the right and the lower edge). A convolution whose input is as large as
its kernel is a product. Zeros that widen an MLP add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from balcap.policy.varlen import HALF, has_varlen, varlen_attention


@dataclass(frozen=True)
class Windows:
    """Windows of patches that stand side by side, sorted by size.

    Attributes:
        groups: (how many, patches of each), for each size.
        order: ``[N]`` patches in that order; None where they stand so.
        back: ``[N]`` the inverse.
    """

    groups: tuple[tuple[int, int], ...]
    order: Int[Tensor, N] | None = None  # noqa: F821
    back: Int[Tensor, N] | None = None  # noqa: F821

    @classmethod
    def of(cls, bounds: Tensor) -> Windows:
        """Of W windows with these ``[W + 1]`` bounds; made once for a tensor, which all layers of a pass share: the device
        must be asked."""
        known = getattr(bounds, "balcap_windows", None)
        if known is None:
            known = bounds.balcap_windows = cls._of(bounds.tolist(), bounds.device)  # type: ignore[attr-defined]
        return known

    @classmethod
    def _of(cls, bounds: list[int], device: torch.device) -> Windows:
        lengths = [end - start for start, end in pairwise(bounds)]
        sizes = sorted({length for length in lengths if length})
        groups = tuple((lengths.count(size), size) for size in sizes)
        if len(sizes) < 2:
            return cls(groups)
        starts = [bounds[at] for size in sizes for at, length in enumerate(lengths) if length == size]
        spans = [size for count, size in groups for _ in range(count)]
        order = torch.cat([torch.arange(at, at + size) for at, size in zip(starts, spans, strict=True)])
        return cls(groups, order.to(device), order.argsort().to(device))


class WithLongest:
    """The forward of a block, whose attention learns how long the longest window is where one call takes them all: with that
    the block can be compiled, as `needs` of `balcap.policy.compiled.Compiled`.

    Args:
        forward: of the block.
    """

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
        device, dtype = hidden_states.device, hidden_states.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if has_varlen(device) and dtype in HALF:
            options["longest"] = max(size for _, size in Windows.of(cu_seqlens).groups)
        return self.forward(hidden_states, cu_seqlens=cu_seqlens, **options)


def install(tower: Any) -> None:
    """Let the attention layers of a tower that compute queries, keys and values in one go (Qwen's) work so, where they
    use torch's own attention; transformers' flash attention takes windows of any sizes in one call by itself. And its other
    parts, see the module."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in tower.modules():
        if "forward" in vars(module):
            continue
        if _is_attention(module):
            module.forward = MethodType(_forward, module)
        elif isinstance(module, GradientCheckpointingLayer) and _is_attention(getattr(module, "attn", None)):
            module.forward = WithLongest(module.forward)
        elif all(type(getattr(module, name, None)) is torch.nn.Linear for name in _MLP):
            module.forward = MethodType(_mlp, module)
        elif isinstance(module, torch.nn.Conv3d):
            module.forward = MethodType(_one_patch, module)  # type: ignore[method-assign]


def _is_attention(module: Any) -> bool:
    fits = all(hasattr(module, name) for name in ("qkv", "proj", "num_heads", "scaling"))
    return fits and module.config._attn_implementation == "sdpa"


_MLP = ("gate_proj", "up_proj", "down_proj")


def _mlp(mlp: Any, hidden_states: Float[Tensor, "N H"]) -> Float[Tensor, "N H"]:
    """As the layer's own forward. On a GPU matrices whose width is no multiple of 8, such as Qwen2.5-VL's 3,420, would go
    through kernels several times slower."""
    if hidden_states.device.type == "cpu" or mlp.gate_proj.out_features % 8 == 0:
        return type(mlp).forward(mlp, hidden_states)
    return _widened_mlp(mlp, hidden_states)


def _widened_mlp(mlp: Any, hidden_states: Float[Tensor, "N H"]) -> Float[Tensor, "N H"]:
    """To the next multiple of 8; the activation of 0 is 0."""
    missing = -mlp.gate_proj.out_features % 8
    gate, up = (
        linear(
            hidden_states,
            pad(layer.weight, (0, 0, 0, missing)),
            None if layer.bias is None else pad(layer.bias, (0, missing)),
        )
        for layer in (mlp.gate_proj, mlp.up_proj)
    )
    return linear(mlp.act_fn(gate) * up, pad(mlp.down_proj.weight, (0, missing)), mlp.down_proj.bias)


def _one_patch(conv: torch.nn.Conv3d, patches: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N E 1 1 1"]:
    """As the convolution, where each input is one patch."""
    if patches.shape[2:] != conv.kernel_size:
        return torch.nn.Conv3d.forward(conv, patches)
    embedded = linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
    return embedded[..., None, None, None]


def _forward(
    attention: Any,
    hidden_states: Float[Tensor, "N H"],
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    longest: int | None = None,
    **options: Any,
) -> Float[Tensor, "N H"]:
    """As the layer's own forward."""
    tokens = len(hidden_states)
    projected = attention.qkv(hidden_states).view(tokens, 3, attention.num_heads, -1)
    cos, sin = (part.float()[:, None, None] for part in position_embeddings)
    both = projected[:, :2].float()
    turned = torch.cat((-both[..., both.shape[-1] // 2 :], both[..., : both.shape[-1] // 2]), -1)
    rotated = torch.addcmul(both * cos, turned, sin).to(projected.dtype)
    qkv = torch.cat((rotated, projected[:, 2:]), 1)  # [N, 3, heads, D]
    if longest is not None:
        bounds = cu_seqlens.int()
        query, key, value = qkv.unbind(1)
        scale = attention.scaling
        out = varlen_attention(query, key, value, bounds, bounds, longest, scale, causal=False)
        return attention.proj(out.flatten(1))
    windows = Windows.of(cu_seqlens)
    if windows.order is not None:
        qkv = qkv.index_select(0, windows.order)
    parts, start = [], 0
    for count, size in windows.groups:
        group = qkv[start : start + count * size].view(count, size, *qkv.shape[1:])
        query, key, value = group.permute(2, 0, 3, 1, 4)  # [count, heads, size, D] each
        attended = scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        parts.append(attended.transpose(1, 2).reshape(count * size, -1))
        start += count * size
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return attention.proj(out if windows.back is None else out.index_select(0, windows.back))
