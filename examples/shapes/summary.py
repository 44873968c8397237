"""What a run on the embedded world changed: scores and captions before and after.

python -m examples.shapes.summary runs/demo                   a Markdown table, captions, and where the files are
python -m examples.shapes.summary runs/seed-0 runs/seed-1 …   the table of several seeds
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

TITLES = {
    "precision": "precision",
    "recall": "recall",
    "linguistic": "linguistic",
    "b_capscore": "b-CapScore",
    "length_ratio": "length ratio",
}


def validations(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and last row of ``metrics.csv`` that holds ``val/*``."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/b_capscore")]
    if len(rows) < 2:
        raise ValueError(f"{run / 'metrics.csv'} holds {len(rows)} validations; a summary compares two")
    first, last = ({name: float(row[f"val/{name}"]) for name in TITLES} for row in (rows[0], rows[-1]))
    return first, last


def validation_captions(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the rollout log of the first and of the last validation."""
    import pyarrow.parquet as pq

    steps: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((run / "rollouts").glob("val-*.parquet")):
        steps.setdefault(file.name.split("-")[1], []).extend(pq.read_table(file).to_pylist())
    return steps[min(steps)], steps[max(steps)]


def markdown(runs: Sequence[Path]) -> str:
    """One row per run, before → after, and the mean change with its standard deviation over runs."""
    lines = [_row("", TITLES.values()), "| --- |" + " ---: |" * len(TITLES)]
    ends = [validations(run) for run in runs]
    for run, (first, last) in zip(runs, ends, strict=True):
        lines.append(_row(run.name, [f"{first[name]:.3f} → {last[name]:.3f}" for name in TITLES]))
    changes = [[last[name] - first[name] for first, last in ends] for name in TITLES]
    spread = [f"**{mean(each):+.3f} ± {stdev(each) if len(each) > 1 else 0:.3f}**" for each in changes]
    return "\n".join([*lines, _row("**change**", spread)])


def _row(first: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def captions(run: Path) -> str:
    """Three held-out images: the reference, and captions before and after."""
    before, after = ({row["sample_id"]: row for row in rows} for rows in validation_captions(run))
    return "\n".join(
        f"\n{image}\n  reference  {before[image]['reference']}\n  before     {before[image]['caption']}"
        f"\n  after      {after[image]['caption']}"
        for image in [image for image in before if image in after][:3]
    )


def main(runs: Sequence[Path]) -> None:
    """Print the table; for a single run also captions and its files."""
    print(f"held-out images, captions sampled at the training temperature\n\n{markdown(runs)}")
    if len(runs) == 1:
        print(captions(runs[0]))
        print(
            f"\ncurves are in {runs[0]}/curves.png, the model in {runs[0]}/export; see Outputs in the README"
        )


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
