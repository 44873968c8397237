"""The questions that benchmarks ask: what is shown, what is read, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from balcap.judge import InvalidAnswer
from balcap.judge.prompt import response_format
from balcap.judge.task import Task
from balcap.judge.tasks import Answer, Compare, ExtractFacts, Fact, MatchFacts, VerifyFacts

QUESTIONS = [
    {"question": "What colour?", "options": ["red", "blue"]},
    {"question": "How many?", "options": ["1", "2"]},
]
FACTS = [{"facts": ["There is a dog.", "It is brown.", "It is happy."], "draw": 0}]
IMAGE = {"image": b"png", "reference": "A brown dog."}
CASES: list[tuple[type[Task[Any]], list[Any], dict[str, Any], list[Any]]] = [
    (Answer, QUESTIONS, {"caption": "A red dog."}, [0, 1]),
    (Compare, [["A dog.", "A cat."]], IMAGE, ["first"]),
    (
        ExtractFacts,
        ["A brown dog.", "A cat."],
        {},
        [[Fact("There is a dog.", True)], [Fact("It feels calm.", False)]],
    ),
    (MatchFacts, FACTS, {"annotated": ["a dog", "brown"]}, [[0, 1, None]]),
    (VerifyFacts, FACTS, IMAGE, [[True, True, False]]),
]
BY_TASK = pytest.mark.parametrize(
    ("task", "items", "context", "answers"), CASES, ids=lambda v: getattr(v, "name", "")
)


@BY_TASK
def test_what_is_encoded_is_read_back(
    task: Any, items: list[Any], context: dict[str, Any], answers: list[Any]
) -> None:
    one = task()
    assert one.parse(one.read(one.encode(answers)), items, **context) == answers
    for answer in answers:
        assert one.load(one.dump(answer)) == answer
    example = one.example(items, **context)
    assert one.parse(one.read(one.encode(example)), items, **context) == example


@BY_TASK
def test_what_is_judged_stays_in_its_fence(
    task: Any, items: list[Any], context: dict[str, Any], answers: list[Any]
) -> None:
    messages = task().messages(items, **context)
    assert messages[0]["content"].startswith(f"Task: {task.name}\n")
    assert response_format(task.name, task.schema)["json_schema"]["strict"] is True
    has_image = messages[1]["content"][0]["type"] == "image"
    assert has_image == ("image" in context)


def test_no_fact_and_equal_captions_need_no_call() -> None:
    assert ExtractFacts().known(" ") == []
    assert VerifyFacts().known({"facts": [], "draw": 1}, **IMAGE) == []
    assert MatchFacts().known({"facts": ["a"], "draw": 0}, annotated=[]) == [None]
    assert MatchFacts().known(FACTS[0], annotated=["a"]) is None
    assert Compare().known(["A dog.", "A dog."], **IMAGE) == "tie"


def test_draws_are_different_questions() -> None:
    task = MatchFacts()
    assert task.identity(FACTS[0]) != task.identity({**FACTS[0], "draw": 1})
    assert task.messages(FACTS, annotated=["a"]) == task.messages([{**FACTS[0], "draw": 1}], annotated=["a"])


@pytest.mark.parametrize("option", ["A", "a", " (A) ", "A. red", '"a"', "red"])
def test_letters_as_judges_write_them(option: str) -> None:
    answer = Answer().read({"answers": [{"id": 1, "option": option}]})
    assert Answer().parse(answer, QUESTIONS[:1], caption="A red dog.") == [0]


@pytest.mark.parametrize(
    ("task", "answer", "items", "context", "why"),
    [
        (Answer, {"answers": [{"id": 1, "option": "C"}]}, QUESTIONS[:1], {"caption": ""}, "no option 'C'"),
        (
            Answer,
            {"answers": [{"id": 1, "option": "black"}]},
            QUESTIONS[:1],
            {"caption": ""},
            "no option 'black'",
        ),
        (
            Answer,
            {"answers": [{"id": 1, "option": "A or B"}]},
            QUESTIONS[:1],
            {"caption": ""},
            "no option 'A or B'",
        ),
        (Answer, {"answers": [{"id": 1, "option": ""}]}, QUESTIONS[:1], {"caption": ""}, "no option ''"),
        (
            MatchFacts,
            {"matches": [{"id": 1, "match": 3}, {"id": 2, "match": None}, {"id": 3, "match": 1}]},
            FACTS,
            {"annotated": ["a", "b"]},
            "annotated facts 1 to 2, not 3",
        ),
        (VerifyFacts, {"verdicts": [{"id": 1, "true": True}]}, FACTS, IMAGE, "ids 1 to 3"),
    ],
)
def test_answers_that_do_not_fit(
    task: type[Task[Any]], answer: Any, items: list[Any], context: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidAnswer, match=why):
        task().parse(task().read(answer), items, **context)
