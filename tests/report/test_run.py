"""A run read from its folder: results, costs, and what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from balcap.report.calls import Calls
from balcap.report.run import Run, labelled, leaves
from balcap.utils.errors import UserError
from tests.report_runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run.read(write_run(tmp_path_factory.mktemp("runs") / "a", failed=0.2))


def test_outcomes_are_paired_over_images(run: Run) -> None:
    outcomes = {outcome.name: outcome for outcome in run.outcomes}
    assert list(outcomes) == ["b_capscore", "precision", "recall", "linguistic", "length_ratio"]
    before, after = (captions for captions in run.rollouts.ends if captions is not None)
    one, other = before.scores("recall"), after.scores("recall")
    change = outcomes["recall"].change
    assert change.n == len(set(one) & set(other)) == 16
    assert change.value == pytest.approx(sum(other[i] - one[i] for i in one) / 16)
    assert change.low < change.value < change.high
    # a fifth of the verifications failed: those images have no precision, and none counts as 0
    assert 0 < outcomes["precision"].after.n < 16
    assert outcomes["precision"].after.value > 0.5


def test_what_the_folder_says(run: Run) -> None:
    assert run.setting("model.judge.model") == "openai/gpt-6-luna"  # through init_args
    assert run.setting("model.policy.lora.r") == 64
    assert run.setting("model.nothing.there", "none") == "none"
    assert (run.steps, run.bounds) == (30, (0.5, 2.0))
    assert run.changed == {"model": {"kl_coef": 0.01}}
    assert run.usd == pytest.approx(30 * 0.002)
    assert run.hours > 0
    assert run.reward_names == ("precision", "recall", "linguistic")


def test_calls_of_a_ledger(run: Run) -> None:
    calls = run.calls
    assert calls is not None
    assert (calls.calls, calls.failed) == (30, 6)
    assert {task.task for task in calls.tasks} == {"decompose", "verify", "match", "rate"}
    assert sum(failure.calls for failure in calls.failures) == 6
    assert calls.failures[0].words == "openai/gpt-6-luna: 429 slow down, <b>please</b>"


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "judge_ledger.sqlite").write_bytes(b"x" * 5000)
    assert Calls.read(tmp_path / "judge_ledger.sqlite") is None
    assert Calls.read(tmp_path / "nothing.sqlite") is None


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run in it .*--run_dir"):
        Run.read(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=4)
    (folder / "metrics.csv").write_text("step,train/kl\n1,many\n")
    (folder / "benchmarks.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    broken = folder / "rollouts/train-00000001-rank0-000000.parquet"
    broken.write_bytes(broken.read_bytes()[:500])
    run = Run.read(folder)
    assert [problem.split()[0] for problem in run.problems] == [
        "metrics.csv",
        "benchmarks.json",
        "config.yaml",
    ]
    assert [line.split(":")[0] for line in run.rollouts.unreadable] == [broken.name]
    assert run.rollouts.train is not None
    assert len(run.rollouts.train) == 3 * 8


def test_bounds_of_the_mask(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=2)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    mask = {"class_path": "balcap.algorithms.LengthMask", "init_args": {"tau_low": 0.7, "tau_high": 1.3}}
    config["model"]["reward_transforms"] = [mask]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert Run.read(folder).bounds == (0.7, 1.3)


def test_one_validation_has_no_change(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=2)
    (folder / "rollouts/val-00000000-rank0-000000.parquet").unlink()
    run = Run.read(folder)
    assert run.outcomes == []
    assert run.headline is None


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run", steps=1) for parent in ("a", "b")]
    assert [run.name for run in labelled([Run.read(folder) for folder in folders])] == ["a/run", "b/run"]
    assert [run.name for run in labelled([Run.read(folders[0])])] == ["run"]


def test_leaves() -> None:
    nested = {"a": {"class_path": "x.Y", "init_args": {"b": 1}}, "c": [1, 2], "d": {}}
    assert dict(leaves(nested)) == {"a.class_path": "x.Y", "a.b": 1, "c": [1, 2], "d": {}}
