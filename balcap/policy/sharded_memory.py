"""Memory of an update on one of several ranks that share a policy (`balcap.policy.sharding`), by arithmetic.

Each rank has its part of weights, gradients and optimizer. Beside them lie, while it updates, weights that are gathered:
what is in no block (embedding, head, norms) all the time, and two blocks, the one that works and the next one; and gradients
that are not summed yet, those of the largest block as they are computed and once more in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from balcap.policy.families import base_of
from balcap.policy.memory import UpdateCosts
from balcap.policy.sharding import blocks_of, frozen_tower


def costs_of_rank(costs: UpdateCosts, model: Any, ranks: int, autocast: bool) -> UpdateCosts:
    """Of one rank.

    Args:
        costs: of the same update where each rank holds all (`balcap.policy.memory.update_costs`).
        model: adapters in, frozen parts marked; whole, on the meta device, or cut.
        ranks: that share it.
        autocast: whether weights are gathered in 16 bits.

    Returns:
        `UpdateCosts.casts` is what is gathered, and not summed yet.
    """
    kept = frozen_tower(model)
    whole = sum(weight.nbytes for weight in kept)
    blocks = [[*block.parameters()] for block in blocks_of(base_of(model), kept)]
    inside = kept.union(*blocks)
    rest = [weight for weight in model.parameters() if weight not in inside]

    def gathered(weights: Iterable[nn.Parameter], trained: bool = False) -> int:
        some = (weight for weight in weights if weight.requires_grad or not trained)
        return sum(weight.numel() * (2 if autocast else weight.element_size()) for weight in some)

    def summed(weights: Iterable[nn.Parameter]) -> int:
        return sum(4 * weight.numel() for weight in weights if weight.requires_grad)

    parts = {
        name: math.ceil(getattr(costs, name) / ranks)
        for name in ("reference", "gradients", "optimizer", "optimizer_step")
    }
    return replace(
        costs,
        **parts,
        weights=whole + math.ceil((costs.weights - whole) / ranks),
        casts=gathered(rest)
        + gathered(rest, trained=True)
        + 2 * max(map(gathered, blocks))
        + max(gathered(block, trained=True) + summed(block) for block in [*blocks, rest]),
    )
