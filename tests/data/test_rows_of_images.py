"""Rows of several images: how they are read, known, held out and left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from balcap.data.layouts import PLACEHOLDER, image_paths, normalise
from balcap.data.order import select_rows
from balcap.data.table import flat_rows


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("Compare them.", "Compare them."),
        ("<image>\n<image>\nCompare them.", "Compare them."),
        ("<image> is older than <image>. Why?", "<image> is older than <image>. Why?"),
        ("Compare <image><image>", "Compare <image><image>"),
    ],
)
def test_placeholders_stay_where_images_stand_within_the_text(
    row: Callable, question: str, kept: str
) -> None:
    flat = normalise(row(["b/1.png", "./a//2.png"], question=question), 0)
    assert (flat["problem"], flat["sample_id"], flat["question"]) == ("", "b/1.png // a/2.png", kept)
    assert image_paths(flat["sample_id"]) == ["b/1.png", "a/2.png"]


def test_the_layouts_of_other_projects_name_several_images_too() -> None:
    parts = [
        {"type": "image"},
        {"type": "text", "text": " and "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Two cats."}]
    flat = normalise({"images": [{"path": "a.png"}, "b.png"], "messages": turns}, 0)
    assert (flat["problem"], flat["sample_id"], flat["question"]) == (
        "",
        "a.png // b.png",
        "<image> and <image>?",
    )
    assert image_paths("a.png") == ["a.png"]


@pytest.mark.parametrize(("images", "count"), [(1, 2), (2, 1), (2, 3), (3, 1)])
def test_a_count_of_placeholders_that_is_not_that_of_the_images_is_a_bad_row(
    row: Callable, images: int, count: int
) -> None:
    names = [f"{i}.png" for i in range(images)]
    flat = normalise(row(names if images > 1 else names[0], question=count * f"a {PLACEHOLDER} "), 0)
    assert flat["problem"] == "placeholder_mismatch"
    assert flat["detail"] == f"{images} images, but {count} <image> in the question"


def test_the_same_images_in_the_same_order_are_one_sample(row: Callable) -> None:
    named: list = [["a.png", "b.png"], ["b.png", "a.png"], ["./a.png", "b.png"], "a.png"]
    rows = [row(images, question="What?") for images in named]
    assert [flat["first"] for flat in flat_rows(rows)] == [0, 1, 0, 3]


def test_a_row_takes_part_where_the_folders_of_all_its_images_do(tmp_path: Path) -> None:
    for folder in ("coco/a", "coco/b"):
        (tmp_path / folder).mkdir(parents=True)
    ids = [
        "coco/a/1.png // coco/b/2.png",
        "coco/a/1.png // sam/2.png",
        f"{tmp_path}/coco/a/1.png // coco/a/2.png",
    ]
    rows, missing = select_rows(ids, tmp_path, None, None)
    assert (rows.tolist(), missing) == ([0, 2], {"sam": 1})
    assert select_rows(ids, tmp_path, ["coco/a"], None)[0].tolist() == [2]


def test_batches_hold_all_images_of_a_row_and_bad_rows_are_listed(
    tmp_path: Path, make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(8)
    good = [names[0], names[1:3], names[3:6]]
    bad = [
        (row([names[6], "coco/none.png"], question="What?"), "missing_file"),
        (row(names[6:8], question="Is <image> older?"), "placeholder_mismatch"),
        (row([names[7], "../outside.png"], question="What?"), "outside_image_root"),
    ]
    rows = [row(name, question="What?") for name in good] + [raw for raw, _ in bad]
    data = make_data(rows, batch_size=3, max_bad_share=0.9)
    batch = next(iter(data.train_dataloader()))
    found = dict(zip(batch.sample_ids, zip(batch.image_bytes, batch.images, strict=True), strict=True))
    files = [(tmp_path / "images" / name).read_bytes() for name in names]
    assert {name: read for name, (read, _) in found.items()} == {
        names[0]: (files[0],),
        " // ".join(names[1:3]): tuple(files[1:3]),
        " // ".join(names[3:6]): tuple(files[3:6]),
    }
    assert [image.getpixel((0, 0)) for image in found[" // ".join(names[3:6])][1]] == [
        (i, 0, 9) for i in (3, 4, 5)
    ]
    for _ in range(3):
        list(data.train_dataloader())
    lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert {entry["row"]: entry["cause"] for entry in map(json.loads, lines)} == {
        3 + i: cause for i, (_, cause) in enumerate(bad)
    }
    assert data.bad_row_counts()["placeholder_mismatch"] == 1


def test_a_prompt_of_the_config_has_all_images_before_it(
    make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(2)
    rows = [row(names, question="<image> or <image>?")]
    (batch,) = make_data(rows, batch_size=1).train_dataloader()
    assert batch.prompts == ["<image> or <image>?"]
    (batch,) = make_data(rows, batch_size=1, prompts=["Compare <image>."]).train_dataloader()
    assert batch.prompts == ["Compare ."]


def test_no_image_of_a_validated_row_is_trained_on(
    make_images: Callable, make_data: Callable, row: Callable
) -> None:
    names = make_images(40)
    rows = [row(names[2 * i : 2 * i + 2], question="What?") for i in range(20)] + [
        row(name) for name in names
    ]
    data = make_data(rows, val_size=4, max_bad_share=1.0)
    held = np.concatenate([data.split.val, data.split.spare])
    validated = {path for i in held for path in image_paths(data.table[int(i)]["sample_id"])}
    trained = set()
    for _ in range(2):
        for batch in data.train_dataloader():
            trained |= {path for name in batch.sample_ids for path in image_paths(name)}
            data.consumed(batch)
    assert validated
    assert not trained & validated
    assert trained | validated == set(names)
