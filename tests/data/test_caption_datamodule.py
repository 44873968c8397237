"""The data module as its users meet it: settings, files on disk, Lightning."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
from PIL import Image

from balcap.data.bad_rows import TooManyBadRows
from balcap.data.datamodule import CaptionDataModule
from balcap.data.images import PILLOW_MAX_PIXELS
from balcap.data.json_files import DataError
from balcap.data.reader import DEFAULT_PROMPT
from balcap.types import CaptionBatch


def ids(loader: object, batches: int | None = None) -> list[str]:
    sample_ids: list[str] = []
    for number, batch in enumerate(loader, start=1):  # type: ignore[arg-type]
        assert isinstance(batch, CaptionBatch)
        sample_ids += batch.sample_ids
        if number == batches:
            break
    return sample_ids


def listed(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]


# ---- rows as they are found in the wild


def test_ten_kinds_of_bad_rows_and_every_batch_is_full(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(30)
    root = tmp_path / "images"
    (root / "coco" / "page.jpg").write_text("<html>")
    (root / "coco" / "cut.png").write_bytes((root / names[0]).read_bytes()[:50])
    (root / "coco" / "dir.png").mkdir()
    Image.new("L", (300, 300)).save(root / "coco" / "huge.png")
    Image.new("L", (30, 30)).save(tmp_path / "outside.png")
    (root / "coco" / "link.png").symlink_to(tmp_path / "outside.png")
    bad = {
        30: (row("coco/none.png"), "missing_file"),
        31: (row("coco/page.jpg"), "not_an_image"),
        32: (row("coco/cut.png"), "truncated_image"),
        33: (row("coco/dir.png"), "unreadable_file"),
        34: (row("coco/huge.png"), "decompression_bomb"),
        35: (row("coco/link.png"), "outside_image_root"),
        36: (row("../outside.png"), "outside_image_root"),
        37: (row(names[:2], question="<image>Two?"), "placeholder_mismatch"),
        38: ({"id": "1"}, "no_image_field"),
        39: (row("coco/a.png", caption=""), "no_caption"),
        40: (row("coco/b.png", question="What?" * 3000), "text_too_long"),
        41: (row("coco/c.png", caption="caf\ufffd"), "not_utf8"),
        42: ("not a row", "malformed_row"),
    }
    rows = [row(name) for name in names] + [raw for raw, _ in bad.values()]
    data = make_data(rows, max_pixels_in_file=10_000, max_bad_share=0.5, num_workers=2)
    loader = data.train_dataloader()
    assert len(loader) == 43 // 4
    seen = []
    for _ in range(4):  # epochs: every bad row is met several times
        for batch in loader:
            assert len(batch) == len(batch.images) == 4
            seen += batch.sample_ids
            data.consumed(batch)
    assert set(seen) == set(names)
    assert {entry["row"]: entry["cause"] for entry in listed(tmp_path)} == {r: c for r, (_, c) in bad.items()}
    assert len(listed(tmp_path)) == len(bad)
    assert data.bad_row_counts()["outside_image_root"] == 2
    assert sum(data.bad_row_counts().values()) == 13


def test_any_subset_of_the_image_folders_will_do(
    tmp_path: Path,
    make_images: Callable,
    make_data: Callable,
    row: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [row(name) for name in make_images(12)] + [row(f"sam/images/{i}.jpg") for i in range(500)]
    data = make_data(rows, max_bad_share=0.01)
    data.setup("fit")
    assert "folder_not_on_disk" in caplog.text
    assert "500 rows left out" in caplog.text
    assert len(caplog.records) == 1
    assert len(data.train_dataloader()) == 3
    assert set(ids(data.train_dataloader())) == {f"coco/{i:04d}.png" for i in range(12)}
    assert data.bad_row_counts() == {"folder_not_on_disk": 500}


def test_no_folder_on_disk_at_all_is_an_error(make_data: Callable, row: Callable) -> None:
    with pytest.raises(DataError, match=r"data\.image_root: no row .* is left: coco not found"):
        make_data([row("coco/a.png")]).setup("fit")


def test_files_missing_everywhere_stop_the_run(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    rows = [row(name) for name in make_images(60)] + [row(f"coco/none{i}.png") for i in range(60)]
    data = make_data(rows, num_workers=2)
    with pytest.raises(TooManyBadRows, match=r"data\.max_bad_share=0\.2.*missing_file.*bad_rows\.jsonl"):
        ids(data.train_dataloader())


def test_batches_hold_pixels_bytes_prompt_and_reference_and_nothing_is_logged_when_all_is_well(
    tmp_path: Path,
    make_images: Callable,
    make_data: Callable,
    row: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [row(name, caption=f"About {name}.", question=f"<image>\n{name}?") for name in make_images(8)]
    batch = next(iter(make_data(rows).train_dataloader()))
    for i, name in enumerate(batch.sample_ids):
        assert batch.references[i] == f"About {name}."
        assert batch.prompts[i] == f"{name}?"
        assert batch.image_bytes[i] == ((tmp_path / "images" / name).read_bytes(),)
        assert batch.images[i][0].getpixel((0, 0)) == (int(name[-8:-4]), 0, 9)
    assert not [record for record in caplog.records if record.name.startswith("balcap")]


def test_one_of_several_prompts_is_kept_by_every_image(
    make_images: Callable, make_data: Callable, row: Callable
) -> None:
    rows = [row(name) for name in make_images(40)]
    chosen: list[dict] = []
    for seed in (0, 0, 1):
        data = make_data(rows, prompts=["A?", "B?", "C?"], seed=seed)
        chosen.append(
            {i: p for b in data.train_dataloader() for i, p in zip(b.sample_ids, b.prompts, strict=True)}
        )
    assert chosen[0] == chosen[1] != chosen[2]
    assert set(chosen[0].values()) == {"A?", "B?", "C?"}


# ---- validation


def test_validation_images_are_held_out_and_always_the_same(
    make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(40)
    data = make_data([row(name) for name in names], val_size=10, val_batch_size=3)
    val = ids(data.val_dataloader())
    assert len(val) == 10
    assert val == ids(data.val_dataloader())
    assert val == ids(make_data([row(n) for n in reversed(names)], val_size=10).val_dataloader())
    assert not set(val) & set(ids(data.train_dataloader()))
    assert (
        make_data([row(n) for n in names], val_size=10, seed=1).split.val.tolist() != data.split.val.tolist()
    )
    assert make_data([row(n) for n in names], val_size=0).val_dataloader() == []


def test_a_broken_validation_image_is_replaced(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(40)
    before = ids(make_data([row(n) for n in names], val_size=8).val_dataloader())
    (tmp_path / "images" / before[2]).write_bytes(b"")
    data = make_data([row(n) for n in names], val_size=8)
    after = ids(data.val_dataloader())
    assert len(after) == 8
    assert [a for a in after if a != after[2]] == [b for b in before if b != before[2]]
    assert not set(after) & set(ids(data.train_dataloader()))
    assert [entry["image"] for entry in listed(tmp_path)] == [before[2]]


class FakeTrainer:
    """One rank among several, as far as the data module asks."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size


