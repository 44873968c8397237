"""What other methods ask of captions: rubrics, and what their judges say when they know the truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from balcap.judge.tasks import Difference, Grades
from balcap.judge.tasks.differences import Side
from examples.shapes.language import (
    Fact,
    covered,
    is_pointable,
    is_true,
    main_facts,
    read_fact,
    read_facts,
    say,
)
from examples.shapes.scene import Scene


def grades(scene: Scene, caption: str) -> Grades:
    """True facts / facts that the caption states; facts of the scene that it covers / all. There is no text to read."""
    stated = [fact for fact in read_facts(caption) if is_pointable(fact)]
    true = [fact for fact in stated if is_true(fact, scene)]
    wanted = main_facts(scene)
    told = sum(covered(fact, set(true)) for fact in wanted)
    return Grades(len(true) / max(1, len(stated)), told / len(wanted), 1.0)


def differences(scene: Scene, caption: str, reference: str) -> list[Difference]:
    """A difference for every fact that one states and the other does not cover: who states what is not true errs, and who
    leaves out that something is there; that a detail is left out is nobody's error."""
    told, known = read_facts(caption), read_facts(reference)
    of_caption: list[tuple[Fact, Side, Side]] = [
        (fact, "caption", "reference") for fact in told if not covered(fact, set(known))
    ]
    of_reference: list[tuple[Fact, Side, Side]] = [
        (fact, "reference", "caption") for fact in known if not covered(fact, set(told))
    ]
    return [_difference(scene, *one) for one in (*of_caption, *of_reference)]


def _difference(scene: Scene, fact: Fact, by: Side, other: Side) -> Difference:
    omission: Side = other if fact[0] == "exists" else "neither"
    return Difference(say(fact), omission if is_true(fact, scene) else by)


_WEIGHTS = {"exists": 3, "size": 2, "place": 2, "background": 2, "count": 2, "mark": 1}


def rubric(scene: Scene, rng: np.random.Generator, most: int = 8) -> list[dict[str, Any]]:
    """At most so many criteria for captions of a scene, in the order of its facts: ``criterion``, ``weight``."""
    facts = main_facts(scene)
    chosen = sorted(rng.permutation(len(facts))[:most].tolist())
    return [
        {"criterion": f"The caption says: {say(facts[i])}", "weight": _WEIGHTS[facts[i][0]]} for i in chosen
    ]


def meets(caption: str, criterion: str) -> bool:
    """Whether a caption says what a criterion asks for."""
    return covered(read_fact(criterion), set(read_facts(caption)))
