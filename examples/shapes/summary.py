"""What a run on the embedded world changed: scores and captions before and after.

python -m examples.shapes.summary runs/demo                   one run, with captions
python -m examples.shapes.summary runs/seed-0 runs/seed-1 …   a Markdown table of several seeds
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import mean, stdev

NAMES = ("precision", "recall", "linguistic", "b_capscore", "length_ratio", "caption_tokens")


def validations(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and last row of ``metrics.csv`` that holds ``val/*``."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/b_capscore")]
    if len(rows) < 2:
        raise ValueError(f"{run / 'metrics.csv'} holds {len(rows)} validations; a summary compares two")
    first, last = ({name: float(row[f"val/{name}"]) for name in NAMES} for row in (rows[0], rows[-1]))
    return first, last


def captions(run: Path, n: int = 3) -> list[tuple[str, str, str, str]]:
    """(image, reference, before, after) of a few held-out images."""
    import pyarrow.parquet as pq

    files = sorted((run / "rollouts").glob("val-*.parquet"))
    steps = sorted({f.name.split("-")[1] for f in files})
    tables = []
    for step in (steps[0], steps[-1]):
        rows = [row for f in files if f.name.split("-")[1] == step for row in pq.read_table(f).to_pylist()]
        tables.append({row["sample_id"]: row for row in rows})
    before, after = tables
    both = [i for i in before if i in after][:n]
    return [(i, before[i]["reference"], before[i]["caption"], after[i]["caption"]) for i in both]


def markdown(runs: list[Path]) -> str:
    """One row per run, before → after, and the mean change with its standard deviation over runs."""
    names = ("precision", "recall", "linguistic", "b_capscore", "length_ratio")
    titles = ("", "precision", "recall", "linguistic", "b-CapScore", "length ratio")
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(names)]
    changes: dict[str, list[float]] = {name: [] for name in names}
    for run in runs:
        first, last = validations(run)
        cells = [f"{first[name]:.3f} → {last[name]:.3f}" for name in names]
        lines.append("| " + " | ".join([run.name, *cells]) + " |")
        for name in names:
            changes[name].append(last[name] - first[name])
    spread = [f"{mean(v):+.3f} ± {stdev(v) if len(v) > 1 else 0:.3f}" for v in changes.values()]
    lines.append("| " + " | ".join(["**change**", *(f"**{cell}**" for cell in spread)]) + " |")
    return "\n".join(lines)


def main(run: Path) -> None:
    """Print the summary with Rich."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    first, last = validations(run)
    table = Table(title="held-out images, captions sampled at the training temperature")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name in NAMES:
        table.add_row(name, f"{first[name]:.3f}", f"{last[name]:.3f}", f"{last[name] - first[name]:+.3f}")
    console.print(table)
    for image, reference, before, after in captions(run):
        console.print(
            f"\n{image}\n  reference  {reference}\n  before     {before}\n  after      {after}", markup=False
        )
    console.print(
        f"\ncurve     {run}/curves.png\nrollouts  {run}/rollouts/\nmetrics   {run}/metrics.csv"
        f"\nexport    {run}/export/  (AutoModelForImageTextToText.from_pretrained)"
        f"\nboard     tensorboard --logdir {run}",
        markup=False,
    )


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    if len(folders) == 1:
        main(folders[0])
    else:
        print(markdown(folders))
