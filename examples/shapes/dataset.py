"""Writes scenes as ordinary ShareGPT4V files: one JSON array and a folder of PNGs.

python -m examples.shapes.dataset --out data/shapes --images 3000 --seed 0
python -m examples.shapes.dataset --out data/competition --images 3000 --competition first    (docs/competition.md)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse import auto_cli

from balcap.utils.files import atomic_write
from examples.shapes.captions import QUESTIONS, flawed_of_length
from examples.shapes.competition import COMPETITIONS, Competition, Name
from examples.shapes.rivals import rubric
from examples.shapes.scene import draw_scene, png_bytes

Captions = Literal["reference", "short", "long"]
LENGTHS = {"short": 1 / 3, "long": 3.0}
"""Words of captions to learn bad habits from, as a share of the reference's."""


def write_dataset(
    out: Path = Path("data/shapes"),
    images: int = 3000,
    seed: int = 0,
    competition: Name = "none",
    captions: Captions = "reference",
) -> Path:
    """Write `images` scenes below `out`; returns the JSON file, which is written last.

    Every picture depends on the seed and its own number alone, so that a larger set begins with the smaller. Beside the
    keys of ShareGPT4V a row holds ``questions`` about its picture and a ``rubric`` for captions of it.

    Args:
        out: folder for all of it.
        images: how many scenes.
        seed: of all that is drawn.
        competition: which settings of the world (`examples.shapes.competition`).
        captions: references; or flawed captions of a third or three times as many words, to make a base policy from.
    """
    return write_rows(out, images, seed, COMPETITIONS[competition], captions)


def write_rows(
    out: Path, images: int, seed: int, competition: Competition, captions: Captions = "reference"
) -> Path:
    """The same, with settings of the world by themselves."""
    (out / "shapes").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(images):
        rng, slips = np.random.default_rng([seed, i]), np.random.default_rng([seed, i, 3])
        scene, name = competition.scene(rng), f"shapes/{seed:03d}-{i:06d}.png"
        text = competition.reference(scene, rng, slips)
        question = QUESTIONS[rng.integers(len(QUESTIONS))]
        human = f"{question}\n<image>" if rng.random() < 0.5 else f"<image>\n{question}"
        (out / name).write_bytes(png_bytes(draw_scene(scene, rng), scene))
        if captions != "reference":
            words = round(LENGTHS[captions] * len(text.split()))
            text = flawed_of_length(scene, np.random.default_rng([seed, i, 4]), words)
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": text}]
        asked = competition.questions(scene, np.random.default_rng([seed, i, 1]), 8)
        row = {"id": f"{i:06d}", "image": name, "conversations": turns, "questions": asked}
        rows.append(row | {"rubric": rubric(scene, np.random.default_rng([seed, i, 2]))})
    with atomic_write(out / "shapes.json") as file:
        json.dump(rows, file, indent=0)
    return out / "shapes.json"


if __name__ == "__main__":
    print(f"wrote {auto_cli(write_dataset, as_positional=False)}")
