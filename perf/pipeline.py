"""What judging behind the device is worth: our step with and without a lag, and TRL's, with a judge that is slow.

    python perf/pipeline.py            8 images x 8 captions, two rounds of 10 measured steps of each variant
    python perf/pipeline.py --quick    2 images x 4 captions, 3 steps, a judge of 0.3 s, all variants side by side with
                                       a thread each: shows that it runs, its figures mean nothing

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

import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from perf.report import arguments, device_name, fit, judge_options, report, run_python, versions, write_world
from tests.judge_server import server_process

LAG1, LAG0, TRL = "lag1", "lag0", "trl"
STAGES = ("rollout", "judge", "judge_wait", "update", "sync")
QUICK = {"images": 2, "captions": 4, "steps": 3, "warmup": 1, "latency": 0.3, "p99": 2.0, "at_once": 3}


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

    @property
    def threads(self) -> int | None:
        """Of each run; None for all cores."""
        return 1 if self.at_once > 1 else None


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


def ours(case: Case, lag: int, seed: int, out: Path, url: str) -> list[Step]:
    """Measured steps of ``main.py fit``."""
    options = {
        "seed_everything": seed,
        "trainer.max_steps": case.updates + lag,
        "trainer.precision": case.precision,
        "data.batch_size": case.images,
        "data.val_size": 0,
        "model.num_captions": case.captions,
        "model.lag": lag,
        "model.judge.cache": "null",
        "model.judge.concurrency": case.concurrency,
        "model.judge.timeout_s": case.timeout_s,
        "checkpoint.every_n_train_steps": 10**6,
        "rollout_log.every_n_steps": 10**6,
        "rollout_log.max_images": 0,
        "export.enabled": "false",
    }
    rows = fit(options | judge_options(url), out, case.threads)
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
    options = json.dumps({**asdict(case), "seed": seed, "url": url})
    run_python(["-m", "perf.pipeline_trl", options, str(out)], out, case.threads)
    steps = [Step(**step) for step in json.loads((out / "steps.json").read_text())]
    return steps[case.warmup :]


def run(name: str, case: Case, seed: int, out: Path) -> list[Step]:
    """One run of one variant, against a server of its own."""
    with server_process(latency=case.latency, latency_p99=case.p99, seed=seed) as server:
        if name == TRL:
            return trl(case, seed, out, server.url)
        return ours(case, 1 if name == LAG1 else 0, seed, out, server.url)


def summary(results: dict[str, list[Step]]) -> dict[str, Any]:
    """Ratios and seconds; a ratio to a variant without steps is None."""
    there = {name: steps for name, steps in results.items() if steps}
    means = {
        name: {"step" if key == "seconds" else key: mean(getattr(step, key) for step in steps)
               for key in ("seconds", *STAGES)}
        for name, steps in there.items()
    }  # fmt: skip
    medians = {name: median(step.seconds for step in steps) for name, steps in there.items()}
    first = means[LAG1]
    device = first["rollout"] + first["update"] + first["sync"]

    def ratio(name: str, of: dict[str, float]) -> float | None:
        return round(of[name] / of[LAG1], 3) if name in there else None

    steps = {name: each["step"] for name, each in means.items()}
    return {
        "step_over_slowest": round(first["step"] / max(device, first["judge"]), 3),
        "step_ratio_lag0": ratio(LAG0, steps),
        "step_ratio_trl": ratio(TRL, steps),
        "step_ratio_lag0_median": ratio(LAG0, medians),
        "step_ratio_trl_median": ratio(TRL, medians),
        "step_by_arithmetic_s": round(max(device, (first["judge"] + device) / 2), 3),
        "mean_s": {name: {key: round(s, 3) for key, s in each.items()} for name, each in means.items()},
        "median_step_s": {name: round(s, 3) for name, s in medians.items()},
        "caption_tokens": {name: round(mean(s.tokens for s in each), 2) for name, each in there.items()},
        "missing": {name: sum(s.missing for s in each) for name, each in there.items()},
        "steps": {name: len(each) for name, each in there.items()},
    }


def table_rows(results: dict[str, list[Step]], figures: dict[str, Any]) -> list[list[Any]]:
    """One row per variant: mean seconds of the step and its stages, the median, tokens, missing, steps."""
    keys = ("median_step_s", "caption_tokens", "missing", "steps")
    return [
        [name, *figures["mean_s"][name].values(), *(figures[key][name] for key in keys)]
        if results[name] else [name, "not installed"]
        for name in results
    ]  # fmt: skip


def parsed() -> tuple[Case, int]:
    """What the command line asks for: the case, and how often each variant is run."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, help="runs of each variant; 2 unless --quick")
    parser.add_argument(
        "--trl-steps-per-generation", type=int, default=1, help="TRL's updates on a generation"
    )
    options = parser.parse_args()
    per = options.trl_steps_per_generation
    case = Case(**(QUICK if options.quick else {}), steps_per_generation=per)
    if per < 1 or case.steps % per or case.warmup % per:
        parser.error(
            f"--trl-steps-per-generation must divide {case.warmup} and {case.steps}, the numbers of steps"
        )
    return case, options.rounds or (1 if options.quick else 2)


def main() -> None:
    """Measure, print a table and one line of JSON."""
    case, rounds = parsed()
    write_world()
    found = versions("torch", "transformers", "lightning", "trl")
    results: dict[str, list[Step]] = {LAG1: [], LAG0: [], TRL: []}
    there = [name for name in results if found.get(name) != "not installed"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(case.at_once) as pool:
        for seed in range(rounds):
            turn = {
                name: pool.submit(run, name, case, seed, Path(folder) / f"{name}-{seed}") for name in there
            }
            for name, running in turn.items():
                results[name] += running.result()
    figures = summary(results)
    title = (
        f"{case.images} images x {case.captions} captions, a judge of {case.latency:g} s (99 %: {case.p99:g} s), "
        f"{case.precision}; mean seconds"
    )
    columns = (
        "variant",
        "step",
        "rollout",
        "judge",
        "wait",
        "update",
        "sync",
        "median",
        "tokens",
        "missing",
        "n",
    )
    extra = {"case": asdict(case), "device": device_name(), "versions": found}
    report(title, columns, table_rows(results, figures), figures | extra)


if __name__ == "__main__":
    main()
