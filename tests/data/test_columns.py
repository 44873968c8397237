"""Columns: from the rows of a JSON file to batches, through worker processes and resumed runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from balcap.data.columns import Columns, kind_of
from balcap.data.datamodule import CaptionDataModule
from balcap.data.json_files import DataError
from balcap.data.table import flat_rows, load_rows
from balcap.types import CaptionBatch

VALUES: dict[str, Any] = {
    "text": "What is it?",
    "number": 0.5,
    "boolean": False,
    "object": {"a": [1, None], "é": {"b": "c"}},
    "list of texts": ["one", "two"],
    "list of numbers": [1, 2.5],
    "list of objects": [{"question": "How many?", "answer": 3}],
    "list of lists": [["x"], []],
    "list of mixed values": ["x", 1, {}],
    "list": [],
}
"""One value of each kind."""


@pytest.mark.parametrize("kind", VALUES)
def test_kinds_of_json_values(kind: str) -> None:
    assert kind_of(VALUES[kind]) == kind


def taken(rows: list, *columns: str) -> list[tuple[str, Any]]:
    """Cause and value of the last of `columns`, by row."""
    name = columns[-1]
    texts = [(flat["problem"], flat["columns"][name]) for flat in flat_rows(rows, columns)]
    return [(cause, None if text is None else json.loads(text)) for cause, text in texts]


def with_column(row: Callable, values: list) -> list[dict]:
    """A row with ``mine`` for each value; ... for none."""
    return [row(f"{i}.jpg") | ({} if v is ... else {"mine": v}) for i, v in enumerate(values)]


def test_the_first_row_that_has_a_column_decides_its_kind(row: Callable) -> None:
    rows = with_column(row, [..., None, ["a"], "a", [], [1], ["b", 1], {}, ["c"]])
    bad = ("malformed_column", None)
    assert taken(rows, "mine") == [
        ("", None),
        ("", None),
        ("", ["a"]),
        bad,
        ("", []),
        bad,
        bad,
        bad,
        ("", ["c"]),
    ]
    details = [flat["detail"] for flat in flat_rows(rows, ["mine"])]
    assert details[3] == "column \"mine\": expected list of texts as in row 2, found text: 'a'"
    assert (
        details[6]
        == "column \"mine\": expected list of texts as in row 2, found list of mixed values: ['b', 1]"
    )


@pytest.mark.parametrize(
    ("values", "malformed"),
    [
        ([[], [], [1], ["a"], [2]], [3]),  # an empty list leaves the kind of list open
        ([["a", 1], ["a"], [], [{}], "a"], [4]),  # mixed values are any list
        ([1, 2.5, True, "1"], [2, 3]),
        ([{"a": 1}, {"b": []}, [{"a": 1}]], [2]),
    ],
)
def test_what_fits_a_kind(row: Callable, values: list, malformed: list[int]) -> None:
    causes = [cause for cause, _ in taken(with_column(row, values), "mine")]
    assert [i for i, cause in enumerate(causes) if cause] == malformed


def test_rows_that_nobody_can_use_decide_nothing(row: Callable) -> None:
    rows = [{"mine": "text"}, 17, row("a.jpg"), row("a.jpg") | {"mine": 2}, row("b.jpg") | {"mine": "text"}]
    assert taken(rows, "mine")[-2:] == [("", 2), ("malformed_column", None)]
    # One without caption can be predicted from: its column counts.
    rows = [row("a.jpg", caption="") | {"mine": 1}, row("b.jpg") | {"mine": "text"}]
    assert taken(rows, "mine") == [("no_caption", 1), ("malformed_column", None)]


def test_units_of_the_reference_are_always_a_column(row: Callable) -> None:
    units = [["There is a cat.", "The cat is red."], [], None, ["A dog."]]
    flat = flat_rows([row(f"{i}.jpg") | {"reference_units": value} for i, value in enumerate(units)])
    texts = [f["columns"]["reference_units"] for f in flat if not f["problem"]]
    assert [text and json.loads(text) for text in texts] == units


@pytest.mark.parametrize("units", ["There is a cat.", 5, {}, ["A cat.", 5], ["A cat.", " "]])
def test_units_that_are_no_list_of_texts_make_a_bad_row(row: Callable, units: object) -> None:
    (flat,) = flat_rows([row("a.jpg") | {"reference_units": units}])
    assert (flat["problem"], flat["columns"]) == ("malformed_column", {"reference_units": None})
    assert flat["detail"].startswith('column "reference_units": expected list of texts, found ')
    assert flat["captions"]  # whoever needs only the image, or writes units anew, still has the row


def test_a_value_that_json_cannot_hold_is_malformed(row: Callable) -> None:
    rows = with_column(row, [{"when": Path("x")}, "text"])  # a hub data set may hold such objects
    assert taken(rows, "mine")[0] == ("malformed_column", None)


def test_a_column_that_no_row_has_is_an_error(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([row("a.jpg") | {"questions": ["?"], "answer": 1}, row("b.jpg") | {"tags": None}])
    )
    with pytest.raises(
        DataError, match=r"data\.columns: .* has captions, question; .*: answer, questions, tags$"
    ):
        load_rows(str(path), cache_dir=str(tmp_path), columns=["question", "answer", "captions"])


def test_columns_key_the_table(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a.jpg") | {"a": 1, "b": "half a \ud800 pair", "caption": "mine"}]))

    def load(*columns: str) -> tuple[Any, str]:
        table, digest = load_rows(str(path), cache_dir=str(tmp_path), columns=columns)
        return table, table.path + digest

    table, both = load("a", "b")
    assert table[0]["columns"] == {"a": "1", "b": '"half a \ufffd pair"', "reference_units": None}
    assert load("b", "a")[1] == both
    assert len({both, load()[1], load("a")[1]}) == 3
    assert load("caption")[0][0]["columns"]["caption"] == '"mine"'  # no name is taken by the table itself
    assert load()[0][0]["captions"] == ["A caption."]


# ---- in batches


@pytest.fixture
def rows(make_images: Callable, row: Callable) -> list[dict]:
    """24 rows: every kind of value in a column of its own, each missing in every fifth row; one malformed."""
    rows = [row(name) for name in make_images(24)]
    for i, raw in enumerate(rows):
        raw |= {kind: value for k, (kind, value) in enumerate(VALUES.items()) if (i + k) % 5}
    rows[7]["text"] = ["not text"]
    return rows


def expected(rows: list[dict], name: str, batch: CaptionBatch) -> list[Any]:
    values = {raw["image"]: raw.get(name) for raw in rows}
    return [values[sample_id] for sample_id in batch.sample_ids]


def batches_of(data: CaptionDataModule, number: int) -> list[CaptionBatch]:
    batches: list[CaptionBatch] = []
    while len(batches) < number:  # one pass after the other
        for batch in islice(data.train_dataloader(), number - len(batches)):
            data.consumed(batch)
            batches.append(batch)
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_columns_reach_the_batches_and_a_resumed_run_goes_on(
    tmp_path: Path, make_data: Callable, rows: list[dict], workers: int
) -> None:
    settings = {"columns": list(VALUES), "num_workers": workers, "val_size": 4}
    whole = batches_of(make_data(rows, **settings), 5)
    for batch in whole:
        for name in VALUES:
            assert batch.extra(name) == expected(rows, name, batch)
        assert batch.extra("reference_units") == [None] * 4
        assert batch.extra("unheard of") == [None] * 4
        assert rows[7]["image"] not in batch.sample_ids
    first = make_data(rows, **settings)
    batches_of(first, 2)
    resumed = make_data(rows, **settings)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for before, after in zip(whole[2:], batches_of(resumed, 3), strict=True):
        assert (before.sample_ids, before.extras) == (after.sample_ids, after.extras)
    for batch in resumed.val_dataloader():
        assert batch.extra("list of objects") == expected(rows, "list of objects", batch)
        assert batch.select([2, 0]).extra("text") == [batch.extra("text")[2], batch.extra("text")[0]]
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert {(bad["row"], bad["cause"]) for bad in listed} <= {(7, "malformed_column")}


def test_other_columns_do_not_change_the_order(make_data: Callable, rows: list[dict]) -> None:
    plain = make_data(rows, val_size=4)
    typed = make_data(rows, val_size=4, columns=["text", "number"])
    assert plain.split.train.tolist() == typed.split.train.tolist()
    batches_of(plain, 1)
    typed.load_state_dict(plain.state_dict())
    assert batches_of(typed, 1)


def test_predictions_carry_columns_too(tmp_path: Path, make_data: Callable, rows: list[dict]) -> None:
    for raw in rows[:5]:
        del raw["conversations"]
    path = tmp_path / "predict.json"
    path.write_text(json.dumps(rows))
    data = make_data(
        [], data=None, predict_from=str(path), columns=["text", "list of objects"], num_workers=2
    )
    batches = list(data.predict_dataloader())
    assert sum(len(batch) for batch in batches) == 24
    rows[7]["text"] = None  # what is malformed is left out; the image can be captioned all the same
    for batch in batches:
        for name in ("text", "list of objects"):
            assert batch.extra(name) == expected(rows, name, batch)
    folder = make_data([], data=None, predict_from=str(tmp_path / "images"), columns=["text"])
    assert next(iter(folder.predict_dataloader())).extra("text") == [None] * 4


@pytest.mark.parametrize(
    ("name", "entry", "lacking"),
    [
        ("rubric", {"criterion": "It says so.", "weight": 2}, ""),
        ("rubric", {"criterion": "It says so.", "weight": "2"}, "a criterion, and a weight above 0"),
        ("rubric", {"criterion": "It says so.", "weight": True}, "a criterion, and a weight above 0"),
        ("rubric", {"criterion": "It says so.", "weight": float("inf")}, "a criterion, and a weight above 0"),
        ("rubric", {"weight": 2}, "a criterion, and a weight above 0"),
        ("questions", {"question": "Which?", "choices": ["a", "b"], "answer": "a"}, ""),
        ("questions", {"question": "Which?"}, ""),  # it is not asked
        ("questions", {"choices": ["a", "b"]}, "a question, and a list of choices"),
        ("questions", {"question": "Which?", "choices": "ab"}, "a question, and a list of choices"),
        ("mine", {"weight": "any"}, ""),
        ("rubric", "It says so.", None),
    ],
)
def test_questions_and_rubrics_are_looked_into(name: str, entry: Any, lacking: str | None) -> None:
    _, problem = Columns([name]).take({name: [entry]}, 0)
    if lacking is None:
        assert problem.startswith('column "rubric": expected list of objects, found list of texts')
    else:
        assert problem.startswith(f'column "{name}": an object lacks {lacking}') if lacking else problem == ""


def test_who_has_no_questions_is_told_who_writes_them() -> None:
    columns = Columns(["questions"])
    columns.take({"image": "a.png"}, 0)
    assert columns.unseen_message().endswith("; python main.py annotate --what questions writes them")
