"""How much rewards differ between the captions of one image: what an advantage is made of.

python main.py validate --config configs/shapes.yaml --data.val_size 64 --model.val_captions 8 --run_dir runs/spreads
python -m examples.shapes.spreads runs/spreads
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def spreads(run: Path) -> dict[str, tuple[float, float, int]]:
    """Reward -> mean over captions, standard deviation within an image's captions (ddof 1, averaged over images that have
    two of them), captions that miss it; of the rollout log of ``main.py validate``, and ``length_ratio`` beside them.

    Raises:
        ValueError: there is none, or no image has two captions.
    """
    import pyarrow.parquet as pq

    files = sorted((run / "rollouts").glob("validate-*.parquet"))
    if not files:
        raise ValueError(
            f"{run / 'rollouts'} holds no captions of main.py validate; run it with this --run_dir"
        )
    last = [path for path in files if path.name.split("-")[1] == files[-1].name.split("-")[1]]
    rows = [row for path in last for row in pq.read_table(path).to_pylist()]
    rows = [row | {"length_ratio": row["length"] / (row["reference_length"] or math.nan)} for row in rows]
    names = [name for name in rows[0] if name.startswith("reward/")] + ["length_ratio"]
    return {name.removeprefix("reward/"): _spread(rows, name) for name in names}


def _spread(rows: list[dict], name: str) -> tuple[float, float, int]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row[name] is not None and math.isfinite(row[name]):
            groups.setdefault(row["sample_id"], []).append(row[name])
    stds = [float(np.std(group, ddof=1)) for group in groups.values() if len(group) > 1]
    if not stds:
        raise ValueError(f"{name}: no image has two captions; give main.py validate --model.val_captions 8")
    values = [value for group in groups.values() for value in group]
    return float(np.mean(values)), float(np.mean(stds)), len(rows) - len(values)


def table(run: Path) -> Iterator[str]:
    """Of a run, in Markdown."""
    yield "| reward | mean | std within a group | missing |"
    yield "| --- | ---: | ---: | ---: |"
    for name, (mean, std, missing) in spreads(run).items():
        yield f"| {name} | {mean:.3f} | {std:.3f} | {missing} |"


if __name__ == "__main__":
    print("\n".join(table(Path(sys.argv[1]))))
