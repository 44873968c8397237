"""What tests of whole runs share."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from balcap.policy.policy import Policy
    from balcap.trainer.update import OptimizerLoop

ROOT = Path(__file__).parents[1]


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run_fit(arguments: list[str], *launcher: str) -> str:
    """What a run in a process of its own, which may start others, printed."""
    done = subprocess.run(
        [sys.executable, *launcher, "main.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def optimizer_loop(policy: Policy) -> OptimizerLoop:
    """The trainer's part of an update, without a trainer."""
    import torch

    from balcap.trainer.update import OptimizerLoop

    def clip(norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(policy.parameters(), norm)

    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    return OptimizerLoop(optimizer, None, torch.Tensor.backward, clip, nullcontext, lambda tensor: tensor)
