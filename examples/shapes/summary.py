"""What a run on the embedded world changed: scores and captions before and after.

python -m examples.shapes.summary runs/demo                   one run, with captions
python -m examples.shapes.summary runs/seed-0 runs/seed-1 …   a Markdown table of several seeds
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

NAMES = ("precision", "recall", "linguistic", "b_capscore", "length_ratio", "caption_tokens")


def validations(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and last row of ``metrics.csv`` that holds ``val/*``."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/b_capscore")]
    if len(rows) < 2:
        raise ValueError(f"{run / 'metrics.csv'} holds {len(rows)} validations; a summary compares two")
    first, last = ({name: float(row[f"val/{name}"]) for name in NAMES} for row in (rows[0], rows[-1]))
    return first, last


def validation_captions(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the rollout log of the first and of the last validation."""
    import pyarrow.parquet as pq

    steps: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((run / "rollouts").glob("val-*.parquet")):
        steps.setdefault(file.name.split("-")[1], []).extend(pq.read_table(file).to_pylist())
    return steps[min(steps)], steps[max(steps)]


def markdown(runs: list[Path]) -> str:
    """One row per run, before → after, and the mean change with its standard deviation over runs."""
    titles = ("precision", "recall", "linguistic", "b-CapScore", "length ratio")
    lines = [_row("", titles), "| --- |" + " ---: |" * len(titles)]
    ends = [validations(run) for run in runs]
    names = NAMES[: len(titles)]
    for run, (first, last) in zip(runs, ends, strict=True):
        lines.append(_row(run.name, [f"{first[name]:.3f} → {last[name]:.3f}" for name in names]))
    changes = [[last[name] - first[name] for first, last in ends] for name in names]
    spread = [f"**{mean(each):+.3f} ± {stdev(each) if len(each) > 1 else 0:.3f}**" for each in changes]
    return "\n".join([*lines, _row("**change**", spread)])


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def main(run: Path) -> None:
    """Print the summary with Rich."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    first, last = validations(run)
    columns = ("", "before", "after", "change")
    table = Table(*columns, title="held-out images, captions sampled at the training temperature")
    for name in NAMES:
        table.add_row(name, f"{first[name]:.3f}", f"{last[name]:.3f}", f"{last[name] - first[name]:+.3f}")
    console.print(table)
    before, after = ({row["sample_id"]: row for row in rows} for rows in validation_captions(run))
    for image in [image for image in before if image in after][:3]:
        texts = (before[image]["reference"], before[image]["caption"], after[image]["caption"])
        console.print(
            "\n{}\n  reference  {}\n  before     {}\n  after      {}".format(image, *texts), markup=False
        )
    console.print(
        f"\ncurve     {run}/curves.png\nrollouts  {run}/rollouts/\nmetrics   {run}/metrics.csv"
        f"\nexport    {run}/export/  (AutoModelForImageTextToText.from_pretrained)"
        f"\nboard     tensorboard --logdir {run}",
        markup=False,
    )


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    main(*folders) if len(folders) == 1 else print(markdown(folders))
