"""Multiple-choice questions about scenes, and how a reader answers them from a caption alone."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from examples.shapes import scene as world
from examples.shapes.language import COUNTS, PLACE_PHRASES, Fact, article, read_facts
from examples.shapes.scene import Scene

PLACES = {phrases[0]: place for place, phrases in PLACE_PHRASES.items()}
MARKS = tuple(f"{colour} {kind}" for colour in world.MARK_COLOURS for kind in world.MARKS)
_CANNOT = re.compile("cannot answer", re.IGNORECASE)
_NAME = rf"(?P<colour>{'|'.join(world.COLOURS)}) (?P<shape>{'|'.join(world.SHAPES)})"
_FORMS = {
    "colour": re.compile(rf"What colour is the (?P<shape>{'|'.join(world.SHAPES)})\?"),
    "shape": re.compile(rf"Which shape is (?P<colour>{'|'.join(world.COLOURS)})\?"),
    "place": re.compile(rf"Where in the picture is the {_NAME}\?"),
    "size": re.compile(rf"How large is the {_NAME}\?"),
    "mark": re.compile(rf"Which tiny mark does the {_NAME} have\?"),
    "background": re.compile(r"What colour is the background\?"),
    "count": re.compile(r"How many shapes are there\?"),
    "there": re.compile(rf"Is there an? {_NAME}\?"),
}


def questions(
    scene: Scene, rng: np.random.Generator, most: int = 6, marks: bool = False
) -> list[dict[str, Any]]:
    """At most so many questions about a scene: ``question``, ``choices``, ``answer``, ``category``.

    Args:
        marks: whether they ask for marks as well.
    """
    everything = list(_questions(scene, rng))
    everything += list(_mark_questions(scene, rng)) if marks else []
    chosen = sorted(rng.permutation(len(everything))[:most].tolist())
    return [everything[place] for place in chosen]


def _questions(scene: Scene, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    shapes, colours = Counter(t.shape for t in scene.things), Counter(t.colour for t in scene.things)
    yield _question("What colour is the background?", "background", scene.background, world.BACKGROUNDS, rng)
    count = COUNTS[len(scene.things)]
    yield _question("How many shapes are there?", "count", count, COUNTS[1:6], rng)
    for thing in scene.things:
        name = f"{thing.colour} {thing.shape}"
        if shapes[thing.shape] == 1:
            text = f"What colour is the {thing.shape}?"
            yield _question(text, "colour", thing.colour, world.COLOURS, rng)
        if colours[thing.colour] == 1:
            yield _question(f"Which shape is {thing.colour}?", "shape", thing.shape, world.SHAPES, rng)
        where = PLACE_PHRASES[thing.place][0]
        yield _question(f"Where in the picture is the {name}?", "place", where, tuple(PLACES), rng)
        yield _question(f"How large is the {name}?", "size", thing.size, world.SIZES, rng)
        yield {
            "question": f"Is there {article(name)}?",
            "choices": ["Yes", "No"],
            "answer": "Yes",
            "category": "there",
        }
    absent = [
        (c, s)
        for c in world.COLOURS
        for s in world.SHAPES
        if (c, s) not in {(t.colour, t.shape) for t in scene.things}
    ]
    name = " ".join(absent[int(rng.integers(len(absent)))])
    yield {
        "question": f"Is there {article(name)}?",
        "choices": ["Yes", "No"],
        "answer": "No",
        "category": "there",
    }


def _mark_questions(scene: Scene, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for thing in scene.things:
        if thing.mark:
            text = f"Which tiny mark does the {thing.colour} {thing.shape} have?"
            yield _question(text, "mark", " ".join(thing.mark), MARKS, rng)


def _question(
    text: str, category: str, answer: str, values: Sequence[str], rng: np.random.Generator
) -> dict[str, Any]:
    others = [value for value in values if value != answer]
    wrong = [others[i] for i in rng.permutation(len(others))[:3]]
    choices = [*wrong, answer]
    return {
        "question": text,
        "choices": [choices[i] for i in rng.permutation(len(choices))],
        "answer": answer,
        "category": category,
    }


def choose(question: str, options: Sequence[str], caption: str) -> int:
    """The place of the option that a caption supports; "cannot answer", or a guess, where it does not say."""
    answer = _said(question, read_facts(caption))
    if answer is not None and answer in options:
        return list(options).index(answer)
    for place, option in enumerate(options):
        if _CANNOT.match(option):
            return place
    return hashlib.sha256(f"{caption}\n{question}".encode()).digest()[0] % len(options)


def _said(question: str, facts: Sequence[Fact]) -> str | None:
    """What the facts of a caption answer; the first of them that do."""
    kind, match = next(
        ((kind, match) for kind, form in _FORMS.items() if (match := form.fullmatch(question))), (None, None)
    )
    asked = match.groupdict() if match else {}
    objects = [fact[1] for fact in facts if fact[0] == "exists"]
    about = (asked.get("colour"), asked.get("shape"))
    match kind:
        case "colour":
            return next((colour for colour, shape in objects if shape == about[1] and colour), None)
        case "shape":
            return next((shape for colour, shape in objects if colour == about[0]), None)
        case "there":
            return "Yes" if about in objects else "No"
        case "place":
            place = next((fact[2] for fact in facts if fact[:2] == ("place", about)), None)
            return place and PLACE_PHRASES[place][0]
        case "size":
            return next((fact[2] for fact in facts if fact[:2] == ("size", about)), None)
        case "mark":
            return next((" ".join(fact[2:]) for fact in facts if fact[:2] == ("mark", about)), None)
        case "background":
            return next((fact[1] for fact in facts if fact[0] == "background"), None)
        case "count":
            number = next((fact[1] for fact in facts if fact[0] == "count"), None)
            return number and COUNTS[number]
    return None
