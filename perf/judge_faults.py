"""What a judge that misbehaves costs: training on the embedded world with a clean and with a faulty server.

    python perf/judge_faults.py            seeds 0, 1 and 2, 100 steps each, both servers
    python perf/judge_faults.py --quick    one seed, 6 steps of 2 images, 20 held-out images: shows that it runs

The judge is reached over HTTP as gpt-4o-mini would be, through litellm. The clean server answers every request
from the truth; the faulty one goes wrong on 30 % of them, in every way of `tests.judge_server.PASSING`: rate
limits, server errors, silence, broken connections, wrong answers, refusals. What does not come right within
the judge's retries is missing (NaN). The gain is b-CapScore on held-out images after minus before training, the
captions rated by the truth, none missing. The noise is the standard deviation of the gain over the seeds of the
clean runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pyarrow.parquet as pq
import torch

from balcap.judge import Verdict
from balcap.rewards import b_capscore
from balcap.rewards.precision import score_precision
from balcap.rewards.recall import score_recall
from examples.shapes.fluency import rate
from examples.shapes.language import covered, is_pointable, is_true, read_facts
from examples.shapes.scene import scene_of
from examples.shapes.summary import validation_captions
from perf.report import DATA, arguments, fit, judge_options, report, write_world
from tests.judge_server import server_process

FAULT_SHARE = 0.3  # of the faulty server's requests
QUICK = {"trainer.max_steps": 6, "data.batch_size": 2, "data.val_size": 20, "data.val_batch_size": 20}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        gain: true b-CapScore of the last validation minus that of the first.
        missing: share of rewards that are missing, over all rollouts of the training steps.
        misbehaved: share of the server's requests that something was wrong with.
        requests: of the whole run.
        steps: training steps that are in ``metrics.csv``.
    """

    gain: float
    missing: float
    misbehaved: float
    requests: int
    steps: int


def train(out: Path, seed: int, share: float, options: dict[str, Any]) -> Run:
    """A run in a process of its own, against a server of its own that goes wrong on a `share` of its requests."""
    out.mkdir(parents=True)
    with server_process(fault_share=share, seed=seed, log=out / "requests.jsonl") as server:
        options = options | judge_options(server.url)
        options |= {
            "seed_everything": seed,
            "rollout_log.every_n_steps": 1,
            "model.judge.timeout_s": 2,
            "model.judge.deadline_s": 30,
            "model.judge.cache": out / "cache.sqlite",
        }
        rows = fit(options, out)
    requests = server.log()
    before, after = (mean(map(true_score, logged)) for logged in validation_captions(out / "run"))
    return Run(
        gain=after - before,
        missing=missing_share(out / "run"),
        misbehaved=mean(request["fault"] is not None for request in requests),
        requests=len(requests),
        steps=len(rows),
    )


def true_score(row: dict[str, Any]) -> float:
    """b-CapScore of one caption, from the scene in its image's file."""
    scene = scene_of((DATA / row["sample_id"]).read_bytes())
    stated, units = read_facts(row["caption"]), read_facts(row["reference"])
    precision = score_precision([Verdict(is_true(fact, scene), is_pointable(fact)) for fact in stated])
    recall = score_recall([covered(unit, set(stated)) for unit in units])
    language = mean(rate(row["caption"])) if row["caption"].strip() else 0.0
    return float(b_capscore(*torch.tensor([precision, recall, language], dtype=torch.float64)))


def missing_share(run: Path) -> float:
    """Null rewards over all rewards of the rollouts that were trained on."""
    tables = [pq.read_table(file) for file in (run / "rollouts").glob("train-*.parquet")]
    columns = [table[name] for table in tables for name in table.column_names if name.startswith("reward/")]
    return sum(column.null_count for column in columns) / sum(map(len, columns))


def summary(clean: list[Run], faulty: list[Run]) -> dict[str, Any]:
    """The last line; ``noise`` is null for one seed."""
    gains, others = ([run.gain for run in runs] for runs in (clean, faulty))
    return {
        "gain_clean": gains,
        "gain_faulty": others,
        "gain_difference": mean(others) - mean(gains),
        "noise": stdev(gains) if len(gains) > 1 else None,
        "failed_share": mean(run.missing for run in faulty),
        "misbehaved_share": mean(run.misbehaved for run in faulty),
    }


def main() -> None:
    """Train, print a table and one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of each run, unless --quick")
    parser.add_argument("--at-once", type=int, default=1, help="trainings side by side, with a thread each")
    given = parser.parse_args()
    seeds, options = ([0], QUICK) if given.quick else ([0, 1, 2], {"trainer.max_steps": given.steps})
    if given.at_once > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the trainings
    write_world()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.at_once) as pool:
        started = {
            (name, seed): pool.submit(train, Path(folder) / f"{name}-{seed}", seed, share, options)
            for name, share in (("clean", 0.0), ("faulty", FAULT_SHARE))
            for seed in seeds
        }
        runs = {key: run.result() for key, run in started.items()}
    clean, faulty = ([runs[name, seed] for seed in seeds] for name in ("clean", "faulty"))
    columns = ("run", "gain", "missing", "went wrong", "requests", "steps")
    rows = [(f"{name} {seed}", *astuple(run)) for (name, seed), run in runs.items()]
    title = "b-CapScore on held-out images, clean and misbehaving judge"
    report(title, columns, rows, summary(clean, faulty))


if __name__ == "__main__":
    main()
