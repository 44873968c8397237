"""What is in a picture, and its pixels: one to five objects on a 3 x 3 grid of places, and a background."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

RGB = {  # nine colours of things, then four of backgrounds
    "red": (214, 40, 40), "green": (46, 160, 60), "blue": (40, 80, 220), "yellow": (245, 220, 50),
    "orange": (245, 135, 30), "purple": (130, 50, 170), "pink": (250, 150, 200), "white": (250, 250, 250),
    "black": (20, 20, 20), "grey": (150, 150, 150), "beige": (225, 205, 170), "teal": (30, 130, 135),
    "brown": (115, 75, 45),
}  # fmt: skip
COLOURS, BACKGROUNDS = tuple(RGB)[:9], tuple(RGB)[9:]
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = ("small", "large")
PLACES = (
    "top left", "top middle", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
MARK_COLOURS = ("white", "black")
MARKS = ("dot", "stripe", "ring")
OBJECT_COUNT_WEIGHTS = (0.22, 0.3, 0.24, 0.14, 0.1)  # 1..5 objects; few, so that captions stay short
MARKED = 0.6  # share of objects with a mark

FILE_SIZE = 168  # pixels a side on disk; the base policy sees 84
SCALE = 3  # supersampling, for anti-aliasing
RADIUS = {"small": 0.24, "large": 0.42}  # of a cell's side
CORNERS: dict[str, list[tuple[float, float]]] = {  # (right, down) from a shape's middle, in units of its radius
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "cross": [(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
              (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)],
    "star": [(far * math.cos(angle), far * math.sin(angle))
             for i, far in enumerate([1.1, 1.1 * 0.42] * 5) for angle in [math.pi * i / 5 - math.pi / 2]],
}  # fmt: skip


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
        """The text in the PNG's ``scene`` chunk."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Scene:
        """Inverse of `to_json`; ValueError or KeyError on anything else."""
        raw = json.loads(text)
        things = (Thing(**{**t, "mark": tuple(t["mark"]) if t["mark"] else None}) for t in raw["things"])
        return Scene(tuple(things), raw["background"])


def sample_scene(
    rng: np.random.Generator, counts: Sequence[float] = OBJECT_COUNT_WEIGHTS, marked: float = MARKED
) -> Scene:
    """Draw a scene: 1-5 things with distinct places and distinct (colour, shape).

    Args:
        counts: shares of scenes with 1, 2, … things.
        marked: share of things with a mark.
    """
    n = 1 + int(rng.choice(len(counts), p=counts))
    places = rng.choice(len(PLACES), size=n, replace=False)
    kinds = rng.choice(len(COLOURS) * len(SHAPES), size=n, replace=False)
    things = []
    for place, kind in zip(sorted(places), kinds, strict=True):
        colour, shape = COLOURS[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)]
        mark = (str(rng.choice(MARK_COLOURS)), str(rng.choice(MARKS))) if rng.random() < marked else None
        things.append(Thing(colour, shape, str(rng.choice(SIZES)), PLACES[place], mark))
    return Scene(tuple(things), str(rng.choice(BACKGROUNDS)))


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


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """RGB picture of ``FILE_SIZE`` pixels a side, never the same twice: place, size and shade vary, noise is added."""
    side = FILE_SIZE * SCALE
    canvas = Image.new("RGB", (side, side), _shade(scene.background, 5, rng))
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, rng)
    small = np.asarray(canvas.resize((FILE_SIZE, FILE_SIZE), Image.Resampling.BOX), dtype=np.int16)
    noise = rng.normal(0, 4, size=(FILE_SIZE, FILE_SIZE, 1))
    return Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))


def _shade(colour: str, spread: float, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(np.clip(c + rng.normal(0, spread), 0, 255)) for c in RGB[colour])


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: np.random.Generator) -> None:
    cell = FILE_SIZE * SCALE / 3
    row, col = row_and_column(thing.place)
    r = RADIUS[thing.size] * cell * rng.uniform(0.92, 1.08)
    slack = min(max(0.0, cell / 2 - r * 1.1), cell * 0.14)
    x = (col + 0.5) * cell + rng.uniform(-1, 1) * slack
    y = (row + 0.5) * cell + rng.uniform(-1, 1) * slack
    fill = _shade(thing.colour, 6, rng)
    edge = (235, 235, 235) if thing.colour == "black" else (25, 25, 25)
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=edge, width=SCALE)
    else:
        points = [(x + r * right, y + r * down) for right, down in CORNERS[thing.shape]]
        draw.polygon(points, fill=fill, outline=edge, width=SCALE)
    if thing.mark:
        _draw_mark(draw, thing.mark, x, y)


def _draw_mark(draw: ImageDraw.ImageDraw, mark: tuple[str, str], x: float, y: float) -> None:
    """A detail of about four file pixels: two for the policy, after the processor has resized."""
    colour, kind = mark
    r, fill = 2.0 * SCALE, RGB[colour]
    if kind == "dot":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif kind == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=SCALE)
    else:
        draw.rectangle((x - r * 1.3, y - r * 0.4, x + r * 1.3, y + r * 0.4), fill=fill)


def png_bytes(image: Image.Image, scene: Scene) -> bytes:
    """PNG file with the scene in its ``scene`` text chunk, which no policy sees."""
    info, out = PngInfo(), io.BytesIO()
    info.add_text("scene", scene.to_json())
    image.save(out, format="PNG", pnginfo=info, compress_level=3)
    return out.getvalue()


def scene_of(data: bytes) -> Scene:
    """The scene in a PNG's text chunk; ValueError where there is none."""
    with Image.open(io.BytesIO(data)) as image:
        text = image.info.get("scene")
    if not isinstance(text, str):
        raise ValueError(
            "this image carries no scene: shapes/oracle judges pictures of the embedded world only"
        )
    return Scene.from_json(text)
