"""Judging behind the device: what is sampled, judged and learned from when, and that nothing is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from balcap.trainer.metrics import utilisation
from balcap.trainer.pipeline import restored, saved
from balcap.trainer.timeline import Span, Timeline, innermost, merged
from callbacks.trace import MOST_EVENTS, StepProfile
from tests.support import metrics
from tests.tiny_models import mixed_batch, rollouts_of

STEPS = 4
KERNELS = [(-3.0, -0.5), (1.0, 1.8), (1.5, 2.0)]


def rows_of(run: Path) -> list[dict[str, str]]:
    return [row for row in metrics(run) if row.get("train/loss")]


@pytest.fixture
def fit(fit_arguments, cli, tmp_path: Path):
    """`fit(name, **options)` -> run folder, with one validation image."""

    def fit(name: str, **options: object) -> Path:
        defaults = {"trainer.max_steps": STEPS, "data.val_size": 2, "model.judge.cache": "null"}
        cli(fit_arguments(**{**defaults, **options}, run_dir=tmp_path / name))
        return tmp_path / name

    return fit


def test_with_a_lag_captions_are_one_update_old_and_corrected(fit) -> None:
    now, late = fit("now"), fit("late", **{"model.lag": 1, "trainer.precision": "32-true"})
    rows = rows_of(late)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [float(row["train/staleness"]) for row in rows] == [0, 1, 1, 1]
    validated = [[row["step"] for row in metrics(run) if row.get("val/b_capscore")] for run in (now, late)]
    assert validated == [["0", str(STEPS)]] * 2
    assert float(rows[0]["train/mismatch_max"]) < 1e-3  # the first captions are the policy's own
    assert all(float(row["train/mismatch_max"]) > 1e-3 for row in rows[1:])
    assert all(0 <= float(row["train/importance_capped"]) < 0.2 for row in rows)
    assert [float(row["train/staleness"]) for row in rows_of(now)] == [0] * STEPS
    assert "train/importance_capped" not in rows_of(now)[0]


def test_the_order_of_the_data_is_the_same_and_the_last_step_samples_nothing(fit) -> None:
    def seen(run: Path) -> list[list[str]]:
        files = sorted((run / "rollouts").glob("train-*"))
        return [sorted(set(pq.read_table(file)["sample_id"].to_pylist())) for file in files]

    options = {"rollout_log.every_n_steps": 1}
    now, late = fit("now", **options), fit("late", **{"model.lag": 1}, **options)
    assert len(seen(now)) == STEPS
    assert seen(late) == seen(now)
    calls = [sum(float(row["judge/calls"]) for row in rows_of(run)) for run in (now, late)]
    assert calls[1] < 1.2 * calls[0]  # other captions, as many of them


def test_the_end_of_the_last_epoch_leaves_nothing_unlearned(fit) -> None:
    options = {"trainer.max_epochs": 2, "trainer.limit_train_batches": 3, "trainer.max_steps": -1}
    late = fit("late", **options, **{"model.lag": 1, "rollout_log.every_n_steps": 1})
    rows = rows_of(late)
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    assert [float(row["train/staleness"]) for row in rows] == [0, 1, 1, 1, 1, 1]
    assert len({row["train/loss"] for row in rows}) == 6
    records = [pq.read_table(file) for file in sorted((late / "rollouts").glob("train-*"))]
    assert len(records) == 6
    assert sorted(table["batch"][0].as_py() for table in records) == [0, 1, 2, 3, 4, 5]


def test_a_trace_shows_judging_behind_the_device(fit) -> None:
    run = fit("late", **{"model.lag": 1, "trace.steps": 3, "trainer.max_steps": 3})
    events = json.loads((run / "trace.json").read_text())
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    assert set(names) == {"trainer", "judge", "device"}
    stages = [e["name"] for e in spans if e["tid"] == names["trainer"]]
    assert stages == [
        "rollout",
        "rollout",
        *["judge_wait", "update", "sync"],
        "rollout",
        *["judge_wait", "update", "sync"],
    ]
    judged = [e for e in spans if e["name"] == "judge"]
    assert len(judged) == 2
    assert all(e["tid"] == names["judge"] for e in judged)
    # The first batch's judgment was asked for before the second batch was sampled.
    second = [e for e in spans if e["name"] == "rollout"][1]
    assert judged[0]["ts"] < second["ts"]
    assert not any(e["tid"] == names["device"] for e in spans)  # this is a CPU
    counted = [float(row["time/operators"]) for row in rows_of(run)]
    # Two updates of the same policy on other captions: no count depends on their length but that of their pads.
    assert counted[0] == pytest.approx(counted[1], rel=0.1)
    assert counted[0] > 1000
    assert "time/device_busy" not in rows_of(run)[0]
    plain = fit("plain")
    assert not (plain / "trace.json").exists()
    assert "time/operators" not in rows_of(plain)[0]


def test_metrics_say_where_the_time_goes(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balcap.trainer.metrics.peak_flops", lambda device: 1e15)
    row = rows_of(fit("now", **{"trainer.max_steps": 1}))[0]
    stages = {
        name: float(row[f"time/{name}_s"]) for name in ("rollout", "judge_wait", "update", "sync", "step")
    }
    assert sum(stages.values()) - stages["step"] <= stages["step"]
    busy = stages["rollout"] + stages["update"] + stages["sync"]
    assert float(row["time/idle_share"]) == pytest.approx(1 - busy / stages["step"], abs=0.02)
    assert float(row["time/judge_s"]) >= 0
    assert float(row["time/rollout_tokens_per_s"]) > 0
    assert float(row["time/peak_memory_gb"]) > 0.1
    assert float(row["time/sync_gb"]) == 0  # sampled on the policy itself
    assert float(row["train/tflops"]) > 0
    update = 1e12 * float(row["train/tflops"]) / 1e15 / stages["update"]
    assert float(row["time/mfu"]) == pytest.approx(update, rel=0.01)
    assert 0 < float(row["time/mfu_rollout"]) < 1


def test_a_sync_is_as_large_as_what_is_trained(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balcap.rollout.HFGenerate.on_policy", False)
    run = fit("now", **{"trainer.max_steps": 1})
    trained = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"].values()
    expected = sum(weight.nbytes for weight in trained) / 1e9
    assert float(rows_of(run)[0]["time/sync_gb"]) == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-3


def test_utilisation_by_hand() -> None:
    pipeline: Any = SimpleNamespace(timeline=Timeline())
    pipeline.timeline.add("rollout", "trainer", 1.0, 3.0)
    pipeline.timeline.add("update", "trainer", 3.0, 7.0)
    pipeline.sampled = SimpleNamespace(rollouts="captions", prompts="prompts")
    known = {("captions", "prompts"): 6e12}
    pipeline.policy = SimpleNamespace(rollout_flops=lambda *what: known.get(what))
    # 20e12 in 4 s and 6e12 in 2 s, of 10e12 a second
    assert utilisation(pipeline, 20.0, 1e13) == {"time/mfu": 0.5, "time/mfu_rollout": 0.3}
    assert utilisation(pipeline, 20.0, None) == {}
    known.clear()
    assert utilisation(pipeline, None, 1e13) == {}
    pipeline.sampled = None  # the last step of a run with a lag, or captions of vLLM servers
    assert utilisation(pipeline, 20.0, 1e13) == {"time/mfu": 0.5}


def test_a_timeline_by_hand() -> None:
    timeline = Timeline()
    timeline.begin()
    with timeline.span("update"):
        pass
    timeline.add("judge", "judge", 5.0, 8.0)
    timeline.add("judge", "judge", 8.0, 9.0)
    assert timeline.seconds()["judge"] == 4.0
    assert timeline.spans[0].track == "trainer"
    assert 0 <= timeline.idle_share() <= 1
    timeline.begin()
    assert timeline.spans == []
    assert Span("a", "trainer", 1.0, 3.5).seconds == 2.5


def test_intervals_by_hand() -> None:
    # 0-2 and 1-3 overlap; 3.5 follows after 0.5; 9-10 stands alone
    intervals = [(9.0, 10.0), (1.0, 3.0), (0.0, 2.0), (3.5, 4.0)]
    assert merged(intervals) == [(0.0, 3.0), (3.5, 4.0), (9.0, 10.0)]
    assert merged(intervals, gap=0.5) == [(0.0, 4.0), (9.0, 10.0)]
    assert merged([]) == []
    # a matmul (0-10) calls mm (1-5) and add (5-9), which calls fill (6-7); an add of its own (10-11)
    calls = [(0.0, 10.0), (1.0, 5.0), (5.0, 9.0), (6.0, 7.0), (10.0, 11.0)]
    assert innermost(calls) == 3  # mm, fill, add
    assert innermost([]) == 0


def test_what_a_profile_says_of_a_step() -> None:
    profile = StepProfile()
    x = torch.ones(4, 4)
    for start in range(3):  # of which the second is in the update
        began = time.perf_counter()
        x.exp().neg()
        time.sleep(0.001)  # the profiler's clock is met to some microseconds
        if start == 1:
            update = Span("update", "trainer", began - 0.0005, time.perf_counter() - 0.0005)
    profile.stop()
    step = Span("step", "trainer", update.start - 1.0, update.start + 3.0)
    assert profile.metrics(step, [update]) == {"time/operators": 2.0}  # exp, neg
    assert profile.device_spans() == []
    # of 4 s: 0.5 s of a kernel that began before the step, and 1 s of two that overlap
    profile.kernels = [(start + update.start, end + update.start) for start, end in KERNELS]
    assert profile.metrics(step, [update])["time/device_busy"] == pytest.approx(1.5 / 4)
    assert [round(span.seconds, 3) for span in profile.device_spans()] == [2.5, 1.0]


def test_events_of_the_device_are_bounded() -> None:
    profile = StepProfile()
    profile.stop()
    profile.kernels = [
        (1e-3 * i, 1e-3 * i + 1e-5) for i in range(30_000)
    ]  # further apart than what is merged
    spans = profile.device_spans()
    assert len(spans) <= MOST_EVENTS
    assert spans[0].start == 0.0
    assert spans[-1].end == profile.kernels[-1][1]


def test_captions_in_flight_travel_in_a_checkpoint_and_meet_their_images_again() -> None:
    rollouts = rollouts_of(mixed_batch(), [[3, 1], [2, 2], [4, 1]], range(20, 300))
    state = saved(rollouts)
    again = restored(state, rollouts.batch)
    assert again is not None
    assert again.captions == [list(group) for group in rollouts.captions]
    assert again.token_ids.equal(rollouts.token_ids)
    assert again.weights_version == rollouts.weights_version
    assert restored(state, rollouts.batch.select([1, 0, 2])) is None
