"""The picture of a run."""

import csv
import math
from pathlib import Path

import pytest
from callback_fakes import TinyData, TinyModule, make_trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from callbacks.curves import RunCurves, plot_curves, read_metrics, smoothed
from callbacks.validate_ends import ValidateAtEnds

pytestmark = pytest.mark.filterwarnings("ignore")


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_reads_sparse_columns_in_order_of_steps(tmp_path):
    path = write(
        tmp_path / "metrics.csv",
        [
            {"step": 3, "train/kl": 0.3},
            {"step": 0, "val/precision": 0.5},
            {"step": 1, "train/kl": 0.1},
            {"step": 2, "train/kl": "nan"},
        ],
    )
    series = read_metrics(path)
    assert series["train/kl"] == ([1.0, 2.0, 3.0], [0.1, pytest.approx(math.nan, nan_ok=True), 0.3])
    assert series["val/precision"] == ([0.0], [0.5])
    assert len(series) == 2


def test_smoothing_keeps_constants_short_runs_and_the_mean_of_a_window():
    assert smoothed([0.5] * 100) == pytest.approx([0.5] * 100)
    assert smoothed([1.0, 0.0, 1.0]) == [1.0, 0.0, 1.0]
    # 40 values: half a window is 1. In the middle (0 + 3 + 0) / 3 = 1, at the ends the mean of two.
    spike = [0.0] * 40
    spike[20] = spike[0] = 3.0
    assert smoothed(spike)[19:22] == pytest.approx([1.0, 1.0, 1.0])
    assert smoothed(spike)[0] == pytest.approx(1.5)


@pytest.mark.parametrize("steps", [0, 1, 60])
def test_draws_full_and_empty_and_one_step_runs(tmp_path, steps):
    names = ["train/precision", "val/precision", "train/b_capscore", "train/length_ratio", "train/tau_low"]
    names += ["train/tau_high", "train/caption_tokens", "train/kl", "train/entropy", "time/rollout_s"]
    names += ["time/judge_wait_s", "time/update_s", "time/step_s"]
    rows = [{"step": step, **dict.fromkeys(names, 0.5 + step / 100)} for step in range(steps)]
    path = write(tmp_path / "metrics.csv", rows or [{"step": 0}])
    plot_curves(path, tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.size == (1650, 924)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["curves.png"]


@pytest.mark.parametrize("fail_at", [None, 3])
def test_a_run_draws_at_its_end_and_when_it_dies(tmp_path, fail_at, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "callbacks.curves.plot_curves", lambda csv, out: seen.append((read_metrics(csv), out))
    )
    logger = CSVLogger(tmp_path, name="run")
    trainer = make_trainer(tmp_path, [RunCurves(), ValidateAtEnds()], logger=logger)
    if fail_at is None:
        trainer.fit(TinyModule(), TinyData())
    else:
        with pytest.raises(RuntimeError, match="on fire"):
            trainer.fit(TinyModule(fail_at=fail_at), TinyData())
    assert len(seen) == 1
    series, out = seen[0]
    assert out.name == "curves.png"
    assert series["train/precision"][0] == list(range(fail_at or 5))
    # The picture is drawn after the last validation, wherever the callback stands in the list.
    assert series["val/precision"][0] == ([0.0] if fail_at else [0.0, 5.0])


def test_a_picture_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(metrics, out):
        raise OSError("disk full")

    monkeypatch.setattr("callbacks.curves.plot_curves", fail)
    trainer = make_trainer(tmp_path, [RunCurves()], logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="disk full"):
        trainer.fit(TinyModule(), TinyData())


def test_without_the_csv_logger_nothing_is_drawn(tmp_path):
    make_trainer(tmp_path, [RunCurves()]).fit(TinyModule(), TinyData())
    assert list(tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize(
    ("values", "label"), [([math.nan] * 4, "100% missing"), ([0.5, *[math.nan] * 3], "75% missing")]
)
def test_what_was_logged_and_missing_is_no_gap_without_a_word(
    tmp_path: Path, values, label, monkeypatch
) -> None:
    from matplotlib.axes import Axes

    path, legends = tmp_path / "metrics.csv", []
    path.write_text("step,train/precision\n" + "".join(f"{i},{v}\n" for i, v in enumerate(values)))
    real = Axes.legend

    def legend(self, *args, **options):
        legends.extend(self.get_legend_handles_labels()[1])
        return real(self, *args, **options)

    monkeypatch.setattr(Axes, "legend", legend)
    plot_curves(path, tmp_path / "curves.png")
    assert f"precision ({label})" in legends
