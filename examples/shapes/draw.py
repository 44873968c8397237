"""From a scene to pixels, never the same twice: jitter of place and size, shade and noise."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from examples.shapes.scene import Scene, Thing, row_and_column

FILE_SIZE = 168  # pixels a side on disk; the base policy sees 84
SCALE = 3  # supersampling, for anti-aliasing

RGB = {
    "red": (214, 40, 40),
    "green": (46, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 50),
    "orange": (245, 135, 30),
    "purple": (130, 50, 170),
    "pink": (250, 150, 200),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "grey": (150, 150, 150),
    "beige": (225, 205, 170),
    "teal": (30, 130, 135),
    "brown": (115, 75, 45),
}
RADIUS = {"small": 0.24, "large": 0.42}  # of a cell's side


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corner points of a shape of radius `r` around (x, y)."""
    if shape == "square":
        return [(x - r * 0.85, y - r * 0.85), (x + r * 0.85, y - r * 0.85),
                (x + r * 0.85, y + r * 0.85), (x - r * 0.85, y + r * 0.85)]  # fmt: skip
    if shape == "diamond":
        return [(x, y - r * 1.1), (x + r * 0.75, y), (x, y + r * 1.1), (x - r * 0.75, y)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)]
    if shape == "cross":
        a, b = r, r * 0.34
        return [(x - b, y - a), (x + b, y - a), (x + b, y - b), (x + a, y - b), (x + a, y + b), (x + b, y + b),
                (x + b, y + a), (x - b, y + a), (x - b, y + b), (x - a, y + b), (x - a, y - b), (x - b, y - b)]  # fmt: skip
    angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]  # star
    return [(x + r * 1.1 * (1 if i % 2 == 0 else 0.42) * math.cos(a),
             y + r * 1.1 * (1 if i % 2 == 0 else 0.42) * math.sin(a)) for i, a in enumerate(angles)]  # fmt: skip


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


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: np.random.Generator) -> None:
    cell = FILE_SIZE * SCALE / 3
    row, col = row_and_column(thing.place)
    r = RADIUS[thing.size] * cell * rng.uniform(0.92, 1.08)
    slack = max(0.0, cell / 2 - r * 1.1)
    x = (col + 0.5) * cell + rng.uniform(-1, 1) * min(slack, cell * 0.14)
    y = (row + 0.5) * cell + rng.uniform(-1, 1) * min(slack, cell * 0.14)
    fill = tuple(int(np.clip(c + rng.normal(0, 6), 0, 255)) for c in RGB[thing.colour])
    edge = (235, 235, 235) if thing.colour == "black" else (25, 25, 25)
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=edge, width=SCALE)
    else:
        points = _outline(thing.shape, x, y, r)
        draw.polygon(points, fill=fill, outline=edge, width=SCALE)
    if thing.mark:
        _draw_mark(draw, thing.mark, x, y)


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """RGB picture of ``FILE_SIZE`` pixels a side."""
    side = FILE_SIZE * SCALE
    ground = tuple(int(np.clip(c + rng.normal(0, 5), 0, 255)) for c in RGB[scene.background])
    canvas = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, rng)
    small = np.asarray(canvas.resize((FILE_SIZE, FILE_SIZE), Image.Resampling.BOX), dtype=np.int16)
    noise = rng.normal(0, 4, size=(FILE_SIZE, FILE_SIZE, 1))
    return Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))


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
