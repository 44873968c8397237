"""What judging behind the device is worth: our step with and without a lag, and TRL's, with a judge that is slow.

    python perf/pipeline.py            8 images x 8 captions, two rounds of 10 measured steps of each variant
    python perf/pipeline.py --quick    2 images x 4 captions, 3 steps, a judge of 0.3 s, all variants side by side with
                                       a thread each: shows that it runs, its figures mean nothing

Training on the embedded world with the sizes of ``configs/shapes.yaml``. The judge is reached over HTTP on loopback;
its latency is log-normal, each run has a server of its own with the same draws, and nothing is cached, so that every
judgment is a call. Variants run one after the other, each in a process of its own on all cores, in turns.

lag 1   ``model.lag: 1``: an update on the captions of the step before, judged meanwhile
lag 0   ``model.lag: 0``: sample, wait for the judge, update
TRL     `perf.pipeline_trl`: ``GRPOTrainer`` on the same weights, images, prompts, G, token limit, learning rate, KL
        and precision, with HF ``generate``, and our judge and rewards as its asynchronous reward function

A step is the wall time between the ends of two successive updates, with all that a trainer does in between; there
is no validation, and no checkpoint or rollout log among the steps that count. The first steps are left out, and with
a lag the last one too, which samples nothing: the pipeline's filling and draining are a step per run, whatever its
length.

``step_over_slowest`` is lag 1's mean step over the slower of its two halves: rollout + update + sync, and
judging, from a batch's first question to its last answer. Two batches are being judged at times, so it may be
below 1. By arithmetic a step takes max(device, (judge + device) / 2), ``step_by_arithmetic_s``, with device for
rollout + update + sync; of means, so that a judge of varying speed makes it somewhat longer.

TRL's update holds what is neither generation nor reward: the reference's log-probs, and encoding the prompts a
second time. ``--trl-steps-per-generation 2`` lets TRL generate for two updates at once and so wait half as often, on
captions up to one update old: its own way to hide a judge.
"""

from __future__ import annotations

# ruff: noqa: E402  the project's root must be on the path first
import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data/shapes"
CONFIG = "configs/shapes.yaml"
sys.path.insert(0, str(ROOT))

import yaml
from rich.console import Console
from rich.table import Table

from tests.judge_server import server_process

LAG1, LAG0, TRL = "lag 1", "lag 0", "TRL"
KEYS = {LAG1: "lag1", LAG0: "lag0", TRL: "trl"}
STAGES = ("rollout", "judge", "judge_wait", "update", "sync")


@dataclass(frozen=True)
class Case:
    """What is measured, alike for all variants.

    Attributes:
        images: B.
        captions: G.
        steps: measured in each run.
        warmup: steps before them, at least 1.
        latency, p99: median and 99th percentile of the judge's seconds.
        precision: Lightning's name for it, ``bf16-mixed`` or ``32-true``.
        concurrency: calls under way at once.
        timeout_s: of a call.
        steps_per_generation: TRL's updates on one generation.
        at_once: runs side by side, with one thread each where there is more than one; else with all cores.
    """

    images: int = 8
    captions: int = 8
    steps: int = 10
    warmup: int = 2
    latency: float = 1.5
    p99: float = 10.0
    precision: str = "bf16-mixed"
    concurrency: int = 256
    timeout_s: float = 30.0
    steps_per_generation: int = 1
    at_once: int = 1

    @property
    def updates(self) -> int:
        """Measured or not."""
        return self.warmup + self.steps


@dataclass(frozen=True)
class Step:
    """One step, in seconds.

    Attributes:
        seconds: from the end of the update before to the end of this one.
        rollout: encoding and sampling.
        judge: from the first question of the batch that is learned from to its last answer.
        judge_wait: in which nothing else is done.
        update: see above for TRL's.
        sync: of the weights to the rollout engine.
        tokens: per caption, end of sequence not counted.
        missing: judgments.
    """

    seconds: float
    rollout: float
    judge: float
    judge_wait: float
    update: float
    sync: float
    tokens: float
    missing: int


def recipe() -> dict[str, Any]:
    """The config of the embedded world."""
    return dict(yaml.safe_load((ROOT / CONFIG).read_text()))


