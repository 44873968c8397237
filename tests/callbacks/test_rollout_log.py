"""The Parquet files and the TensorBoard tables of a run's rollouts."""

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from callback_fakes import TinyData, TinyModule, make_record, make_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.rollout_log import RolloutLog, rollout_markdown, rollout_table, write_parquet
from callbacks.validate_ends import ValidateAtEnds

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_rollout_is_one_row_and_missing_is_null():
    rows = rollout_table(make_record(), stage="train", step=7, batch_idx=6, rank=1).to_pylist()
    assert [(row["group"], row["rollout"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first, second, third, last = rows
    assert {key: first[key] for key in ("stage", "step", "batch", "rank")} == {
        "stage": "train", "step": 7, "batch": 6, "rank": 1,
    }  # fmt: skip
    assert first["sample_id"] == "a.png"
    assert first["prompt"] == "Describe | this."
    assert first["reference_units"] == ["red", "bar"]
    assert (first["clarity"], first["fluency"], first["coherency"]) == (1.0, 0.5, 0.75)
    assert (second["length"], second["reference_length"], second["truncated"]) == (7, 4, True)
    assert second["assertions"] == ["a bar", "hope"]
    assert (second["true"], second["pointable"]) == ([True, False], [False, False])
    assert second["reward/linguistic"] == pytest.approx(0.2)
    assert second["shaped/linguistic"] == 0.0
    assert third["reference_units"] is None
    assert third["advantage"] == 0.5
    for key in ("reward/precision", "shaped/linguistic", "assertions", "true", "pointable", "clarity"):
        assert last[key] is None
    # Nobody asked for a match: the column is there, and null.
    assert [row["covered"] for row in rows] == [None] * 4
    assert last["weights_version"] == 3


def test_validation_has_no_advantages():
    table = rollout_table(make_record(advantages=False), stage="val", step=0, batch_idx=0, rank=0)
    assert table["advantage"].null_count == 4


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(pq, "write_table", lambda table, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_parquet(rollout_table(make_record(), "val", 0, 0, 0), tmp_path / "new" / "val.parquet")
    assert list(tmp_path.rglob("*.parquet")) == []


def test_markdown_shows_verdicts_and_lets_nothing_out_of_its_cell():
    text = rollout_markdown(make_record(), 0)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4, "head, rule, two rollouts"
    assert {line.count("|") for line in table} == {7}, "the bar in a caption is no border"
    assert "✓ a red bar" in text
    assert "○ a bar<br>✗ hope" in text
    assert "0.20 → 0.00" in text
    assert "7 (cut)" in text
    assert "<b>" not in text
    assert "–" in rollout_markdown(make_record(), 1)


def test_a_run_logs_every_nth_batch_and_all_of_validation(tmp_path):
    log = RolloutLog(every_n_steps=2, max_images=3)
    logger = TensorBoardLogger(tmp_path, name="tb")
    trainer = make_trainer(tmp_path, [log, ValidateAtEnds()], logger=logger)
    trainer.fit(TinyModule(with_record=True), TinyData())
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == [
        "train-00000001-rank0-000000.parquet",
        "train-00000003-rank0-000002.parquet",
        "train-00000005-rank0-000004.parquet",
        "val-00000000-rank0-000000.parquet",
        "val-00000000-rank0-000001.parquet",
        "val-00000005-rank0-000000.parquet",
        "val-00000005-rank0-000001.parquet",
    ]
    table = ds.dataset(tmp_path / "rollouts").to_table()
    assert table.num_rows == 7 * 4

    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    tags = events.Tags()
    # Two validation batches of two rows, three of which are shown; of the second row all images.
    assert {f"val_rollouts/{i}" for i in range(3)} <= set(tags["images"])
    assert "val_rollouts/3" not in tags["images"]
    assert {f"train_rollouts/{i}/text_summary" for i in range(2)} <= set(tags["tensors"])
    assert [event.step for event in events.Images("train_rollouts/0")] == [1, 3, 5]
    assert events.Images("train_rollouts/0")[0].width == 512
    assert [events.Images(f"train_rollouts/{tag}")[0].width for tag in ("1", "1_2")] == [8, 9]
    assert len([tag for tag in tags["images"] if "_2" in tag]) == 2


def test_a_step_without_record_and_sanity_checking_log_nothing(tmp_path):
    trainer = make_trainer(tmp_path, [RolloutLog(every_n_steps=1)], max_steps=1)
    trainer.fit(TinyModule(), TinyData())
    assert not (tmp_path / "rollouts").exists()
    (problem,) = RolloutLog(every_n_steps=0).problems()
    assert problem.startswith("rollout_log.every_n_steps: 0")


def test_dirpath(tmp_path):
    log = RolloutLog(dirpath=str(tmp_path / "elsewhere"))
    make_trainer(tmp_path, [log], max_steps=1).fit(TinyModule(with_record=True), TinyData())
    assert len(list((tmp_path / "elsewhere").glob("train-*.parquet"))) == 1
