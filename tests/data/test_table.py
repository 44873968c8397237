"""ShareGPT4V JSON -> flat rows, whatever is in it."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcap.data import table as table_module
from balcap.data.json_files import DataError, parse_rows
from balcap.data.layouts import normalise
from balcap.data.table import Table, flat_rows, load_rows, raw_rows

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["image", "conversations", "from", "value", "caption", "content", "reference_units"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def test_a_row_becomes_flat_columns(row: Callable) -> None:
    flat = normalise(row("coco/a.jpg", " A cat. ", "What is it?\n<image>"), 3)
    assert flat == {
        "row": 3,
        "sample_id": "coco/a.jpg",
        "question": "What is it?",
        "first": 3,
        "captions": ["A cat."],
        "problem": "",
        "detail": "",
        "columns": {},
    }
    assert normalise(row("coco/a.jpg", question="<image>\nWhat is it?"), 0)["question"] == "What is it?"


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (17, "malformed_row"),
        (None, "malformed_row"),
        ({}, "no_image_field"),
        ({"image": None}, "no_image_field"),
        ({"image": "  "}, "no_image_field"),
        ({"image": {"bytes": 1}}, "no_image_field"),
        ({"image": "a.jpg"}, "no_caption"),
        ({"image": "a.jpg", "conversations": []}, "no_caption"),
        ({"image": "a.jpg", "conversations": "hello"}, "malformed_row"),
        ({"image": "a.jpg", "conversations": ["hello"]}, "malformed_row"),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}]}, "no_caption"),
        ({"image": "a.jpg", "conversations": [{"from": "gpt", "value": 5}]}, "malformed_row"),
        ({"image": ["a.jpg", "b.jpg"], "query": "<image>?", "caption": "A cat."}, "placeholder_mismatch"),
        ({"image": ["a.jpg", " "], "caption": "A cat."}, "no_image_field"),
        ({"image": "a.jpg", "caption": 5}, "malformed_row"),
    ],
)
def test_causes(raw: object, cause: str) -> None:
    flat = normalise(raw, 0)
    assert flat["problem"] == cause
    assert flat["detail"]


def test_causes_in_the_text(row: Callable) -> None:
    assert normalise(row("a.jpg", question="x" * 10_001), 0)["problem"] == "text_too_long"
    assert normalise(row("a.jpg", caption=" "), 0)["problem"] == "no_caption"
    assert normalise(row("a.jpg", caption="caf\ufffd"), 0)["problem"] == "not_utf8"
    assert normalise(row("a\ud800.jpg"), 0)["problem"] == "not_utf8"


@given(json_values)
def test_no_row_whatsoever_breaks_the_table(raw: object) -> None:
    (flat,) = flat_rows([raw])
    columns = flat.pop("columns")
    assert list(columns) == ["reference_units"]
    assert [type(v) for v in flat.values()] == [int, int, str, str, str, str, list]
    assert "".join(str(v) for v in [*flat.values(), *columns.values()]).encode()  # Arrow stores UTF-8


def test_raw_rows_are_those_of_the_table(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.json"
    rows = [{**row("a.jpg"), "mine": 1}, 17, row("a.jpg")]
    path.write_text(json.dumps(rows))
    raw, digest = raw_rows(str(path))
    table, same = load_rows(str(path), cache_dir=str(tmp_path / "cache"))
    assert (list(raw), digest) == (rows, same)
    assert len(table) == 3


def test_a_table_of_an_earlier_format_is_not_read(
    tmp_path: Path, row: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "rows.json", str(tmp_path / "cache")
    path.write_text(json.dumps([row("a.jpg")]))
    monkeypatch.setattr(table_module, "_FORMAT", table_module._FORMAT - 1)
    earlier, digest = load_rows(str(path), cache_dir=cache)
    monkeypatch.undo()
    now, same = load_rows(str(path), cache_dir=cache)
    assert earlier.path != now.path
    assert digest == same  # checkpoints know the data set by it, and go on


def test_good_rows_of_one_image_know_the_first(row: Callable) -> None:
    rows = [row("a.jpg", caption=""), row("a.jpg"), row("b.jpg"), row("./a.jpg"), row("x//../a.jpg")]
    table = Table.of(flat_rows(rows))
    assert table.column("first") == [0, 1, 2, 1, 1]
    assert table.same_image(1) == [1, 3, 4]
    assert table.same_image(2) == [2]


@given(st.lists(json_values, max_size=6), st.sampled_from([None, 1]))
def test_an_array_is_parsed_as_json_does(
    tmp_path_factory: pytest.TempPathFactory, rows: list, indent: int | None
) -> None:
    rows = rows or [1]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent))
    assert list(parse_rows(path)) == rows


def test_json_lines_cost_only_the_broken_line(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row("a.jpg")), "{broken", "", json.dumps(row("b.jpg"))]))
    flat = list(flat_rows(parse_rows(path)))
    assert [r["problem"] for r in flat] == ["", "malformed_row", ""]
    assert "line 2" in flat[1]["detail"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("hello", "starts with 'hello'"),
        ('{\n "rows": []}', "expected a JSON array"),
        ('[{"image": "a"},\n {"image": "b"', "in row 1.*line 2 column 15.*breaks off"),
        ('[{"image": "a"}, {"image" "b"}]', "in row 1.*line 1 column 27.*Fix that place"),
        ('[{"image": "a"} {"image": "b"}]', "expected ',' or ']' after row 0"),
        ('[{"image": "a"}] trailing]', "after the end of the array"),
        ("[" + "[" * 100_000, "not valid JSON"),
        ("[]", "is an empty array"),
        ('{"images": [{"id": 1}], "annotations": [{"bbox": []}]}', "images without captions"),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(path), cache_dir=str(tmp_path / "cache"))
    assert str(caught.value).startswith(f"data.data: {path}")


def test_bytes_that_are_not_utf8_cost_their_row(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.json"
    text = json.dumps([row("a.jpg"), row("b.jpg", "caf@"), row("c.jpg")]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"@", b"\xe9"))
    table, _ = load_rows(str(path), cache_dir=str(tmp_path / "cache"))
    assert table.column("problem") == ["", "not_utf8", ""]
    assert table.column("sample_id") == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path: Path, row: Callable) -> None:
    path, cache = tmp_path / "rows.json", str(tmp_path / "cache")
    path.write_text(json.dumps([row("a.jpg")]))
    stat = path.stat()
    first, digest = load_rows(str(path), cache_dir=cache)
    again, same = load_rows(str(path), cache_dir=cache)
    assert (first.path, digest) == (again.path, same)
    path.write_text(json.dumps([row("b.jpg")]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time: only the content tells
    changed, other = load_rows(str(path), cache_dir=cache)
    assert changed.column("sample_id") == ["b.jpg"]
    assert other != digest


def _load_in_process(path: str, cache: str, queue: multiprocessing.Queue) -> None:
    queue.put(load_rows(path, cache_dir=cache)[0].column("sample_id"))


def test_several_ranks_may_start_at_once(tmp_path: Path, row: Callable) -> None:
    path, cache = tmp_path / "rows.json", str(tmp_path / "cache")
    names = [f"{i}.jpg" for i in range(3000)]
    path.write_text(json.dumps([row(name) for name in names]))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_load_in_process, args=(str(path), cache, queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert [queue.get(timeout=60) for _ in ranks] == [names] * 3
    for rank in ranks:
        rank.join()


def test_a_hub_id_is_loaded_with_its_configuration(
    tmp_path: Path, row: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def fake_load_dataset(path: str, name: str | None, split: str, cache_dir: str | None) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([row("coco/a.jpg", "A cat."), row("coco/a.jpg")])

    monkeypatch.setattr(datasets, "load_dataset", fake_load_dataset)
    table, digest = load_rows("Lin-Chen/ShareGPT4V", "ShareGPT4V", cache_dir=str(tmp_path))
    assert asked == [("Lin-Chen/ShareGPT4V", "ShareGPT4V", "train")]
    assert table.column("first") == [0, 0]
    assert table[0]["captions"] == ["A cat."]
    assert digest


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"data\.data: no file 'a/b' here.*no route.*give its path"):
        load_rows("a/b")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a.jpg")]))
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"data\.cache_dir: cannot write"):
        load_rows(str(path), cache_dir=str(tmp_path / "cache"))


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────────

ASK = "<image>\nWhat is it?"
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": "A cat."}]
PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
SAID = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    "raw",
    [
        {"images": ["a.jpg"], "messages": TURNS},
        {"images": "a.jpg", "messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
        {"image": ["./a.jpg"], "conversations": TURNS},
        {"images": [{"path": "a.jpg", "bytes": None}], "messages": TURNS},
        {"image": "a.jpg", "messages": [{"role": "user", "content": PARTS}, TURNS[1]]},
        {"images": ["a.jpg"], "query": "What is it?", "response": "A cat."},
        {"images": ["a.jpg"], "instruction": ASK, "input": "", "output": "A cat."},
        {"file_name": "a.jpg", "question": "What is it?", "text": "A cat."},
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "What is it?"}, TURNS[1]]},
        {"image": "a.jpg", "conversations": [*SAID, {"from": "human", "value": ASK}, TURNS[1]]},
    ],
)
def test_the_usual_layouts_are_read(raw: dict) -> None:
    flat = normalise(raw, 0)
    assert (flat["problem"], flat["sample_id"], flat["question"]) == ("", "a.jpg", "What is it?")
    assert flat["captions"] == ["A cat."]


def test_coco_and_flickr30k_are_several_captions_of_an_image(tmp_path: Path) -> None:
    coco = {
        "info": {},
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": i, "caption": c} for i, c in ((7, "One."), (8, "Two."), (7, "Three."), (9, "Four."))
        ],
    }
    karpathy = {
        "images": [{"filename": "a.jpg", "filepath": "val", "sentences": [{"raw": "One."}, {"raw": "Two."}]}]
    }
    for name, data in (("coco", coco), ("karpathy", karpathy)):
        (tmp_path / name).write_text(json.dumps(data, indent=1))
    table = Table.of(flat_rows(parse_rows(tmp_path / "coco")))
    assert [table[i]["captions"] for i in table.same_image(0)] == [["One."], ["Three."]]
    assert table.column("problem") == ["", "", "", "no_image_field"]
    (flat,) = flat_rows(parse_rows(tmp_path / "karpathy"))
    assert (flat["sample_id"], flat["captions"]) == ("val/a.jpg", ["One.", "Two."])


def test_small_mistakes_of_json_are_read(tmp_path: Path, row: Callable) -> None:
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    text = json.dumps(row("a.jpg", "A\u2028cat\x85."), ensure_ascii=False)
    lines.write_text(f"{text},\n{text},\n")
    array.write_bytes(f"[{text}, {text},\n]".encode("utf-16"))
    expected = [row("a.jpg", "A\u2028cat\x85.")] * 2
    assert list(parse_rows(lines)) == list(parse_rows(array)) == expected


def test_what_cannot_be_parsed_in_one_row_is_that_rows_fault(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.json"
    deep = '{"image": "b.jpg", "x": "]", "y": ' + "[" * 90_000 + "]" * 90_000 + "}"
    long = json.dumps(row("c.jpg")).replace('"7"', "7" * 5000)
    path.write_text(f"[{json.dumps(row('a.jpg'))}, {deep}, {long}]")
    problems = [(flat["problem"], flat["detail"]) for flat in flat_rows(parse_rows(path))]
    assert problems == [("", ""), ("malformed_row", "nested too deeply"), ("", "")]


def test_a_table_opens_in_another_process(tmp_path: Path, row: Callable) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("a.jpg")]))
    table, _ = load_rows(str(path), cache_dir=str(tmp_path / "cache"))
    assert len(pickle.dumps(table)) < 500
    assert pickle.loads(pickle.dumps(table))[0] == table[0]
