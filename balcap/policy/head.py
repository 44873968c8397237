"""Log-probabilities from hidden states without ever holding ``[tokens, vocabulary]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Chunk = Callable[[Any, Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]

CELLS = 2**26  # logits held at once: 256 MB in float32


def token_logps(
    head: Any,
    states: Float[Tensor, "M H"],
    targets: Int[Tensor, M],  # noqa: F821
    temperature: float = 1.0,
    entropy: bool = False,
    cells: int = CELLS,
    chunk: Chunk | None = None,
) -> tuple[Float[Tensor, M], Float[Tensor, M] | None]:  # noqa: F821
    """Log-probability of each target, and on request the entropy, from the states that predict them.

    Logits are made in chunks, and made again in backward, where they would not fit otherwise.

    Args:
        head: linear layer from states to logits.
        states: of the language model, after its last norm.
        targets: token ids.
        temperature: logits are divided by it, > 0.
        entropy: whether to return entropies too (nats, without gradient).
        cells: most logits held at once.
        chunk: `logps_of_chunk`, compiled; None for the function itself.

    Returns:
        float32 ``[M]`` each; None for entropies that were not asked for.
    """
    size = max(1, cells // max(1, head.weight.shape[0] if head.weight.dim() == 2 else head.out_features))
    chunk = chunk or logps_of_chunk
    if len(states) <= size:
        return chunk(head, states, targets, temperature, entropy)
    parts = [
        checkpoint(chunk, head, some, wanted, temperature, entropy, use_reentrant=False)
        for some, wanted in zip(states.split(size), targets.split(size), strict=True)
    ]
    logps = torch.cat([part[0] for part in parts])
    return logps, torch.cat([part[1] for part in parts if part[1] is not None]) if entropy else None


def logps_of_chunk(
    head: Any, states: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """As `token_logps`, with all logits at once."""
    logits = head(states).float()
    logps = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    del logits
    chosen = logps.gather(-1, targets[:, None])[:, 0]
    if not entropy:
        return chosen, None
    with torch.no_grad():
        return chosen, -logps.exp().mul_(logps).sum(-1)
