"""Rows of the new file, and how files are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from balcap.cli import ConfigError
from balcap.commands.recaption_run import output_row
from balcap.commands.recaption_settings import RecaptionSettings
from balcap.commands.rows_files import Quarantine, QuarantinedRow, claim, write_rows
from balcap.data.table import flat_rows
from balcap.judge import Judge, TaskModel
from tests.support import ROOT

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
CAPTION, UNITS = "A red cat sits.", ["There is a cat."]


def settings(**more: Any) -> RecaptionSettings:
    return RecaptionSettings(judge=Judge("a/b", per_task={"decompose": TaskModel("c/d")}), **more)


def test_a_row_keeps_what_it_was_but_for_its_caption() -> None:
    new = output_row(ROW, CAPTION, UNITS, settings())
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
    assert (flat["problem"], "\n".join(flat["captions"]), flat["question"]) == (
        "",
        "A red cat sits.",
        "What is it?",
    )
    assert json.loads(flat["columns"]["reference_units"]) == ["There is a cat."]


def test_units_of_the_caption_that_is_replaced_do_not_survive_it() -> None:
    old = {**ROW, "reference_units": ["There is a dog."], "units_model": "x/y"}
    new = output_row(old, CAPTION, UNITS, settings())
    assert (new["reference_units"], new["units_model"]) == (["There is a cat."], "c/d")


@pytest.mark.parametrize(
    ("raw", "human"),
    [
        ({"image": "a.jpg"}, "<image>\nDescribe this image in detail."),
        ({"image": "a.jpg", "conversations": []}, "<image>\nDescribe this image in detail."),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}]}, "<image>\nWhat?"),
    ],
)
def test_a_row_without_a_question_or_placeholder_gets_one(raw: dict, human: str) -> None:
    new = output_row(raw, CAPTION, UNITS, settings())
    assert new["conversations"][0] == {"from": "human", "value": human}
    assert new["original_caption"] == ""
    assert next(flat_rows([new]))["problem"] == ""


def test_a_chosen_prompt_takes_the_place_of_the_question() -> None:
    new = output_row(ROW, CAPTION, UNITS, settings(prompts=["Say what you see."]))
    assert new["conversations"][0]["value"] == "<image>\nSay what you see."


@pytest.mark.parametrize(
    ("question", "prompts", "human"),
    [
        ("Is <image> older than <image>?", None, "Is <image> older than <image>?"),
        ("<image>\n<image>\nCompare.", None, "<image>\n<image>\nCompare."),
        ("Compare.", None, "<image><image>\nCompare."),
        ("<image><image>Compare.", ["Say what you see."], "<image><image>\nSay what you see."),
    ],
)
def test_a_row_of_several_images_keeps_them(question: str, prompts: list[str] | None, human: str) -> None:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Two cats."}]
    raw = {"image": ["a.jpg", "b.jpg"], "conversations": turns}
    new = output_row(raw, CAPTION, UNITS, settings(prompts=prompts))
    assert new["image"] == ["a.jpg", "b.jpg"]
    assert new["conversations"][0]["value"] == human
    (flat,) = flat_rows([new])
    assert (flat["problem"], flat["sample_id"]) == ("", "a.jpg // b.jpg")
    other = output_row(
        {"images": ["a.jpg", "b.jpg"], "query": question, "caption": "x"}, CAPTION, UNITS, settings()
    )
    assert next(flat_rows([other]))["question"] == question.replace("<image>\n", "").replace(
        "<image><image>", ""
    )


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, [{"a": "é\ud800"}, {"b": 1}])
    assert json.loads(path.read_text(encoding="utf-8")) == [{"a": "é?"}, {"b": 1}]
    before = path.read_bytes()

    def broken():
        yield {"c": 1}
        raise KeyError

    with pytest.raises(KeyError):
        write_rows(path, broken())
    assert path.read_bytes() == before
    write_rows(path, [])
    assert json.loads(path.read_text()) == []


def test_the_quarantine_is_on_disk_at_once_in_order_at_the_end_and_gone_when_it_is_empty(
    tmp_path: Path,
) -> None:
    path = tmp_path / "q.jsonl"
    quarantine = Quarantine(path)
    quarantine.add(QuarantinedRow(9, "b.png", "refused", "no"))
    quarantine.add(QuarantinedRow(2, "a.png", "missing_file", "gone"))
    with path.open("a") as file:
        file.write('{"row": 3, "ima')  # of a process that was killed
    assert Quarantine(path).read() == quarantine
    quarantine.write()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["row"] for line in lines] == [2, 9]
    assert lines[1] == {"row": 9, "image": "b.png", "kind": "refused", "reason": "no"}
    quarantine.clear()
    quarantine.write()
    assert not path.exists()
    quarantine.write()


SETTINGS = {"judge.model": "a/b", "prompts": None, "judge.params": {"temperature": 0}}


def test_other_settings_are_refused_with_what_differs_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.json.settings.json"
    for is_first in (True, False):
        with claim(path, "recaption", SETTINGS) as found:
            assert found is is_first
    before = path.read_bytes()
    with (
        pytest.raises(ConfigError) as refused,
        claim(path, "recaption", {**SETTINGS, "judge.model": "a/c", "decompose": True}),
    ):
        pass
    changed, new, way_out = refused.value.problems
    assert changed == 'judge.model was "a/b", is "a/c"'
    assert new == "decompose was null, is true"
    assert "Set them back" in way_out
    assert "another out" in way_out
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["my notes", "[]", '{"a": 1}', '{"recaption": {"judge'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.json.settings.json"
    path.write_text(text)
    with (
        pytest.raises(ConfigError, match=r"was not written by recaption.* move that file away"),
        claim(path, "recaption", SETTINGS),
    ):
        pass
    assert path.read_text() == text


def test_two_processes_cannot_work_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json.settings.json"
    code = "import sys; from pathlib import Path; from balcap.commands.rows_files import claim\n"
    code += f"with claim(Path(sys.argv[1]), 'recaption', {SETTINGS!r}): pass"
    command = [sys.executable, "-c", code, str(path)]
    with claim(path, "recaption", SETTINGS):
        other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "another process is working" in other.stderr
    subprocess.run(command, cwd=ROOT, check=True)
