"""What judging behind the device is worth: our step with and without a lag, and TRL's, with a judge that is slow.

    python perf/pipeline.py            8 images x 8 captions, two rounds of 10 measured steps of each variant
    python perf/pipeline.py --quick    2 images x 4 captions, one round of 2 steps, a judge of 0.3 s: shows that it
                                       runs, its figures mean nothing

Training on the embedded world with the sizes of ``configs/shapes.yaml``. The judge is reached over HTTP on loopback;
its latency is log-normal, each run has a server of its own with the same draws, and nothing is cached, so that every
judgment is a call. Variants run one after the other, each in a process of its own on all cores, in turns.

lag1   ``model.lag: 1``: an update on the captions of the step before, judged meanwhile
lag0   ``model.lag: 0``: sample, wait for the judge, update
trl    `perf.pipeline_trl`: ``GRPOTrainer`` on the same weights, images, prompts, G, token limit, learning rate, KL
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

import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from perf.report import DATA, arguments, report, run_python
from tests.judge_server import server_process

LAG1, LAG0, TRL = "lag1", "lag0", "trl"
STAGES = ("rollout", "judge", "judge_wait", "update", "sync")
CONFIG, OVERLAY = "configs/shapes.yaml", "perf/pipeline.yaml"


@dataclass(frozen=True)
class Case:
    """What is measured, alike for all variants.

    Attributes:
        images: B.
        captions: G.
        steps: measured in each run.
        warmup: steps before them, at least 1.
        latency, p99: median and 99th percentile of the judge's seconds.
        steps_per_generation: TRL's updates on one generation.
    """

    images: int = 8
    captions: int = 8
    steps: int = 10
    warmup: int = 2
    latency: float = 1.5
    p99: float = 10.0
    steps_per_generation: int = 1

    @property
    def updates(self) -> int:
        """Measured or not."""
        return self.warmup + self.steps


QUICK = Case(images=2, captions=4, steps=2, latency=0.3, p99=2.0)


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
        missing: judgments.
    """

    seconds: float
    rollout: float
    judge: float
    judge_wait: float
    update: float
    sync: float
    missing: int


def ours(case: Case, lag: int, seed: int, out: Path, url: str) -> list[Step]:
    """Measured steps of ``main.py fit``."""
    options = {
        "run_dir": out / "run",
        "seed_everything": seed,
        "trainer.max_steps": case.updates + lag,
        "data.batch_size": case.images,
        "model.num_captions": case.captions,
        "model.lag": lag,
        "model.judge.params": json.dumps({"api_base": url}),
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    run_python(["main.py", "fit", "--config", CONFIG, "--config", OVERLAY, *flags], out)
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
        missing = int(float(rows[i]["judge/failed"]))
        steps.append(Step(seconds=ends[i] - ends[i - 1], **stages, missing=missing))
    return steps


def trl(case: Case, seed: int, out: Path, url: str) -> list[Step]:
    """Measured steps of `perf.pipeline_trl`."""
    options = json.dumps({**asdict(case), "seed": seed, "url": url})
    run_python(["-m", "perf.pipeline_trl", options, str(out)], out)
    return [Step(**step) for step in json.loads((out / "steps.json").read_text())[case.warmup :]]


def run(name: str, case: Case, seed: int, out: Path) -> list[Step]:
    """One run of one variant, against a server of its own."""
    with server_process(latency=case.latency, latency_p99=case.p99, seed=seed) as server:
        if name == TRL:
            return trl(case, seed, out, server.url)
        return ours(case, 1 if name == LAG1 else 0, seed, out, server.url)


def summary(results: dict[str, list[Step]]) -> dict[str, Any]:
    """Ratios and seconds of the variants."""
    means = {
        name: {key: mean(getattr(step, key) for step in steps) for key in ("seconds", *STAGES)}
        for name, steps in results.items()
    }
    medians = {name: median(step.seconds for step in steps) for name, steps in results.items()}
    first = means[LAG1]
    device = first["rollout"] + first["update"] + first["sync"]
    return {
        "step_over_slowest": first["seconds"] / max(device, first["judge"]),
        "step_by_arithmetic_s": max(device, (first["judge"] + device) / 2),
        **{f"step_ratio_{name}": means[name]["seconds"] / first["seconds"] for name in (LAG0, TRL)},
        **{f"step_ratio_{name}_median": medians[name] / medians[LAG1] for name in (LAG0, TRL)},
        "means": means,
        "median_step_s": medians,
        "missing": {name: sum(step.missing for step in steps) for name, steps in results.items()},
    }


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--trl-steps-per-generation",
        type=int,
        choices=[1, 2],
        default=1,
        help="TRL's updates on a generation",
    )
    options = parser.parse_args()
    case = replace(QUICK if options.quick else Case(), steps_per_generation=options.trl_steps_per_generation)
    if not (DATA / "shapes.json").exists():
        run_python(["-m", "examples.shapes.dataset", "--out", str(DATA)], DATA)
    results: dict[str, list[Step]] = {name: [] for name in (LAG1, LAG0, TRL)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 if options.quick else 2):
            for name, steps in results.items():
                steps += run(name, case, seed, Path(folder) / f"{name}-{seed}")
    figures = summary(results)
    title = f"{case.images} images x {case.captions} captions, a judge of {case.latency:g} s; mean seconds"
    rows = [
        (name, *figures["means"][name].values(), figures["median_step_s"][name], figures["missing"][name])
        for name in results
    ]
    columns = ("variant", "step", *STAGES, "median step", "missing")
    report(title, columns, rows, figures | {"case": asdict(case)})


if __name__ == "__main__":
    main()
