"""What limits a run on many GPUs: rollouts, the judge's latency and rate limits, the update, the sync; simulated.

    python perf/scaling.py            8, 64 and 512 GPUs, 100,000 images x 8 captions, with and without rate limits; and
                                      one rank against a run that was measured
    python perf/scaling.py --quick    8 GPUs, few steps

A discrete-event simulation (simpy) of what a step does, with parts that were measured on one GPU. Each rank samples
captions, which end one by one; the calls about an image start when its last caption has ended: ratings and assertions
at once, then verdicts and coverage. Each rank has so many calls under way at once; all ranks share the account's limits.
An update waits for the judgments of its batch and, since gradients are averaged, ends on all ranks together. With a lag
the next batch is sampled before that.

What it leaves out: failures and retries, the cache (each image is seen once), networks slower than their GPUs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import simpy

from perf.report import arguments, report

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Job:
    """A run. Seconds, tokens and calls are of one rank unless they say otherwise.

    Attributes:
        gpus: ranks.
        images: of a step.
        captions: of an image, G.
        lag: as ``model.lag``.
        tokens: of the shortest and the longest caption; lengths lie evenly between.
        token_s: of one decoding step, for all captions of the rank.
        update_image_s: forward and backward of one image with its captions.
        step_s: optimizer, gradients' average and sync of the weights to the engine.
        rate, decompose, verify, match: calls about an image; a call of `decompose` precedes the last two.
        call_tokens: mean tokens of a call, in and out.
        latency, latency_p99: median and 99th percentile of a call's seconds, log-normal.
        timeout: seconds until a call is given up and made again, ``model.judge.timeout_s``.
        concurrency: calls of a rank under way at once, as with ``model.judge.concurrency: null``.
        rpm, tpm: calls and tokens a minute that the account of all ranks may make.
    """

    gpus: int = 8
    images: int = 8
    captions: int = 8
    lag: int = 1
    tokens: tuple[int, int] = (200, 300)
    token_s: float = 0.074
    update_image_s: float = 0.207
    step_s: float = 0.11
    rate: int = 8
    decompose: int = 3
    verify: int = 1
    match: int = 1
    call_tokens: float = 2_500
    latency: float = 1.5
    latency_p99: float = 10.0
    timeout: float = 60.0
    concurrency: int = 64
    rpm: float = math.inf
    tpm: float = math.inf

    @property
    def calls(self) -> int:
        """About an image."""
        return self.rate + self.decompose + self.verify + self.match

    @property
    def device_s(self) -> float:
        """Of a step: sampling until the longest caption has ended, updating, and the rest."""
        return self.tokens[1] * self.token_s + self.images * self.update_image_s + self.step_s


@dataclass(frozen=True)
class Steps:
    """What was simulated, means over steps in seconds, after the pipeline has filled.

    Attributes:
        seconds: a step.
        judge: from a batch's first call to its last answer, of a rank.
        waited: of a step, for the judgments of the rank's own batch.
        together: of a step, for the other ranks.
    """

    seconds: float
    judge: float
    waited: float
    together: float


class Simulation:
    """One job for some steps."""

    def __init__(self, job: Job, steps: int, seed: int) -> None:
        self.job, self.steps = job, steps
        self.env, self.random = simpy.Environment(), np.random.default_rng(seed)
        self.ends: list[float] = []
        self.judged: list[float] = []
        self.waited: list[float] = []
        self.together: list[float] = []
        self._next_call = 0.0
        self._arrived = 0
        self._together = self.env.event()

    def run(self) -> Steps:
        for _ in range(self.job.gpus):
            self.env.process(self._rank())
        self.env.run()
        filled = len(self.ends) // 3
        last = len(self.ends) - 1 - self.job.lag  # the one after samples nothing
        seconds = (self.ends[last] - self.ends[filled]) / (last - filled)
        kept = slice(filled * self.job.gpus, (last + 1) * self.job.gpus)
        means = (mean(each[kept]) for each in (self.judged, self.waited, self.together))
        return Steps(float(seconds), *map(float, means))

    def _rank(self) -> Process:
        slots = simpy.Resource(self.env, self.job.concurrency)
        in_flight: list[simpy.Process] = []
        for step in range(self.steps + self.job.lag):
            if step < self.steps:
                judged = self.env.process(self._judged(slots))
                in_flight.append(judged)
                yield self.env.timeout(self.job.tokens[1] * self.job.token_s)
            if len(in_flight) <= self.job.lag and step < self.steps:
                continue
            began = self.env.now
            yield in_flight.pop(0)
            self.waited.append(self.env.now - began)
            yield self.env.timeout(self.job.images * self.job.update_image_s)
            done = self.env.now
            yield self._all_ranks()
            self.together.append(self.env.now - done)
            yield self.env.timeout(self.job.step_s)

    def _judged(self, slots: simpy.Resource) -> Process:
        """Sampling of a batch, from its first token, and its judgments."""
        job = self.job
        low, high = job.tokens
        lengths = self.random.integers(low, high + 1, (job.images, job.captions)).max(1)
        lengths[lengths.argmax()] = high  # the device decodes until then
        first = self.env.now + lengths.min() * job.token_s
        yield self.env.all_of(
            [self.env.process(self._image(slots, length * job.token_s)) for length in lengths]
        )
        self.judged.append(self.env.now - first)

    def _image(self, slots: simpy.Resource, after: float) -> Process:
        job = self.job
        yield self.env.timeout(after)
        ratings = self._calls(slots, job.rate)
        yield self.env.all_of(self._calls(slots, job.decompose))
        yield self.env.all_of([*ratings, *self._calls(slots, job.verify + job.match)])

    def _calls(self, slots: simpy.Resource, count: int) -> list[simpy.Process]:
        return [self.env.process(self._call(slots)) for _ in range(count)]

    def _call(self, slots: simpy.Resource) -> Process:
        job = self.job
        sigma = math.log(job.latency_p99 / job.latency) / 2.3263  # of the 99th percentile
        with slots.request() as slot:
            yield slot
            seconds = math.inf
            while seconds > job.timeout:
                pause = 60 * max(1 / job.rpm, job.call_tokens / job.tpm)
                self._next_call = max(self.env.now, self._next_call) + pause
                yield self.env.timeout(self._next_call - self.env.now)
                seconds = job.latency * math.exp(sigma * self.random.standard_normal())
                yield self.env.timeout(min(seconds, job.timeout))

    def _all_ranks(self) -> simpy.Event:
        """Happens when every rank has come here."""
        self._arrived += 1
        together = self._together
        if self._arrived == self.job.gpus:
            self._arrived, self._together = 0, self.env.event()
            self.ends.append(self.env.now)
            together.succeed()
        return together


def simulate(job: Job, steps: int = 12, seed: int = 0) -> Steps:
    """Steps of a job."""
    return Simulation(job, steps, seed).run()


# ---- what is reported

IMAGES = 100_000
RPM, TPM = 30_000, 150e6
"""Of gpt-4o-mini in OpenAI's highest tier, second-hand; an account's own are in its console."""

MEASURED = Job(
    gpus=1, tokens=(100, 100), token_s=0.02, update_image_s=0.1, step_s=0.0, concurrency=256, timeout=30.0
)
"""perf/pipeline.py on 2026-11-23: captions come together after 2.0 s, the update of 8 images takes 0.8 s."""
MEASURED_STEPS = {0: 17.6, 1: 9.4}
"""Its mean step by ``model.lag``, in seconds."""

CASES = {
    "measured": Job(),
    "fast": Job(token_s=0.010),
    "fast, 10 s": Job(token_s=0.010, timeout=10.0),
}
"""With the parts as measured; with 10 ms for a decoding step, which CUDA graphs should give; and with calls that are given
up after 10 seconds."""


def case_rows(gpus: int, images: int, steps: int) -> list[list[Any]]:
    """The cases with so many GPUs and images of a rank, without limits of the account and with them."""
    rows = []
    for name, parts in CASES.items():
        job = replace(parts, gpus=gpus, images=images)
        free, limited = simulate(job, steps), simulate(replace(job, rpm=RPM, tpm=TPM), steps)
        updates = math.ceil(IMAGES / (gpus * images))
        hours = [updates * one.seconds / 3600 for one in (free, limited)]
        calls = gpus * images * job.calls / free.seconds * 60
        rows.append(
            [
                f"{gpus} x {images} {name}", updates, job.device_s, free.seconds, free.waited, free.together, hours[0],
                round(calls), round(calls * job.call_tokens / 1e6), limited.seconds, hours[1],
            ]
        )  # fmt: skip
    return rows


def main() -> None:
    """Simulate, print a table and one line of JSON."""
    quick = arguments(__doc__).parse_args().quick
    sizes = [(8, 8)] if quick else [(8, 8), (64, 8), (64, 1), (512, 1)]
    check = {
        lag: simulate(replace(MEASURED, lag=lag), 20 if quick else 200).seconds for lag in MEASURED_STEPS
    }
    rows = [row for size in sizes for row in case_rows(*size, steps=6 if quick else 20)]
    columns = (
        "GPUs x images", "updates", "device", "step", "judge", "ranks", "hours", "calls/min", "M tokens/min", "limited step",
        "limited hours",
    )  # fmt: skip
    limits = f"limited: {RPM:,} calls and {TPM:,.0f} tokens a minute"
    title = f"{IMAGES:,} images x {Job.captions} captions, seconds of a step; {limits}"
    figures = {
        "measured_step_s": MEASURED_STEPS,
        "simulated_step_s": check,
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    report(title, columns, rows, figures)


if __name__ == "__main__":
    main()
