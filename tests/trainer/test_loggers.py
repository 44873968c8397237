"""metrics.csv of a run that was killed and continued."""

from __future__ import annotations

from pathlib import Path

from balcap.trainer.loggers import RunCSVLogger
from tests.support import metrics


def _write(run: Path, keep: bool, rows: list[tuple[int, dict[str, float]]]) -> None:
    logger = RunCSVLogger(str(run), keep=keep)
    for step, values in rows:
        logger.log_metrics(values, step=step)
    logger.save()


def test_a_continued_run_replaces_the_steps_that_run_again(tmp_path: Path) -> None:
    first = [
        (0, {"val/b_capscore": 0.1}),
        (0, {"train/loss": 1.0}),
        (1, {"train/loss": 2.0}),
        (2, {"train/loss": 3.0}),
    ]
    _write(tmp_path, False, first)
    _write(tmp_path, True, [(1, {"train/loss": 20.0, "train/kl": 0.5}), (2, {"train/loss": 30.0})])
    rows = metrics(tmp_path)
    assert [(r["step"], r["train/loss"]) for r in rows] == [
        ("0", ""),
        ("0", "1.0"),
        ("1", "20.0"),
        ("2", "30.0"),
    ]
    assert rows[0]["val/b_capscore"] == "0.1"
    assert rows[2]["train/kl"] == "0.5"


def test_a_validation_at_the_checkpointed_step_is_kept(tmp_path: Path) -> None:
    _write(
        tmp_path, False, [(1, {"train/loss": 1.0}), (2, {"val/b_capscore": 0.4}), (2, {"train/loss": 2.0})]
    )
    _write(tmp_path, True, [(2, {"train/loss": 9.0})])
    assert [(r["step"], r["train/loss"], r["val/b_capscore"]) for r in metrics(tmp_path)] == [
        ("1", "1.0", ""),
        ("2", "", "0.4"),
        ("2", "9.0", ""),
    ]


def test_a_new_run_starts_anew_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    _write(tmp_path, False, [(0, {"train/loss": 1.0})])
    _write(tmp_path, False, [(0, {"train/loss": 5.0})])
    assert [r["train/loss"] for r in metrics(tmp_path)] == ["5.0"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_resume_that_logs_nothing_loses_nothing(tmp_path: Path) -> None:
    _write(tmp_path, False, [(0, {"train/loss": 1.0})])
    _write(tmp_path, True, [])
    assert len(metrics(tmp_path)) == 1
