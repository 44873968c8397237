"""Writes scenes as ordinary ShareGPT4V files: one JSON array and a folder of PNGs.

python -m examples.shapes.dataset --out data/shapes --images 3000 --seed 0
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from balcap.utils.files import atomic_write
from examples.shapes.captions import QUESTIONS, reference
from examples.shapes.questions import questions
from examples.shapes.rivals import rubric
from examples.shapes.scene import draw_scene, png_bytes, sample_scene


def write_dataset(out: Path = Path("data/shapes"), images: int = 3000, seed: int = 0) -> Path:
    """Write `images` scenes below `out`; returns the JSON file, which is written last.

    Every picture depends on the seed and its own number alone, so that a larger set begins with the smaller. Beside the
    keys of ShareGPT4V a row holds ``questions`` about its picture and a ``rubric`` for captions of it.
    """
    (out / "shapes").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(images):
        rng = np.random.default_rng([seed, i])
        scene, name = sample_scene(rng), f"shapes/{seed:03d}-{i:06d}.png"
        text = reference(scene, rng)
        question = QUESTIONS[rng.integers(len(QUESTIONS))]
        human = f"{question}\n<image>" if rng.random() < 0.5 else f"<image>\n{question}"
        (out / name).write_bytes(png_bytes(draw_scene(scene, rng), scene))
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": text}]
        asked = questions(scene, np.random.default_rng([seed, i, 1]), 8)
        row = {"id": f"{i:06d}", "image": name, "conversations": turns, "questions": asked}
        rows.append(row | {"rubric": rubric(scene, np.random.default_rng([seed, i, 2]))})
    with atomic_write(out / "shapes.json") as file:
        json.dump(rows, file, indent=0)
    return out / "shapes.json"


if __name__ == "__main__":
    print(f"wrote {auto_cli(write_dataset, as_positional=False)}")
