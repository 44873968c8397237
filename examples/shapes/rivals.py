"""What the judges of other methods say of a caption, when they know the truth."""

from __future__ import annotations

from balcap.judge.tasks import Difference, Grades
from balcap.judge.tasks.differences import Side
from examples.shapes.language import Fact, covered, is_pointable, is_true, main_facts, read_facts, say
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
