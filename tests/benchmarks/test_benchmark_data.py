"""Files of the real formats: VLMEvalKit's TSV, rows of JSON, data sets of the hub with images in them."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from balcap.benchmarks import CaptionQA, Prism
from balcap.data.images import BadImage


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def test_prism_reads_a_tsv_whose_rows_share_an_image(tmp_path: Path) -> None:
    path = tmp_path / "mm.tsv"
    row = {
        "index": "7",
        "question": "What colour?",
        "A": "red",
        "B": "blue",
        "C": "",
        "answer": "B",
        "hint": "Look.",
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*row, "image"], delimiter="\t")
        writer.writeheader()
        writer.writerow({**row, "image": base64.b64encode(picture("blue")).decode()})
        writer.writerow(
            {**row, "index": "8", "question": "Which?", "C": "green", "answer": "green", "image": "7"}
        )
    (image,) = Prism(data=str(path)).images()
    assert image.read()[1].getpixel((0, 0)) == (0, 0, 255)
    assert image.row == [
        ({"question": "Look.\nWhat colour?", "options": ["red", "blue"]}, 1),
        ({"question": "Look.\nWhich?", "options": ["red", "blue", "green"]}, 2),
    ]


def test_a_picture_that_stands_in_several_rows_is_one_image(tmp_path: Path) -> None:
    encoded = [base64.b64encode(picture(colour)).decode() for colour in ("red", "blue", "red")]
    ids = []
    for name, order in (("a.tsv", encoded), ("b.tsv", encoded[::-1])):
        lines = [f"{i}\tQ?\tx\ty\tA\t{image}" for i, image in enumerate(order)]
        (tmp_path / name).write_text("\n".join(["index\tquestion\tA\tB\tanswer\timage", *lines]) + "\n")
        images = Prism(data=str(tmp_path / name)).images()
        assert sorted(len(image.row) for image in images) == [1, 2]
        ids.append({image.id for image in images})
    assert ids[0] == ids[1]


def test_an_answer_may_be_a_letter_or_a_number(tmp_path: Path) -> None:
    questions = [
        {"question": "Q?", "choices": ["x", "y"], "answer": "B"},
        {"question": "R?", "choices": [1, 2, 3], "answer": 3},
    ]
    path = tmp_path / "qa.json"
    path.write_text(json.dumps([{"id": "nat_1", "images": ["a.png"], "questions": questions}]))
    for official, answers in ((False, [1, 2]), (True, [])):
        benchmark = CaptionQA(data=str(path), image_root=str(tmp_path), official=official)
        if official:
            with pytest.raises(ValueError, match="2 no_question_with_a_right_choice"):
                benchmark.images()
            continue
        ((_, asked),) = [image.row for image in benchmark.images()]
        assert [question.answer for question in asked] == answers


def test_prism_reads_json_lines_with_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    rows = [
        {"image": "a.png", "question": "Q?", "choices": ["x", "y"], "answer": "y"},
        {"image": ["a.png"], "question": "R?", "options": {"A": "x", "B": "y"}, "answer": "A"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (image,) = Prism(data=str(path), image_root=str(tmp_path)).images()
    assert [right for _, right in image.row] == [1, 0]
    assert image.read()[0] == picture("red")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {"image": "a.png", "question": "Q?", "choices": ["x", "y"], "answer": "z"},
            "the answer 'z' is none of",
        ),
        (
            {"image": "a.png", "question": "Q?", "choices": ["x"], "answer": "x"},
            "it needs a question and 2 to 26",
        ),
        ({"question": "Q?", "choices": ["x", "y"], "answer": "x"}, "it has no image"),
        ([], "it is no object"),
    ],
)
def test_rows_that_prism_cannot_use_are_named(tmp_path: Path, row: Any, why: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=rf"rows\.json, row 0: {why}"):
        Prism(data=str(path), image_root=str(tmp_path)).images()


def test_broken_base64_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "mm.tsv"
    path.write_text("index\tquestion\tA\tB\tanswer\timage\n1\tQ?\tx\ty\tA\t" + "abcde" * 15 + "\n")
    (image,) = Prism(data=str(path)).images()
    with pytest.raises(BadImage):
        image.read()


def test_captionqa_reads_a_data_set_with_images_in_it(tmp_path: Path) -> None:
    import datasets

    question = {
        "question": "What colour?",
        "choices": ["red", "blue"],
        "answer": "red",
        "category": "Attribute",
    }
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "questions": datasets.List(
                {
                    "question": datasets.Value("string"),
                    "choices": datasets.List(datasets.Value("string")),
                    "answer": datasets.Value("string"),
                    "category": datasets.Value("string"),
                }
            ),
        }
    )
    rows = {
        "id": ["nat_001", "doc_002"],
        "images": [[{"bytes": picture("red"), "path": None}], [{"bytes": picture("blue"), "path": None}]],
        "questions": [[question], [question, question]],
    }
    folder = tmp_path / "captionqa"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    images = CaptionQA(data=str(folder), split="train").images()
    assert [image.id for image in images] == ["nat_001", "doc_002"]
    assert [(image.row[0], len(image.row[1])) for image in images] == [("natural", 1), ("document", 2)]
    assert images[1].read()[1].getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match="cannot be loaded"):
        CaptionQA(data=str(folder), split="none").images()


def test_the_order_of_options_depends_on_the_question_alone(tmp_path: Path) -> None:
    question = {"question": "What?", "choices": list("abcdef"), "answer": "a", "category": "c"}
    rows = [{"id": f"nat_{n}", "images": ["a.png"], "questions": [question] * 3} for n in range(3)]
    whole, last = tmp_path / "whole.json", tmp_path / "last.json"
    whole.write_text(json.dumps(rows))
    last.write_text(json.dumps(rows[2:]))
    options = [
        [q.options for q in CaptionQA(data=str(path), image_root=str(tmp_path)).images()[-1].row[1]]
        for path in (whole, last)
    ]
    assert options[0] == options[1]
    assert len({tuple(one) for one in options[0]}) > 1
