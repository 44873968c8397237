"""The small parts: JSON in prose, prompts, parsers, counts."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from balcap.judge import Decompose, InvalidAnswer, JudgeStats, Match, Rate, Rating, Verdict, Verify
from balcap.judge.prompt import extract_json, fence, response_format
from balcap.judge.task import Schema


def test_ordinary_text_stays_readable():
    assert fence("caption", "Ein „Café“ – 猫 😀") == '<caption>\n"Ein „Café“ – 猫 😀"\n</caption>'


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        'Sure:\n```json\n{"a": 1}\n```\nDone {really}.',
        '<think>maybe {"a": 2}</think>{"a": 1}',
    ],
)
def test_one_object_is_found(text):
    assert extract_json(text) == {"a": 1}


@pytest.mark.parametrize(
    "text",
    ["", "no", '{"a": ', '[{"a": 1}, {"a": 2}]', '{"a": 1} {"a": 2}', '{"a":' * 100_000, "1" * 500_000],
)
def test_none_or_several_objects_are_invalid(text):
    with pytest.raises(InvalidAnswer):
        extract_json(text)


@given(st.text(alphabet='{}[]":,a1\\ ntrue'))
def test_no_text_crashes_the_search(text):
    try:
        found = extract_json(text)
    except InvalidAnswer:
        return
    assert isinstance(found, dict)


# ---- tasks


def test_messages_of_every_task_name_it_first():
    for task, messages in (
        (Decompose, Decompose().messages(["x"])),
        (Verify, Verify().messages(["x"], image=_png())),
        (Match, Match().messages([("y",)], units=["x"])),
        (Rate, Rate().messages(["x"])),
    ):
        assert messages[0]["content"].splitlines()[0] == f"Task: {task.name}"
        assert [message["role"] for message in messages] == ["system", "user"]
        assert messages[1]["content"][-1]["type"] == "text"


def test_fences_of_match():
    text = Match().messages([("a", "b"), ("c",)], units=["u"])[1]["content"][0]["text"]
    assert text == (
        '<reference_units>\n[{"id": 1, "text": "u"}]\n</reference_units>\n'
        '<captions>\n[{"id": 1, "assertions": ["a", "b"]}, {"id": 2, "assertions": ["c"]}]\n</captions>'
    )


def test_decompose_drops_empty_and_repeated_assertions():
    said = [" A cat. ", "", "A cat.", "A mat\ud800."]
    answer = Decompose().read({"captions": [{"id": 2, "assertions": []}, {"id": 1, "assertions": said}]})
    assert Decompose().parse(answer, ["x", "y"]) == [["A cat.", "A mat\ufffd."], []]


def test_verdicts_are_sorted_by_id():
    items = [{"id": 2, "true": False, "pointable": True}, {"id": 1, "true": True, "pointable": False}]
    answer = Verify().read({"verdicts": items, "reason": "an extra key is dropped"})
    assert Verify().parse(answer, ["a", "b"], image=b"") == [
        Verdict(True, False),
        Verdict(False, True),
    ]


@pytest.mark.parametrize("score", [-0.1, 10.1, float("nan"), float("inf")])
def test_ratings_out_of_range_are_invalid(score):
    answer = Rate().read({"captions": [{"id": 1, "clarity": 1, "fluency": score, "coherency": 1}]})
    with pytest.raises(InvalidAnswer, match="fluency"):
        Rate().parse(answer, ["x"])


def test_rating_is_scaled():
    # (8 + 6.5 + 2) / 10 / 3 = 0.55
    answer = Rate().read({"captions": [{"id": 1, "clarity": 8, "fluency": 6.5, "coherency": 2}]})
    assert Rate().parse(answer, ["x"]) == [Rating(0.8, 0.65, 0.2)]
    assert Rate().parse(answer, ["x"])[0].mean == pytest.approx(0.55)


@pytest.mark.parametrize("answer", [{}, {"captions": [{"id": 1}]}, {"captions": "x"}, {"captions": [1]}])
def test_answers_of_another_form_are_invalid(answer):
    with pytest.raises(InvalidAnswer, match="captions"):
        Match().read(answer)


@pytest.mark.parametrize(
    ("covered", "missing"),
    [([1], []), ([1, 2, 3], []), ([1, 1], [2]), ([1], [1, 2]), ([0, 1], [2]), ([], [])],
)
def test_coverage_that_does_not_hold_each_unit_once_is_invalid(covered, missing):
    answer = Match().read({"captions": [{"id": 1, "covered": covered, "missing": missing}]})
    with pytest.raises(InvalidAnswer, match="each of the 2 units once"):
        Match().parse(answer, [("a",)], units=["u", "v"])


def test_coverage_is_in_the_order_of_the_units():
    captions = [{"id": 2, "covered": [], "missing": [2, 1]}, {"id": 1, "covered": [2], "missing": [1]}]
    answer = Match().read({"captions": captions})
    assert Match().parse(answer, [("a",), ("b",)], units=["u", "v"]) == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("There is a dog.", "there is  a dog", True),
        ("A caf\u00e9.", "A cafe\u0301!", True),
        ("The sign reads US.", "The sign reads us.", False),
        ("There is a dog.", "There are dogs.", False),
    ],
)
def test_what_makes_two_assertions_one_question(one, other, same):
    assert (Verify().identity(one) == Verify().identity(other)) is same


@pytest.mark.parametrize("task", [Decompose, Verify, Match, Rate])
def test_schemas_are_strict(task):
    form = response_format(task.name, task.schema)["json_schema"]
    assert form["strict"] is True
    for schema in (form["schema"], *form["schema"].get("$defs", {}).values()):
        assert schema["additionalProperties"] is False
        assert set(schema["required"]) == set(schema["properties"])
        for field in schema["properties"].values():
            assert not {"minimum", "maximum", "default", "minItems"} & set(field)
    assert issubclass(task.schema, Schema)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


# ---- counts


def test_stats_subtract():
    one = JudgeStats(calls=3, failures=Counter({"rate": 2, "match": 1}), cost_usd=0.5)
    two = JudgeStats(calls=1, failures=Counter({"rate": 2}), cost_usd=0.25)
    assert one - two == JudgeStats(calls=2, failures=Counter({"match": 1}), cost_usd=0.25)
