"""What is in a picture: one to five objects on a 3 x 3 grid of places, and a background."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = ("small", "large")
PLACES = (
    "top left", "top middle", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
BACKGROUNDS = ("grey", "beige", "teal", "brown")
MARK_COLOURS = ("white", "black")
MARKS = ("dot", "stripe", "ring")
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")

OBJECT_COUNT_WEIGHTS = (0.22, 0.3, 0.24, 0.14, 0.1)  # 1..5 objects; few, so that captions stay short


@dataclass(frozen=True)
class Thing:
    """One object. `mark` is a detail too small to be read reliably at the policy's resolution."""

    colour: str
    shape: str
    size: str
    place: str
    mark: tuple[str, str] | None = None  # (colour, kind), as in ("white", "dot")


@dataclass(frozen=True)
class Scene:
    """A picture's truth. No two things share a place, nor both colour and shape."""

    things: tuple[Thing, ...]
    background: str

    def to_json(self) -> str:
        """The text that rides in the PNG's ``scene`` chunk."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Scene:
        """Inverse of `to_json`; ValueError or KeyError on anything else."""
        raw = json.loads(text)
        things = tuple(
            Thing(**{**thing, "mark": tuple(thing["mark"]) if thing["mark"] else None})
            for thing in raw["things"]
        )
        return Scene(things, raw["background"])


def row_and_column(place: str) -> tuple[int, int]:
    """(row, column) of a place on the 3 x 3 grid, each 0..2."""
    return divmod(PLACES.index(place), 3)


def relation(a: str, b: str) -> str | None:
    """How a thing at place `a` lies towards one at `b`: the longer axis decides, a tie says nothing."""
    (row_a, col_a), (row_b, col_b) = row_and_column(a), row_and_column(b)
    down, right = row_a - row_b, col_a - col_b
    if abs(down) == abs(right):
        return None
    if abs(down) > abs(right):
        return "below" if down > 0 else "above"
    return "right of" if right > 0 else "left of"


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: 1-5 things with distinct places and distinct (colour, shape)."""
    n = 1 + int(rng.choice(len(OBJECT_COUNT_WEIGHTS), p=OBJECT_COUNT_WEIGHTS))
    places = rng.choice(len(PLACES), size=n, replace=False)
    kinds = rng.choice(len(COLOURS) * len(SHAPES), size=n, replace=False)
    things = []
    for place, kind in zip(sorted(places), kinds, strict=True):
        colour, shape = COLOURS[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)]
        mark = (str(rng.choice(MARK_COLOURS)), str(rng.choice(MARKS))) if rng.random() < 0.6 else None
        things.append(Thing(colour, shape, str(rng.choice(SIZES)), PLACES[place], mark))
    return Scene(tuple(things), str(rng.choice(BACKGROUNDS)))
