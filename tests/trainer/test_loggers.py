"""metrics.csv of a run that was killed and continued."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from balcap.trainer.loggers import RunCSVLogger
from tests.support import metrics


def _write(run: Path, keep: float | None, rows: list[tuple[int, dict[str, float]]]) -> None:
    logger = RunCSVLogger(str(run), keep=keep)
    for step, values in rows:
        logger.log_metrics(values, step=step)
    logger.save()


def test_a_continued_run_replaces_the_steps_that_run_again(tmp_path: Path) -> None:
    first = [
        (0, {"val/b_capscore": 0.1}),
        (1, {"train/loss": 1.0}),
        (2, {"train/loss": 2.0}),
        (2, {"val/b_capscore": 0.3}),
        (3, {"train/loss": 3.0}),
        (3, {"val/b_capscore": 0.4}),
    ]
    _write(tmp_path, None, first)
    _write(tmp_path, 2, [(3, {"train/loss": 20.0, "train/kl": 0.5}), (4, {"train/loss": 30.0})])
    rows = metrics(tmp_path)
    assert [(r["step"], r["train/loss"], r["val/b_capscore"]) for r in rows] == [
        ("0", "", "0.1"),
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("2", "", "0.3"),
        ("3", "20.0", ""),
        ("4", "30.0", ""),
    ]
    assert rows[4]["train/kl"] == "0.5"


def test_a_new_run_starts_anew_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    _write(tmp_path, None, [(0, {"train/loss": 1.0})])
    _write(tmp_path, None, [(0, {"train/loss": 5.0})])
    assert [r["train/loss"] for r in metrics(tmp_path)] == ["5.0"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_resume_that_logs_nothing_loses_nothing(tmp_path: Path) -> None:
    _write(tmp_path, None, [(0, {"train/loss": 1.0})])
    _write(tmp_path, 1, [])
    assert len(metrics(tmp_path)) == 1


@pytest.mark.parametrize(
    "torn", ["2,", "2,,0.", "2,,0.3,extra\n", "\0\0\0\0", "\0,\0\n", ",,\n", "2.5,,1\n", "caf\udce9"]
)
@pytest.mark.parametrize("keep", [1, math.inf])
def test_a_row_that_was_cut_short_is_left_out(tmp_path: Path, torn: str, keep: float) -> None:
    path = tmp_path / "metrics.csv"
    text = "step,train/loss,val/b_capscore\n0,,0.1\n1,1.0,\n"
    path.write_text(text + torn, errors="surrogateescape")
    logger = RunCSVLogger(str(tmp_path), keep=keep)
    logger.log_metrics({"train/kl": 0.5, "train/loss": 3.0}, step=2)
    logger.save()
    rows = [(r["step"], r["train/loss"], r["val/b_capscore"], r["train/kl"]) for r in metrics(tmp_path)]
    assert rows == [("0", "", "0.1", ""), ("1", "1.0", "", ""), ("2", "3.0", "", "0.5")]


@pytest.mark.parametrize("torn", ["", "st", "step,train/lo"])
def test_a_header_that_was_cut_short_begins_anew(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.csv").write_text(torn)
    _write(tmp_path, 0, [(0, {"train/loss": 3.0})])
    assert [(r["step"], r["train/loss"]) for r in metrics(tmp_path)] == [("0", "3.0")]


def test_a_validation_that_is_repeated_replaces_the_one_before(tmp_path: Path) -> None:
    first = [
        (0, {"val/recall": 0.1, "judge/cost_usd": 1.0}),
        (0, {"train/loss": 1.0}),
        (1, {"val/recall": 0.2}),
    ]
    _write(tmp_path, None, first)
    for _ in range(2):  # a finished run that is started again
        _write(tmp_path, 1, [(1, {"val/recall": 0.3, "judge/cost_usd": 1.0})])
    assert [(r["step"], r["val/recall"]) for r in metrics(tmp_path)] == [
        ("0", "0.1"),
        ("0", ""),
        ("1", "0.3"),
    ]


def test_another_command_only_appends(tmp_path: Path) -> None:
    _write(tmp_path, None, [(0, {"val/recall": 0.1}), (4, {"train/loss": 1.0})])
    logger = RunCSVLogger(str(tmp_path), keep=math.inf)
    logger.log_metrics({"val/recall": 0.2}, step=0)
    logger.save()
    assert [r["step"] for r in metrics(tmp_path)] == ["0", "4", "0"]


def test_a_kill_in_a_rewrite_loses_no_row(tmp_path: Path, monkeypatch) -> None:
    _write(tmp_path, None, [(0, {"train/loss": 1.0})])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, 1, [(1, {"train/loss": 1.0, "a new one": 2.0})])
    assert [r["step"] for r in metrics(tmp_path)] == ["0"]


@pytest.mark.parametrize("written", [True, False])
def test_the_row_of_the_checkpoints_step_is_there_whenever_the_kill_came(
    tmp_path: Path, written: bool
) -> None:
    rows = [(1, {"train/loss": 1.0}), (2, {"val/b_capscore": 0.3}), (2, {"train/loss": 2.0})]
    _write(tmp_path, None, rows if written else rows[:2])
    logger = RunCSVLogger(str(tmp_path), 2, {"train/loss": 2.0, "train/kl": 0.5, "step": 2, "epoch": 0})
    logger.log_metrics({"train/loss": 3.0}, step=3)
    logger.save()
    losses = [(row["step"], row["train/loss"]) for row in metrics(tmp_path) if row["train/loss"]]
    assert losses == [("1", "1.0"), ("2", "2.0"), ("3", "3.0")]
