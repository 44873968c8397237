"""Rows of the new file, and how files are written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from balcap.data.sharegpt4v import flat_rows
from balcap.recaption.journal import Quarantined
from balcap.recaption.output import output_row, write_quarantine, write_rows

ROW = {
    "id": 7,
    "image": "coco/a.jpg",
    "source": "mine",
    "conversations": [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A cat. "},
        {"from": "human", "value": "And more?"},
        {"from": "gpt", "value": "No."},
    ],
}
CAPTION, UNITS = ("A red cat sits.", "a/b"), (["There is a cat."], "c/d")


def test_a_row_keeps_what_it_was_but_for_its_caption() -> None:
    new = output_row(ROW, CAPTION, UNITS)
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A red cat sits."}]
    assert new == {
        "id": 7,
        "image": "coco/a.jpg",
        "source": "mine",
        "conversations": turns,
        "original_caption": "A cat.",
        "caption_model": "a/b",
        "reference_units": ["There is a cat."],
        "units_model": "c/d",
    }
    (flat,) = flat_rows([new])
    assert (flat["problem"], flat["caption"], flat["question"]) == ("", "A red cat sits.", "What is it?")
    assert json.loads(flat["columns"]["reference_units"]) == ["There is a cat."]


def test_units_of_the_caption_that_is_replaced_do_not_survive_it() -> None:
    old = {**ROW, "reference_units": ["There is a dog."], "units_model": "x/y"}
    assert not output_row(old, CAPTION, None).keys() & {"reference_units", "units_model"}
    assert output_row(old, CAPTION, UNITS)["reference_units"] == ["There is a cat."]


def test_the_original_may_go() -> None:
    assert "original_caption" not in output_row(ROW, CAPTION, UNITS, keep_original=False)


@pytest.mark.parametrize(
    ("raw", "human"),
    [
        ({"image": "a.jpg"}, "<image>\nDescribe this image in detail."),
        ({"image": "a.jpg", "conversations": []}, "<image>\nDescribe this image in detail."),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}]}, "<image>\nWhat?"),
    ],
)
def test_a_row_without_a_question_or_placeholder_gets_one(raw: dict, human: str) -> None:
    new = output_row(raw, CAPTION, None)
    assert new["conversations"][0] == {"from": "human", "value": human}
    assert new["original_caption"] == ""
    assert next(flat_rows([new]))["problem"] == ""


def test_a_chosen_prompt_takes_the_place_of_the_question() -> None:
    new = output_row(ROW, CAPTION, None, prompts=["Say what you see."])
    assert new["conversations"][0]["value"] == "<image>\nSay what you see."


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert write_rows(path, [{"a": "é\ud800"}, {"b": 1}]) == 2
    assert json.loads(path.read_text(encoding="utf-8")) == [{"a": "é?"}, {"b": 1}]
    before = path.read_bytes()

    def broken():
        yield {"c": 1}
        raise KeyError

    with pytest.raises(KeyError):
        write_rows(path, broken())
    assert path.read_bytes() == before
    assert write_rows(path, []) == 0
    assert json.loads(path.read_text()) == []


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, [{"row": 0}])

    def rows():
        for row in range(2000):
            if row % 100 == 0:
                assert json.loads(path.read_text()) == [{"row": 0}]
            yield {"row": row, "text": "x" * 100}

    write_rows(path, rows())
    assert len(json.loads(path.read_text())) == 2000
    assert os.listdir(tmp_path) == ["rows.json"]


def test_the_quarantine_list_is_in_order_and_disappears_when_it_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    entries = [Quarantined(9, "b.png", "refused", "no"), Quarantined(2, "a.png", "missing_file", "gone")]
    write_quarantine(path, entries)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [2, 9]
    assert lines[1] == {"row": 9, "image": "b.png", "kind": "refused", "reason": "no"}
    write_quarantine(path, [])
    assert not path.exists()
    write_quarantine(path, [])
