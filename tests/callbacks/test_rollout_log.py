"""The Parquet files and the TensorBoard tables of a run's rollouts."""

from types import SimpleNamespace

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from callback_fakes import TinyData, TinyModule, make_record, make_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from balcap.report.thumbnails import thumbnail_path, write_thumbnail
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
    names = sorted(path.name for path in (tmp_path / "rollouts").glob("*.parquet"))
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


def test_every_image_of_validation_is_kept_small_and_of_training_the_first(tmp_path):
    log = RolloutLog(every_n_steps=1, max_images=1)
    trainer = make_trainer(tmp_path, [log], max_steps=1)
    folder = tmp_path / "rollouts" / "_images"
    module = TinyModule(with_record=True)
    trainer.fit(module, TinyData())
    assert sorted(folder.iterdir()) == [thumbnail_path(folder, "a.png")]
    trainer.validate(module, TinyData(), verbose=False)
    images = {path: Image.open(path) for path in folder.iterdir()}
    sizes = {"a.png": (384, 13), "b.png": (8, 8)}  # 900 x 30 at 384 pixels; the small ones as they are
    expected = {thumbnail_path(folder, name): size for name, size in sizes.items()}
    expected[thumbnail_path(folder, "b.png", 1)] = (9, 8)
    assert {path: image.size for path, image in images.items()} == expected
    assert {image.format for image in images.values()} == {"JPEG"}
    red, _, _ = images[thumbnail_path(folder, "a.png")].getpixel((9, 9))
    assert red > 240
    assert ds.dataset(tmp_path / "rollouts").to_table().num_rows == 3 * 4  # the images do not disturb it


def test_of_training_only_the_first_rank_keeps_images(tmp_path):
    log, module = RolloutLog(every_n_steps=1, dirpath=str(tmp_path)), TinyModule()
    trainer = SimpleNamespace(
        global_rank=1,
        is_global_zero=False,
        global_step=0,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
    )
    outputs = {"records": [make_record()]}
    log.on_train_batch_end(trainer, module, outputs, None, 0)
    assert not (tmp_path / "_images").exists()
    log.on_validation_batch_end(trainer, module, outputs, None, 0)
    assert len(list((tmp_path / "_images").iterdir())) == 3


def test_no_images_are_kept_where_nobody_wants_them(tmp_path):
    log = RolloutLog(every_n_steps=1, thumbnails=False)
    make_trainer(tmp_path, [log, ValidateAtEnds()]).fit(TinyModule(with_record=True), TinyData())
    assert {path.suffix for path in (tmp_path / "rollouts").iterdir()} == {".parquet"}


def test_a_thumbnail_has_a_safe_name_and_is_written_once(tmp_path):
    paths = {
        thumbnail_path(tmp_path, sample_id) for sample_id in ("../a", "a/b.png", "ä" * 300, "a // b", "")
    }
    assert len(paths) == 5
    assert all(path.parent == tmp_path and len(path.name) < 50 for path in paths)
    path = thumbnail_path(tmp_path / "new", "../a", 2)
    original = Image.new("RGBA", (500, 1000), "red")
    write_thumbnail(original, path)
    assert original.size == (500, 1000)
    assert Image.open(path).size == (192, 384)
    before = path.stat()
    write_thumbnail(Image.new("RGB", (5, 5)), path)
    assert path.stat() == before
    assert list(path.parent.iterdir()) == [path]


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
