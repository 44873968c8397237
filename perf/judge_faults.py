"""What a judge that misbehaves costs: training on the embedded world with a clean and with a faulty server.

    python perf/judge_faults.py            seeds 0, 1 and 2, 100 steps each, both servers
    python perf/judge_faults.py --quick    one seed, 6 steps of 2 images, 20 held-out images: shows that it runs

The judge is reached over HTTP as gpt-4o-mini would be, through litellm. The clean server answers every request
from the truth; the faulty one goes wrong on 30 % of them, in every way of `tests.judge_server.PASSING`: rate
limits, server errors, silence, broken connections, wrong answers, refusals. What does not come right within
the judge's retries is missing (NaN). The gain is b-CapScore on held-out images after minus before training,
as the run saw it with its own judge; the *true* gain rates the same held-out captions by the truth, none
missing. The noise is the standard deviation of the gain over the seeds of the clean runs.
"""

from __future__ import annotations

# ruff: noqa: E402  the project's root must be on the path first
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data/shapes"
QUICK = [
    "--data.batch_size=2",
    "--data.val_size=20",
    "--data.val_batch_size=20",
    "--rollout_log.max_images=0",
]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from balcap.judge import Verdict
from balcap.rewards import b_capscore
from balcap.rewards.precision import score_precision
from balcap.rewards.recall import score_recall
from examples.shapes.scene import scene_of
from examples.shapes.fluency import rate
from examples.shapes.language import covered, is_pointable, is_true, read_facts
from examples.shapes.summary import validations
from tests.judge_server import server_process


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        before: b-CapScore of the first validation.
        after: of the last.
        true_before: b-CapScore of the captions of the first validation by the truth.
        true_after: of the last.
        steps: training steps that are in ``metrics.csv``.
        missing: share of rewards that are missing, over all rollouts of the training steps.
        judgments_missing: ``judge/failed`` over all steps.
        misbehaved: share of the server's requests that something was wrong with.
        requests: of the whole run.
        seconds: of the whole run.
    """

    before: float
    after: float
    true_before: float
    true_after: float
    steps: int
    missing: float
    judgments_missing: float
    misbehaved: float
    requests: int
    seconds: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def true_gain(self) -> float:
        return self.true_after - self.true_before


def train(
    out: Path, seed: int, steps: int, fault_share: float, extra: list[str], threads: dict[str, str]
) -> Run:
    """`main.py fit` in a process of its own, against a server of its own.

    Args:
        out: folder of the run, its cache, its console and the server's log.
        seed: of the run and of the faults.
        steps: of training.
        fault_share: of the server's requests.
        extra: further arguments of `fit`.
        threads: environment variables that limit its threads.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    out.mkdir(parents=True)
    run, started = out / "run", time.perf_counter()
    with server_process(fault_share=fault_share, seed=seed, log=out / "requests.jsonl") as server:
        options: dict[str, Any] = {
            "run_dir": run,
            "seed_everything": seed,
            "trainer.max_steps": steps,
            "trainer.max_time": "null",
            "rollout_log.every_n_steps": 1,
            "model.judge.model": "openai/gpt-4o-mini",
            "model.judge.providers": "null",
            "model.judge.params": json.dumps({"api_base": server.url}),
            "model.judge.timeout_s": 2,
            "model.judge.deadline_s": 30,
            "model.judge.cache": out / "cache.sqlite",
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        command = [sys.executable, "main.py", "fit", "--config", "configs/shapes.yaml", *flags, *extra]
        with (out / "console.txt").open("w") as console:
            environment = {**os.environ, "OPENAI_API_KEY": "dummy", **threads}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT
            )
    if done.returncode:
        tail = (out / "console.txt").read_text()[-3000:]
        raise RuntimeError(f"fit ended with status {done.returncode}:\n{tail}")
    return read(run, server.log(), time.perf_counter() - started)


def read(run: Path, requests: list[dict[str, Any]], seconds: float) -> Run:
    """What a run left in its folder."""
    first, last = validations(run)
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    true_before, true_after = true_scores(run)
    wrong = sum(request["fault"] is not None for request in requests)
    return Run(
        before=first["b_capscore"],
        after=last["b_capscore"],
        true_before=true_before,
        true_after=true_after,
        steps=len(rows),
        missing=missing_share(run),
        judgments_missing=sum(float(row["judge/failed"]) for row in rows),
        misbehaved=wrong / len(requests),
        requests=len(requests),
        seconds=seconds,
    )


