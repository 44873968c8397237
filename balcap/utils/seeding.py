"""Random numbers that depend on where a run stands and on nothing that ran before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, seed: int, *place: int) -> Iterator[None]:
    """Within the block torch's numbers come from `seed` and `place` alone; afterwards they go on as before.

    Args:
        device: whose generator is seeded beside the CPU's.
        seed: of the run.
        place: such as stage, step and rank: a resumed run draws what it would have drawn.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        mixed = torch.Generator().manual_seed(seed)
        for part in place:
            state = int(torch.randint(2**62, (1,), generator=mixed))
            mixed.manual_seed((state + part * 0x9E3779B97F4A7C15) % 2**63)
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=mixed)))
        yield