@pytest.mark.parametrize(("val_size", "batch", "expected"), [(9, 4, 9), (7, 2, 7), (5, 1, 4), (8, 8, 8)])
def test_ranks_share_validation_in_equal_numbers_of_batches(
    make_images: Callable, make_data: Callable, row: Callable, val_size: int, batch: int, expected: int
) -> None:
    rows = [row(name) for name in make_images(30)]
    seen, numbers = [], []
    for rank in range(2):
        data = make_data(rows, val_size=val_size, val_batch_size=batch)
        data.trainer = FakeTrainer(rank, 2)
        loader = data.val_dataloader()
        numbers.append(len(list(loader)))
        seen += ids(loader)
    assert numbers[0] == numbers[1]
    assert len(seen) == len(set(seen)) == expected


def test_a_small_data_set_holds_out_a_tenth(
    make_images: Callable, make_data: Callable, row: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(name) for name in make_images(20)]
    for number, val_size, expected in (
        (20, 256, (17, 2, 1)),
        (20, 16, (2, 16, 2)),
        (4, 3, (2, 1, 1)),
        (2, 1, (2, 0, 0)),
    ):
        caplog.clear()
        split = make_data(rows[:number], val_size=val_size).split
        assert tuple(map(len, (split.train, split.val, split.spare))) == expected
        assert ("too few" in caplog.text) == (expected[1] != val_size)


