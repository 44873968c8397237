"""What was written trains, and its units are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from balcap.data import CaptionDataModule
from tests.commands.recaption_fakes import FAULTY, FaultyOracle
from tests.support import metrics


@pytest.fixture
def new(recaption_arguments, cli, out: Path) -> Path:
    cli(recaption_arguments(max_rows=12))
    return out


def test_the_data_module_carries_the_units_to_the_batch(new: Path, world: Path, tmp_path: Path) -> None:
    data = CaptionDataModule(
        data=str(new),
        image_root=str(world),
        batch_size=4,
        val_size=2,
        num_workers=0,
        run_dir=str(tmp_path),
        cache_dir=str(tmp_path),
    )
    rows = {row["image"]: row for row in json.loads(new.read_text())}
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 4
    units = batch.extra("reference_units")
    assert units == [rows[name]["reference_units"] for name in batch.sample_ids]
    assert batch.references == [rows[name]["conversations"][1]["value"] for name in batch.sample_ids]
    assert batch.select([2, 0]).extra("reference_units") == [units[2], units[0]]
    assert not (tmp_path / "bad_rows.jsonl").exists()


def test_training_asks_nobody_about_the_references(new: Path, fit_arguments, cli, tmp_path: Path) -> None:
    judge = {"model.judge.model": FAULTY["judge.model"], "model.judge.providers": FAULTY["judge.providers"]}
    options = {**judge, "data.val_size": 2, "trainer.max_steps": 2}
    references = {row["conversations"][1]["value"] for row in json.loads(new.read_text())}

    FaultyOracle.reset()
    cli(fit_arguments(**options, **{"data.data": new, "run_dir": tmp_path / "with"}))
    decomposed = {text for task, text in FaultyOracle.asked if task == "decompose"}
    assert decomposed
    assert not decomposed & references
    rows = [row for row in metrics(tmp_path / "with") if row["train/loss"]]
    assert len(rows) == 2
    assert all(0 <= float(row["train/recall"]) <= 1 and float(row["judge/failed"]) == 0 for row in rows)

    plain = tmp_path / "plain.json"
    without = [
        {key: value for key, value in row.items() if key != "reference_units"}
        for row in json.loads(new.read_text())
    ]
    plain.write_text(json.dumps(without))
    FaultyOracle.reset()
    own = {
        "data.data": plain,
        "run_dir": tmp_path / "without",
        "model.judge.cache": tmp_path / "other.sqlite",
    }
    cli(fit_arguments(**options, **own))
    assert {text for task, text in FaultyOracle.asked if task == "decompose"} & references
    again = [row for row in metrics(tmp_path / "without") if row["train/loss"]]
    assert [row["train/recall"] for row in again] == [
        row["train/recall"] for row in rows
    ]  # nothing else changed
