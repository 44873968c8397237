"""Writes scenes as ordinary ShareGPT4V files: one JSON array and a folder of PNGs.

python -m examples.shapes.dataset --out data/shapes --images 3000 --seed 0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from examples.shapes.captions import QUESTIONS, reference
from examples.shapes.scene import draw_scene, png_bytes, sample_scene

FOLDER = "shapes"


def write_dataset(out: Path, images: int, seed: int = 0) -> Path:
    """Write `images` scenes below `out`; returns the JSON file. What is there already stays.

    Every picture depends on the seed and its own number alone, so that a larger set begins with the smaller.
    """
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(images):
        rng = np.random.default_rng([seed, i])
        scene, name = sample_scene(rng), f"{FOLDER}/{seed:03d}-{i:06d}.png"
        text = reference(scene, rng)
        question = QUESTIONS[rng.integers(len(QUESTIONS))]
        human = f"{question}\n<image>" if rng.random() < 0.5 else f"<image>\n{question}"
        if not (out / name).exists():
            _write(out / name, png_bytes(draw_scene(scene, rng), scene))
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": text}]
        rows.append({"id": f"{i:06d}", "image": name, "conversations": turns})
    path = out / "shapes.json"
    _write(path, json.dumps(rows, indent=0).encode())
    return path


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing: what is there already is not written again."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/shapes"))
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"wrote {arguments.images} images and {write_dataset(**vars(arguments))}")
