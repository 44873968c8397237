"""Each task's answers: written by `encode`, read back by the parser; and its example."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balcap.judge import Decompose, Match, Rate, Rating, Recaption, Task, Verdict, Verify
from balcap.judge.tasks import Assertion, DecomposeSpans, MatchSpans

CAPTION = (
    "Two small brown dogs run on a wide beach. The sky is grey and the sea behind them is calm. " * 3
).strip()
ITEMS: list[tuple[type[Task[Any]], list[Any], dict[str, Any]]] = [
    (Decompose, [CAPTION, "A cat."], {}),
    (DecomposeSpans, [CAPTION, "A cat."], {}),
    (Verify, ["There is a cat.", "The cat is black."], {"image": b"image"}),
    (Match, [("There is a cat.",), ("There is a dog.", "It is old.")], {"units": ("a", "b", "c")}),
    (MatchSpans, [("There is a cat.",), ("There is a dog.", "It is old.")], {"units": ("a", "b", "c")}),
    (Rate, [CAPTION, "A cat."], {}),
    (Recaption, ["Describe it.", "Describe it in detail."], {"image": b"image"}),
]
ANSWERS: dict[type[Task[Any]], list[Any]] = {
    Decompose: [["There is a cat.", 'A "sign".'], []],
    DecomposeSpans: [[Assertion("The dogs are small.", "small", 4), Assertion('There is "a".')], []],
    Verify: [Verdict(True, False), Verdict(False, True)],
    Match: [[True, False, True], [False] * 3],
    MatchSpans: [[[0], None, []], [None, [0, 1], None]],
    Rate: [Rating(1.0, 0.5, 0.0), Rating(0.123, 0.65, 0.7)],
    Recaption: ["A cat.", "A cat\nand a dog."],
}


def read_back(task: Task[Any], answers: list[Any], items: list[Any], context: dict[str, Any]) -> list[Any]:
    text = json.dumps(task.encode(answers))
    return task.parse(task.read(json.loads(text)), items, **context)


@pytest.mark.parametrize(("kind", "items", "context"), ITEMS)
def test_what_a_task_encodes_it_reads_back(kind, items, context):
    assert read_back(kind(), ANSWERS[kind], items, context) == ANSWERS[kind]


@pytest.mark.parametrize(("kind", "items", "context"), ITEMS)
def test_examples_are_answers_about_these_items(kind, items, context):
    example = kind().example(items, **context)
    assert example == kind().example(items, **context)
    assert len(example) == len(items)
    assert read_back(kind(), example, items, context) == example


def test_an_example_has_the_size_of_a_real_answer():
    (assertions, few) = Decompose().example([CAPTION, "A cat."])
    words = len(CAPTION.split())
    assert len(assertions) <= round(words / 4.1)  # repeated sentences assert nothing again
    assert few == ["A cat."]
    long = " ".join(f"word{number}" for number in range(217))
    assert len(Decompose().example([long])[0]) == 53  # 217 words / 4.1, as DeCapBench counts


def test_a_task_may_do_without():
    class Bare(Rate):
        encode, example = Task.encode, Task.example

    with pytest.raises(NotImplementedError, match="Bare has no encode"):
        Bare().encode([])
    with pytest.raises(NotImplementedError, match="Bare has no example"):
        Bare().example([])