def test_a_file_without_a_good_row_says_why(make_data: Callable) -> None:
    with pytest.raises(
        DataError, match=r"none of the 2 rows .* \(no_image_field 2\)\. Row 0: .*\['picture'\]"
    ):
        make_data([{"picture": "a.png"}] * 2, val_size=256).setup("fit")


def test_a_validation_without_any_readable_image_is_an_error(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    data = make_data([row(name) for name in make_images(30)], val_size=4)
    for index in (*data.split.val, *data.split.spare):
        (tmp_path / "images" / data.table[index]["sample_id"]).unlink()
    with pytest.raises(DataError, match=r"none of the images held out .*missing_file 5"):
        list(data.val_dataloader())


# ---- several captions, several names


def test_several_captions_are_one_reference_or_one_a_visit(
    make_images: Callable, make_data: Callable, row: Callable
) -> None:
    rows = [
        row(name, f"Caption {i}.") | {"reference_units": [f"Unit {i}."]}
        for name in make_images(4)
        for i in range(3)
    ]
    (batch,) = make_data(rows, batch_size=4).train_dataloader()
    assert len(set(batch.sample_ids)) == 4
    assert set(batch.references) == {"Caption 0.\nCaption 1.\nCaption 2."}
    assert batch.extra("reference_units") == [["Unit 0.", "Unit 1.", "Unit 2."]] * 4
    data = make_data(rows, batch_size=4, references="one")
    seen: dict[str, list[str]] = {}
    for _ in range(12):
        for batch in data.train_dataloader():
            data.consumed(batch)
            units = batch.extra("reference_units")
            for name, reference, unit in zip(batch.sample_ids, batch.references, units, strict=True):
                assert unit == [reference.replace("Caption", "Unit")]
                seen.setdefault(name, []).append(reference)
    assert all(len(set(references)) == 3 for references in seen.values())


def test_one_image_under_two_names_is_not_trained_on_and_validated(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(20)
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images" / "coco")
    other = [(f"./{n}", f"again/{Path(n).name}", str(tmp_path / "images" / n)) for n in names]
    data = make_data([row(n) for n in [*names, *itertools.chain(*other)]], val_size=4, max_bad_share=0.9)
    files = {Path(data.table[r]["sample_id"]).name for r in data.split.val}
    seen = set()
    for _ in range(2):
        for batch in data.train_dataloader():
            data.consumed(batch)
            seen |= {Path(sample_id).name for sample_id in batch.sample_ids}
    assert len(seen) >= 14
    assert not files & seen
    assert "held_out" in data.bad_row_counts()


# ---- prediction


def test_a_folder_is_captioned_without_data(tmp_path: Path, make_images: Callable) -> None:
    make_images(5, "holiday/day1")
    (tmp_path / "images" / "holiday" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "elsewhere").symlink_to(tmp_path)
    data = CaptionDataModule(
        predict_from=str(tmp_path / "images"), batch_size=2, num_workers=2, run_dir=str(tmp_path / "run")
    )
    assert data.problems("predict") == []
    batches = list(data.predict_dataloader())
    assert sorted(i for b in batches for i in b.sample_ids) == [f"holiday/day1/{i:04d}.png" for i in range(5)]
    assert {r for b in batches for r in b.references} == {""}
    assert {p for b in batches for p in b.prompts} == {DEFAULT_PROMPT}
    assert data.bad_row_counts() == {"not_an_image": 2, "outside_image_root": 1}
    data.skip({"holiday/day1/0001.png", "holiday/day1/0004.png"})
    assert sorted(ids(data.predict_dataloader())) == [f"holiday/day1/{i:04d}.png" for i in (0, 2, 3)]


def test_rows_are_captioned_with_or_without_reference(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(3)
    rows = [row(names[0]), row(names[1], caption=""), {"image": names[2]}, row("coco/none.png")]
    path = tmp_path / "predict.json"
    path.write_text(json.dumps(rows))
    data = make_data([], data=None, predict_from=str(path))
    batches = list(data.predict_dataloader())
    assert [r for b in batches for r in b.references] == ["A caption.", "", ""]
    assert data.bad_row_counts() == {"missing_file": 1}


def test_ranks_share_prediction(tmp_path: Path, make_images: Callable) -> None:
    names = make_images(7)
    seen = []
    for rank in range(3):
        data = CaptionDataModule(predict_from=str(tmp_path / "images"), batch_size=2, num_workers=0)
        data.trainer = FakeTrainer(rank, 3)
        seen += ids(data.predict_dataloader())
    assert sorted(seen) == names


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.predict_from: no images"):
        CaptionDataModule(predict_from=str(tmp_path)).predict_dataloader()


# ---- settings


def test_every_wrong_setting_is_reported_at_once_with_its_key(tmp_path: Path) -> None:
    data = CaptionDataModule(
        data=str(tmp_path / "none.json"),
        image_root=str(tmp_path / "nowhere"),
        batch_size=0,
        val_size=-1,
        val_batch_size=0,
        num_workers=-1,
        seed=-1,
        max_rows=0,
        max_bad_share=float("nan"),
        max_pixels_in_file=PILLOW_MAX_PIXELS + 1,
        prompts=["", "Describe."],
        columns=["image", "mine", "id"],
    )
    problems = data.problems("fit")
    keys = ["batch_size", "val_size", "val_batch_size", "num_workers", "seed", "max_rows", "max_bad_share"]
    keys += ["max_pixels_in_file", "columns", "columns", "prompts", "data", "image_root"]
    assert [message.split()[0].rstrip(":") for message in problems] == [f"data.{key}" for key in keys]
    assert "(it is nan)" in problems[6]
    assert "does not exist" in problems[-1]


@pytest.mark.parametrize(
    "key", ["batch_size", "val_size", "val_batch_size", "seed", "max_rows", "max_bad_share"]
)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, key: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        (problem,) = CaptionDataModule(predict_from=str(tmp_path), **{key: value}).problems("predict")
        assert problem.startswith(f"data.{key} must be")


def test_what_a_stage_needs(tmp_path: Path) -> None:
    nothing = CaptionDataModule()
    assert [m.split(" is required")[0] for m in nothing.problems("fit")] == ["data.data", "data.image_root"]
    assert [m.split(" is required")[0] for m in nothing.problems("predict")] == ["data.predict_from"]
    assert nothing.problems("validate") == nothing.problems("fit")
    with pytest.raises(ValueError, match="stage is 'train'"):
        nothing.problems("train")
    (tmp_path / "rows.json").write_text("[]")
    good = CaptionDataModule(data=str(tmp_path / "rows.json"), image_root=str(tmp_path))
    assert good.problems("fit") == []
    folders = CaptionDataModule(
        data="Lin-Chen/ShareGPT4V", image_root=str(tmp_path), folders=["coco/train2017"]
    )
    assert folders.problems("fit") == [
        f"data.folders: coco/train2017 does not exist under data.image_root={tmp_path}"
    ]


@pytest.mark.parametrize(
    ("data", "part"),
    [("rows.json", "is not a file"), ("some/rows.jsonl", "is not a file"), (".", "is a folder")],
)
def test_data_that_is_no_file_and_no_hub_id(tmp_path: Path, data: str, part: str) -> None:
    (message,) = CaptionDataModule(data=data, image_root=str(tmp_path)).problems("fit")
    assert message.startswith(f"data.data: {data} {part}")


def test_the_command_line_gets_types_and_help() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(CaptionDataModule, "data")
    text = " ".join(parser.format_help().split())
    assert "images per rank and training step" in text
    assert "decompression bombs" in text
    parsed = parser.parse_args(["--data.folders=[coco/train2017]", "--data.max_rows=5"])
    assert (parsed.data.folders, parsed.data.max_rows) == (["coco/train2017"], 5)
    assert parser.instantiate_classes(parsed).data.problems("predict")


def test_importing_the_package_is_light() -> None:
    heavy = ("lightning", "datasets", "transformers")
    code = f"import sys, balcap.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- resuming


class Recorder(lightning.LightningModule):
    """Trains nothing and remembers what it was given."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[str] = []
        self.validated: list[str] = []

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.step()  # counts Lightning's global_step
        self.seen += batch.sample_ids
        self.trainer.datamodule.consumed(batch)

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        self.validated += batch.sample_ids

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make_trainer(tmp_path: Path, steps: int, **settings: object) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [5, 7])  # within an epoch of 6 batches, and beyond it
def test_lightning_continues_a_killed_run_exactly(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable, stop: int
) -> None:
    rows = [row(name) for name in make_images(24)] + [row(f"coco/none{i}.png") for i in range(3)]
    new = {"batch_size": 4, "val_size": 2, "num_workers": 2}
    whole = Recorder()
    make_trainer(tmp_path, 14, precision="bf16-true").fit(whole, make_data(rows, **new))
    assert len(whole.seen) == 56
    assert len(set(whole.validated)) == 2
    begun = Recorder()
    trainer = make_trainer(tmp_path, stop)
    trainer.fit(begun, make_data(rows, **new))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    continued = Recorder()
    make_trainer(tmp_path, 14).fit(continued, make_data(rows, **new), ckpt_path=tmp_path / "last.ckpt")
    assert begun.seen + continued.seen == whole.seen


def stopped(data: CaptionDataModule, batches: int) -> dict:
    """The state after so many batches were trained on."""
    for number, batch in enumerate(data.train_dataloader(), start=1):
        data.consumed(batch)
        if number == batches:
            break
    return data.state_dict()


def test_another_batch_size_continues_without_loss(
    make_images: Callable, make_data: Callable, row: Callable
) -> None:
    rows = [row(name) for name in make_images(24)]
    whole = ids(make_data(rows).train_dataloader())
    data = make_data(rows, batch_size=2)
    data.load_state_dict(stopped(make_data(rows), 3))
    assert ids(data.train_dataloader(), 6) == whole[12:]


def test_another_number_of_workers_warns_and_leaves_nothing_out(
    make_images: Callable, make_data: Callable, row: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(name) for name in make_images(24)]
    first = make_data(rows, num_workers=2)
    begun = ids(make_data(rows, num_workers=2).train_dataloader(), 3)
    data = make_data(rows, num_workers=0)
    data.load_state_dict(stopped(first, 3))
    rest = ids(data.train_dataloader())
    # Shard 0 has read 8 rows and shard 1 has read 4: together they have come to row 9 of the order, and
    # 12 - 9 = 3 rows beyond it come again.
    assert "continues from row 9 of epoch 0" in caplog.text
    assert "about 3 come again" in caplog.text
    assert set(begun) | set(rest[:15]) == {r["image"] for r in rows}
    assert len(set(begun) & set(rest[:15])) == 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, r"data\.seed was 0, is 1"),
        ({"val_size": 2}, r"data\.val_size was 0, is 2"),
        ({"max_rows": 20}, r"data\.max_rows was None, is 20"),
        ({}, r"data\.data \(digest of its images\)"),
    ],
)
def test_other_data_cannot_be_continued(
    make_images: Callable, make_data: Callable, row: Callable, change: dict, key: str
) -> None:
    names = make_images(24)
    state = stopped(make_data([row(name) for name in names]), 2)
    rows = [row(name) for name in (names if change else names[::-1])]
    data = make_data(rows, **change)
    data.load_state_dict(state)
    with pytest.raises(DataError, match=key):
        data.train_dataloader()


def _rank(rank: int, port: int, settings: dict, queue: multiprocessing.Queue) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    data = CaptionDataModule(**settings)
    seen = []
    loader = data.train_dataloader()
    for batch, _ in zip(loader, range(3), strict=False):
        data.consumed(batch)
        seen += batch.sample_ids
    state = data.state_dict()
    resumed = CaptionDataModule(**settings)
    resumed.load_state_dict(state)
    queue.put((rank, state["positions"], seen, ids(resumed.train_dataloader(), 3)))
    torch.distributed.destroy_process_group()


def test_a_checkpoint_holds_the_place_of_every_rank(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    import socket

    rows = [row(name) for name in make_images(22)] + [row("coco/none.png"), row("coco/none2.png")]
    make_data(rows)
    settings = {
        "data": str(tmp_path / "rows.json"),
        "image_root": str(tmp_path / "images"),
        "batch_size": 2,
        "val_size": 0,
        "num_workers": 0,
        "run_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, settings, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = sorted(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert results[0][1] == results[1][1]  # both ranks know both places
    assert sum(p for rank in results[0][1] for p in rank) >= 12
    trained = [name for _, _, seen, rest in results for name in seen + rest]
    assert len(trained) == 24
    assert set(trained) >= {r["image"] for r in rows[:22]}
