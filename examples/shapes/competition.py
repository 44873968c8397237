"""Settings of the world that make its rewards compete, as those of captioning do; docs/competition.md has the reasons.

They are chosen when data are written (`dataset.py`, `benchmarks.py`: ``--competition first``) and live in the data alone:
in the scenes, the references and the questions. How the judge errs is set apart, as everywhere (`noise.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from examples.shapes.captions import closing_remark, corrupt, reference
from examples.shapes.questions import questions
from examples.shapes.scene import MARKED, OBJECT_COUNT_WEIGHTS, Scene, sample_scene

Name = Literal["none", "first", "second"]


@dataclass(frozen=True)
class Competition:
    """What is in pictures, and how references and questions are written; the defaults are the plain world.

    Attributes:
        counts: shares of pictures with one to five things.
        marked: share of things that carry a mark, which the policy cannot read reliably.
        left_out: share of things that a reference leaves out; one always stays.
        wrong: share of the things in a reference that have one wrong attribute there.
        closing: share of references that close with a remark nobody could point at.
        mark_questions: whether questions ask for marks as well.
    """

    counts: tuple[float, ...] = OBJECT_COUNT_WEIGHTS
    marked: float = MARKED
    left_out: float = 0.0
    wrong: float = 0.0
    closing: float = 0.0
    mark_questions: bool = False

    def scene(self, rng: np.random.Generator) -> Scene:
        """A scene of this world."""
        return sample_scene(rng, self.counts, self.marked)

    def reference(self, scene: Scene, rng: np.random.Generator, slips: np.random.Generator) -> str:
        """A reference of a scene: `rng` draws its words, `slips` what is wrong with it."""
        kept = [thing for thing in scene.things if slips.random() >= self.left_out]
        kept = kept or [scene.things[int(slips.integers(len(scene.things)))]]
        things = tuple(corrupt(thing, slips) if slips.random() < self.wrong else thing for thing in kept)
        text = reference(Scene(things, scene.background), rng)
        return f"{text} {closing_remark(slips)}" if slips.random() < self.closing else text

    def questions(self, scene: Scene, rng: np.random.Generator, most: int = 6) -> list[dict]:
        """At most so many questions about a scene."""
        return questions(scene, rng, most, self.mark_questions)

    @property
    def faultless(self) -> Competition:
        """The same pictures with references as careful people write them: those of benchmarks."""
        return replace(self, left_out=0.0, wrong=0.0, closing=0.0)


COMPETITIONS: dict[Name, Competition] = {
    "none": Competition(),
    "first": Competition(
        counts=(0.0, 0.1, 0.25, 0.35, 0.3),
        marked=0.9,
        left_out=0.1,
        wrong=0.05,
        closing=0.3,
        mark_questions=True,
    ),
    "second": Competition(counts=(0.35, 0.4, 0.25, 0.0, 0.0), marked=0.5, left_out=0.3, wrong=0.1),
}