def ours(case: Case, lag: int, seed: int, out: Path, url: str) -> list[Step]:
    """Measured steps of ``main.py fit``."""
    options: dict[str, Any] = {
        "run_dir": out / "run",
        "seed_everything": seed,
        "trainer.max_steps": case.updates + lag,
        "trainer.max_time": "null",
        "trainer.precision": case.precision,
        "data.batch_size": case.images,
        "data.val_size": 0,
        "model.num_captions": case.captions,
        "model.lag": lag,
        "model.judge.model": "openai/gpt-4o-mini",
        "model.judge.providers": "null",
        "model.judge.params": json.dumps({"api_base": url}),
        "model.judge.cache": "null",
        "model.judge.concurrency": case.concurrency,
        "model.judge.timeout_s": case.timeout_s,
        "checkpoint.every_n_train_steps": 10**6,
        "rollout_log.every_n_steps": 10**6,
        "rollout_log.max_images": 0,
        "export.enabled": "false",
        "progress.refresh_rate": 0,
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    call([sys.executable, "main.py", "fit", "--config", CONFIG, *flags], case, out)
    with (out / "run/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/step_s")]
    return measured(rows, update_ends(out / "run/tensorboard"), case)


def update_ends(folder: Path) -> list[float]:
    """When each update's metrics were logged, in seconds of the clock on the wall: TensorBoard writes it down."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.wall_time for event in events.Scalars("time/step_s")]


def measured(rows: Sequence[dict[str, str]], ends: Sequence[float], case: Case) -> list[Step]:
    """The steps that count, from rows of ``metrics.csv`` and the ends of their updates.

    Raises:
        RuntimeError: if the run made fewer updates than it was asked for.
    """
    if not len(rows) == len(ends) >= case.updates:
        raise RuntimeError(
            f"the run logged {len(rows)} steps in metrics.csv and {len(ends)} in TensorBoard instead of {case.updates}"
        )
    steps = []
    for i in range(case.warmup, case.updates):
        stages = {name: float(rows[i][f"time/{name}_s"]) for name in STAGES}
        tokens, missing = float(rows[i]["train/caption_tokens"]), int(float(rows[i]["judge/failed"]))
        steps.append(Step(seconds=ends[i] - ends[i - 1], **stages, tokens=tokens, missing=missing))
    return steps


def trl(case: Case, seed: int, out: Path, url: str) -> list[Step]:
    """Measured steps of `perf.pipeline_trl`."""
    options = {**asdict(case), "seed": seed, "url": url}
    call([sys.executable, "-m", "perf.pipeline_trl", json.dumps(options), str(out)], case, out)
    steps = [Step(**step) for step in json.loads((out / "steps.json").read_text())]
    return steps[case.warmup :]


def call(command: Sequence[str], case: Case, out: Path) -> None:
    """Run it with its console in a file.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    environment = {**os.environ, "OPENAI_API_KEY": "dummy", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    if case.at_once > 1:
        environment["OMP_NUM_THREADS"] = "1"
    with (out / "console.txt").open("w") as console:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = (out / "console.txt").read_text()[-3000:]
        raise RuntimeError(f"{' '.join(command[:3])} ended with status {done.returncode}:\n{tail}")


def run(name: str, case: Case, seed: int, out: Path) -> list[Step]:
    """One run of one variant, against a server of its own."""
    out.mkdir(parents=True)
    with server_process(latency=case.latency, latency_p99=case.p99, seed=seed) as server:
        if name == TRL:
            return trl(case, seed, out, server.url)
        return ours(case, 1 if name == LAG1 else 0, seed, out, server.url)


def averages(steps: Sequence[Step]) -> dict[str, float]:
    """Mean of each field, ``median`` of the step, ``device`` for what keeps it busy."""
    means = {name: mean(getattr(step, name) for step in steps) for name in ("seconds", *STAGES)}
    device = means["rollout"] + means["update"] + means["sync"]
    return means | {"device": device, "median": median(step.seconds for step in steps)}


def summary(results: dict[str, list[Step]]) -> dict[str, Any]:
    """Ratios and seconds; a ratio to a variant without steps is None."""
    of = {name: averages(steps) for name, steps in results.items() if steps}
    first = of[LAG1]

    def ratio(name: str, which: str) -> float | None:
        return round(of[name][which] / first[which], 3) if name in of else None

    keys = ("seconds", "median", *STAGES)
    return {
        "step_over_slowest": round(first["seconds"] / max(first["device"], first["judge"]), 3),
        "step_ratio_lag0": ratio(LAG0, "seconds"),
        "step_ratio_trl": ratio(TRL, "seconds"),
        "step_ratio_lag0_median": ratio(LAG0, "median"),
        "step_ratio_trl_median": ratio(TRL, "median"),
        "step_by_arithmetic_s": round(max(first["device"], (first["judge"] + first["device"]) / 2), 3),
        "mean_s": {
            KEYS[name]: {
                "step" if key == "seconds" else key: round(means[key], 3) for key in keys if key != "median"
            }
            for name, means in of.items()
        },
        "median_step_s": {KEYS[name]: round(means["median"], 3) for name, means in of.items()},
        "caption_tokens": {KEYS[n]: round(mean(s.tokens for s in results[n]), 2) for n in of},
        "missing": {KEYS[n]: sum(s.missing for s in results[n]) for n in of},
        "steps": {KEYS[n]: len(results[n]) for n in of},
    }


def table_of(results: dict[str, list[Step]], case: Case) -> Table:
    """One row per variant."""
    table = Table(
        title=f"{case.images} images x {case.captions} captions, a judge of {case.latency:g} s (99 %: {case.p99:g} s), "
        f"{case.precision}; mean seconds"
    )
    table.add_column("variant", no_wrap=True)
    for title in ("step", "median", "rollout", "judge", "wait", "update", "sync", "tokens", "missing", "n"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, steps in results.items():
        if not steps:
            table.add_row(name, "not installed")
            continue
        means = averages(steps)
        seconds = (f"{means[key]:.2f}" for key in ("seconds", "median", *STAGES))
        tokens, missing = mean(step.tokens for step in steps), sum(step.missing for step in steps)
        table.add_row(name, *seconds, f"{tokens:.1f}", str(missing), str(len(steps)))
    return table


def version(package: str) -> str:
    """Its version, or that it is missing."""
    there = importlib.util.find_spec(package) is not None
    return importlib.metadata.version(package) if there else "not installed"


def parsed() -> tuple[Case, int, Path | None]:
    """What the command line asks for: the case, rounds, and where to keep the runs."""
    parser = argparse.ArgumentParser(description="A step with a slow judge: lag 1, lag 0, and TRL's.")
    parser.add_argument("--quick", action="store_true", help="2 images x 4 captions, 3 steps, a faster judge")
    parser.add_argument("--rounds", type=int, help="runs of each variant; 2 unless --quick")
    parser.add_argument("--steps", type=int, help="measured in each run; 10 unless --quick")
    parser.add_argument("--warmup", type=int, help="steps before them; 2 unless --quick")
    parser.add_argument("--latency", type=float, help="median seconds of the judge; 1.5 unless --quick")
    parser.add_argument("--p99", type=float, help="99th percentile; 10 unless --quick")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument(
        "--trl-steps-per-generation", type=int, default=1, help="TRL's updates on a generation"
    )
    parser.add_argument("--out", type=Path, help="keeps the runs here; else they are thrown away")
    options = parser.parse_args()
    given = {key: getattr(options, key) for key in ("steps", "warmup", "latency", "p99")}
    defaults: dict[str, Any] = {}
    if options.quick:
        defaults = {
            "images": 2,
            "captions": 4,
            "steps": 3,
            "warmup": 1,
            "latency": 0.3,
            "p99": 2.0,
            "at_once": 3,
        }
    chosen = defaults | {key: value for key, value in given.items() if value is not None}
    per = options.trl_steps_per_generation
    case = Case(**chosen, precision=options.precision, steps_per_generation=per)
    if case.warmup < 1 or case.steps < 1:
        parser.error("--warmup and --steps must be at least 1: a step begins where the one before ends")
    if per < 1 or case.steps % per or case.warmup % per:
        parser.error("--steps and --warmup must be multiples of --trl-steps-per-generation")
    return case, options.rounds or (1 if options.quick else 2), options.out


def main() -> None:
    """Measure, print a table and one line of JSON."""
    case, rounds, kept = parsed()
    if not (DATA / "shapes.json").exists():
        command = [sys.executable, "-m", "examples.shapes.dataset", "--out", str(DATA), "--images", "3000"]
        subprocess.run(command, cwd=ROOT, check=True)
    versions = {name: version(name) for name in ("torch", "transformers", "lightning", "trl")}
    results: dict[str, list[Step]] = {LAG1: [], LAG0: [], TRL: []}
    there = [name for name in results if name != TRL or versions["trl"] != "not installed"]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(case.at_once) as pool:
        out = (kept or Path(temporary)).absolute()
        for seed in range(rounds):
            turn = {name: pool.submit(run, name, case, seed, out / f"{KEYS[name]}-{seed}") for name in there}
            for name, running in turn.items():
                steps = running.result()
                results[name] += steps
                print(f"{name}, round {seed}: {mean(s.seconds for s in steps):.2f} s a step", file=sys.stderr)
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    console.print(table_of(results, case))
    device = f"CPU, {os.cpu_count()} cores"
    print(json.dumps(summary(results) | {"case": asdict(case), "device": device, "versions": versions}))


if __name__ == "__main__":
    main()
