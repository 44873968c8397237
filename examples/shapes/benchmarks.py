"""Twins of the benchmarks from scene graphs, in the formats of the real ones.

python -m examples.shapes.benchmarks --out data/shapes/benchmarks --images 200

Pictures and captions are those of `examples.shapes.dataset` with a seed of their own, so nobody has trained on them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from balcap.utils.files import atomic_write
from examples.shapes.captions import Style, clean, describe, flawed
from examples.shapes.competition import COMPETITIONS, Name
from examples.shapes.dataset import write_rows
from examples.shapes.language import main_facts, say
from examples.shapes.scene import Scene, scene_of

TERSE = Style(
    opening=0, size=0.2, place=0.3, mark=0, relation=0, transition=0, meta_opening=0, closing=0, enumerate_=1
)


def annotated(scene: Scene) -> list[str]:
    """The facts of a scene as people would write them down, one sentence each."""
    return [say(fact) for fact in main_facts(scene)]


def rivals(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """Captions of three captioners: one that says true things well, one that errs as real ones do, one of few words."""
    return {
        "careful": clean(scene, rng),
        "flawed": flawed(scene, rng),
        "terse": " ".join(describe(scene, rng, TERSE)),
    }


def write_benchmarks(
    out: Path = Path("data/shapes/benchmarks"), images: int = 200, seed: int = 77, competition: Name = "none"
) -> Path:
    """Write ``shapes.json`` (captions), ``dcscore.jsonl``, ``captionqa.json``, ``prism.json`` and ``caparena.json`` below
    `out`, and the pictures; returns the folder. With `competition` pictures and questions are those of that world;
    references are faultless, as those of careful people."""
    world = COMPETITIONS[competition].faultless
    rows = json.loads(write_rows(out, images, seed, world).read_text())
    dcscore, captionqa, prism, caparena = [], [], [], {}
    for number, row in enumerate(rows):
        name, text = row["image"], row["conversations"][1]["value"]
        scene, rng = scene_of((out / name).read_bytes()), np.random.default_rng([seed, number, 1])
        dcscore.append({"image_name": name, "oracle_caption": text, "oracle_facts": annotated(scene)})
        domain = "few" if len(scene.things) < 3 else "many"
        entry = {"id": f"{domain}_{number:04d}", "domain": domain, "images": [name]}
        captionqa.append(entry | {"questions": world.questions(scene, rng)})
        prism += [{"image": name, **question} for question in world.questions(scene, rng, 4)]
        captions = rivals(scene, rng)
        rival = list(captions)[number % len(captions)]
        caparena[name] = {"captions": {"human": text, **captions}, "ref_model": rival}
    lines = "\n".join(json.dumps(row) for row in dcscore) + "\n"
    for file, content in (
        ("dcscore.jsonl", lines),
        ("captionqa.json", json.dumps(captionqa, indent=0)),
        ("prism.json", json.dumps(prism, indent=0)),
        ("caparena.json", json.dumps(caparena, indent=0)),
    ):
        with atomic_write(out / file) as opened:
            opened.write(content)
    return out


if __name__ == "__main__":
    print(f"wrote {auto_cli(write_benchmarks, as_positional=False)}")
