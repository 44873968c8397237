"""Flash attention over sequences of any lengths that stand side by side, on GPUs that have it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

HALF = (torch.bfloat16, torch.float16)
"""What it works in."""

_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 never refuses it


@functools.cache
def has_varlen(device: torch.device) -> bool:
    """Whether flash attention runs there: CUDA from Ampere on."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    query: Float[Tensor, "N Hq D"],
    key: Float[Tensor, "S Hkv D"],
    value: Float[Tensor, "S Hkv D"],
    bounds: Int[Tensor, " s+1"],
    key_bounds: Int[Tensor, " s+1"],
    longest: int,
    scale: float,
    causal: bool,
) -> Float[Tensor, "N Hq D"]:
    """Attention of s sequences, each to keys of its own.

    Args:
        query, key, value: in 16 bits, D at most 256.
        bounds: int32, where the queries of each sequence begin, and N.
        key_bounds: likewise of keys, and S.
        longest: most keys of a sequence, and at least as many as it has queries.
        scale: of the scores.
        causal: whether the last query sees all keys of its sequence, the one before it one fewer, and so on.
    """
    options: dict[str, Any] = {"enable_gqa": True} if _SHARES_HEADS else {}
    attend: Any = varlen_attn
    window = (-1, 0 if causal else -1)
    return attend(
        query, key, value, bounds, key_bounds, longest, longest, scale=scale, window_size=window, **options
    )
