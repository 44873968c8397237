"""Assertions with the words that they come from: quotes are found, never invented; nobody else notices."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balcap.judge import Group, InvalidAnswer, Judge
from balcap.judge.images import ImagePolicy
from balcap.judge.prompt import Question, Route
from balcap.judge.tasks import Assertion, Decompose, DecomposeSpans, Match, Rate, Verify
from balcap.judge.tasks.decompose import find_quotes
from examples.shapes.captions import flawed, reference
from examples.shapes.language import read_facts, say
from examples.shapes.scene import draw_scene, png_bytes, sample_scene


def test_prompt_and_keys_of_decompose_are_those_of_its_version() -> None:
    task, routes = Decompose(), [Route("openai/gpt-4o-mini", {})]
    prompt = json.dumps(task.messages(["Two dogs."]))
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == "1e0d5ef81fe41956"
    (key,) = Question(task, {}, routes, ImagePolicy(), ["Two dogs."]).keys("Two dogs.")
    assert key[:16] == "221d1742de02da90"
    (other,) = Question(DecomposeSpans(), {}, routes, ImagePolicy(), ["Two dogs."]).keys("Two dogs.")
    assert other != key


@pytest.mark.parametrize(
    ("text", "quotes", "found"),
    [
        ("A red dog.", ["red"], ["red"]),
        ("A hundred red dogs.", ["red"], [(10, 13)]),  # a whole word
        ("A hundred dogs.", ["red"], [None]),
        ("A red cup, a red hat.", ["red", "red"], [(2, 5), (13, 16)]),  # the first that is not yet taken
        ("A red hat.", ["red", "red"], [(2, 5), (2, 5)]),
        ("Red and red.", ["red"], [(8, 11)]),  # letter by letter comes first
        ("On a  wide\nbeach.", ["on a wide beach"], [(0, 16)]),
        ("A red dog.", ["blue", "", "  ", "red dog runs"], [None] * 4),
        ("A dog.", ["dog."], ["dog."]),
        ("(a) b+", ["(a) b+"], ["(a) b+"]),  # nothing is a pattern
        ("一只红色的狗", ["红色"], ["红色"]),  # no spaces between words
        ("Ein Straßenhund", ["hund"], [None]),
    ],
)
def test_quotes_are_found_as_they_stand(text: str, quotes: list[str], found: list[Any]) -> None:
    spans = find_quotes(text, quotes)
    assert spans == [text_span(text, one) if isinstance(one, str) else one for one in found]


def text_span(text: str, words: str) -> tuple[int, int]:
    return text.index(words), text.index(words) + len(words)


letters = "abABé \n"


@given(st.text(letters, max_size=40), st.lists(st.text(letters, max_size=4), max_size=5), st.data())
def test_a_span_holds_what_was_quoted(text: str, quotes: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    quotes = [*quotes, text[start : data.draw(st.integers(start, len(text)))]]
    for quote, span in zip(quotes, find_quotes(text, quotes), strict=True):
        if span is not None:
            assert text[slice(*span)].lower().split() == quote.lower().split() != []


def test_words_that_the_caption_does_not_hold_are_dropped() -> None:
    entries = [
        ["red", "The dog is red. "],
        ["red dog", "The dog is red."],  # said twice: the first counts
        ["brown", "The dog is brown."],
        ["", "There is a dog."],
        ["A", " "],
    ]
    task = DecomposeSpans()
    answer = task.read({"captions": [{"id": 1, "assertions": entries}]})
    ((red, brown, dog),) = task.parse(answer, ["A red dog."])
    assert red == Assertion("The dog is red.", "red", 2)
    assert red.span == (2, 5)
    assert [brown, dog] == [Assertion("The dog is brown."), Assertion("There is a dog.")]
    assert brown.span is None
    answer = task.read({"captions": [{"id": 1, "assertions": [["red", "The dog is red.", "true"]]}]})
    with pytest.raises(InvalidAnswer, match="is not a pair of words and an assertion"):
        task.parse(answer, ["A red dog."])
    assert task.load(task.dump([red, brown])) == [red, brown]


class Listening(Judge):
    """The oracle, and which tasks it was asked about what."""

    def __init__(self) -> None:
        super().__init__("shapes/oracle", providers={"shapes": "examples.shapes.oracle.Oracle"}, cache=None)
        self.asked: list[tuple[str, Any]] = []

    async def ask(self, task: Any, items: Any, *args: Any, **context: Any) -> Any:
        self.asked += [(task.name, item) for item in items]
        return await super().ask(task, items, *args, **context)


def test_where_spans_are_asked_all_other_judgments_are_the_same() -> None:
    rng = np.random.default_rng(3)
    scene = sample_scene(rng)
    picture = png_bytes(draw_scene(scene, rng), scene)
    captions = [flawed(scene, rng) for _ in range(4)]
    told = reference(scene, rng)
    judge = Listening()

    def judged(*more: Any) -> Any:
        judge.asked.clear()
        group = Group(judge, "a", (picture,), told, captions)
        return judge.run(group.judgments((Verify, Match, Rate, *more)))

    plain = judged()
    assert {item for name, item in judge.asked if name == "decompose"} == {told, *captions}
    quoted = judged(DecomposeSpans)
    assert [item for name, item in judge.asked if name == "decompose"] == [told]
    assert {name: quoted[name] for name in plain.answers} == dict(plain.answers)
    assert quoted.units == plain.units
    for caption, assertions in zip(captions, quoted["decompose_spans"][0], strict=True):
        assert [one.text for one in assertions] == [say(fact) for fact in read_facts(caption)]
        assert all(caption[slice(*one.span)] == one.words for one in assertions)
    judge.close()