def true_scores(run: Path) -> tuple[float, float]:
    """b-CapScore of the captions of the first and of the last validation, by the truth."""
    files = sorted((run / "rollouts").glob("val-*.parquet"))
    steps = sorted({file.name.split("-")[1] for file in files})
    rows = {step: [] for step in (steps[0], steps[-1])}  # type: dict[str, list[dict[str, Any]]]
    for file in files:
        rows.get(file.name.split("-")[1], []).extend(pq.read_table(file).to_pylist())
    first, last = (mean(true_score(row) for row in rows[step]) for step in (steps[0], steps[-1]))
    return first, last


def true_score(row: dict[str, Any]) -> float:
    """b-CapScore of one caption, from the scene in its image's file."""
    scene = scene_of((DATA / row["sample_id"]).read_bytes())
    said, units = read_facts(row["caption"]), read_facts(row["reference"])
    precision = score_precision([Verdict(is_true(fact, scene), is_pointable(fact)) for fact in said])
    recall = score_recall([covered(unit, set(said)) for unit in units])
    language = mean(rate(row["caption"])) if row["caption"].strip() else 0.0
    return float(b_capscore(*torch.tensor([precision, recall, language], dtype=torch.float64)))


def missing_share(run: Path) -> float:
    """Null rewards over all rewards of the rollouts that were trained on."""
    nulls = total = 0
    for file in (run / "rollouts").glob("train-*.parquet"):
        table = pq.read_table(file)
        columns = [table[name] for name in table.column_names if name.startswith("reward/")]
        nulls += sum(column.null_count for column in columns)
        total += sum(len(column) for column in columns)
    return nulls / total


def table_of(seeds: list[int], clean: list[Run], faulty: list[Run]) -> Table:
    """One row per run."""
    table = Table(title="b-CapScore on held-out images, clean and misbehaving judge")
    titles = ("before", "after", "gain", "true gain", "missing", "wrong", "requests", "steps", "s")
    table.add_column("run")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for name, runs in (("clean", clean), ("faulty", faulty)):
        for seed, run in zip(seeds, runs, strict=True):
            scores = (f"{run.before:.3f}", f"{run.after:.3f}", f"{run.gain:+.3f}", f"{run.true_gain:+.3f}")
            shares = (f"{run.missing:.1%}", f"{run.misbehaved:.1%}")
            counts = (str(run.requests), str(run.steps), f"{run.seconds:.0f}")
            table.add_row(f"{name} {seed}", *scores, *shares, *counts)
    return table


def summary(clean: list[Run], faulty: list[Run]) -> dict[str, Any]:
    """The last line; ``noise`` is null for one seed."""
    figures: dict[str, Any] = {}
    for prefix, name in (("", "gain"), ("true_", "true_gain")):
        before, after = ([getattr(run, name) for run in runs] for runs in (clean, faulty))
        figures[f"{prefix}gain_clean"] = [round(gain, 4) for gain in before]
        figures[f"{prefix}gain_faulty"] = [round(gain, 4) for gain in after]
        figures[f"{prefix}gain_difference"] = round(mean(after) - mean(before), 4)
        figures[f"{prefix}noise"] = round(stdev(before), 4) if len(before) > 1 else None
    return figures | {
        "failed_share": round(mean(run.missing for run in faulty), 4),
        "failed_share_clean": round(mean(run.missing for run in clean), 4),
        "judgments_missing": [run.judgments_missing for run in faulty],
        "misbehaved_share": round(mean(run.misbehaved for run in faulty), 4),
        "steps": [run.steps for run in [*clean, *faulty]],
    }


def main() -> None:
    """Train, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description="What a judge that misbehaves costs.")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2 unless --quick")
    parser.add_argument("--steps", type=int, help="of each run; 100 unless --quick")
    parser.add_argument("--fault-share", type=float, default=0.3, help="of the faulty server's requests")
    parser.add_argument("--out", type=Path, help="keeps the runs here; else they are thrown away")
    parser.add_argument("--at-once", type=int, help="trainings side by side; 1 unless --quick")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 6 small steps, both trainings side by side"
    )
    options = parser.parse_args()
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    steps = options.steps or (6 if options.quick else 100)
    extra = QUICK if options.quick else []
    at_once = options.at_once or (2 if options.quick else 1)
    threads = {"OMP_NUM_THREADS": "1"} if at_once > 1 else {}
    if not (DATA / "shapes.json").exists():
        command = [sys.executable, "-m", "examples.shapes.dataset", "--out", str(DATA), "--images", "3000"]
        subprocess.run(command, cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(at_once) as pool:
        out = (options.out or Path(temporary)).absolute()
        started = [
            [pool.submit(train, out / f"{name}-{seed}", seed, steps, share, extra, threads) for seed in seeds]
            for name, share in (("clean", 0.0), ("faulty", options.fault_share))
        ]
        clean, faulty = ([run.result() for run in runs] for runs in started)
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    console.print(table_of(seeds, clean, faulty))
    print(json.dumps(summary(clean, faulty)))


if __name__ == "__main__":
    main()
