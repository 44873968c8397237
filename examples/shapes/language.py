"""The words of the embedded world, and how facts are read from text.

A fact is a tuple: ``("exists", obj)``, ``("size", obj, size)``, ``("place", obj, place)``,
``("mark", obj, colour, kind)``, ``("relation", obj, how, obj)``, ``("background", colour)``,
``("count", n)``, ``("meta", text)`` for commentary, ``("unclear", text)`` for what says nothing.
``obj`` is (colour or None, shape).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from examples.shapes import scene as world
from examples.shapes.scene import Scene, Thing, relation

Obj = tuple[str | None, str]
Fact = tuple

COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
PLACE_PHRASES = {
    "top left": ("in the top left corner", "at the top left"),
    "top middle": ("at the top", "in the top middle"),
    "top right": ("in the top right corner", "at the top right"),
    "middle left": ("on the left", "on the left side"),
    "center": ("in the center", "in the very middle"),
    "middle right": ("on the right", "on the right side"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom middle": ("at the bottom", "in the bottom middle"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
RELATION_PHRASES = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
META_WORDS = (
    "mood|atmosphere|feels?|feeling|evokes?|depth|harmony|harmonious|balanced?|calm|story|viewer|emotions?|"
    "beautiful|elegant|suggests?|composition|striking|inviting|playful|lovely|pleasing|artist|serene|dynamic|"
    "imagination|interesting|delightful|joy|wonder|energy"
)


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_PLACE_OF = {phrase: place for place, phrases in PLACE_PHRASES.items() for phrase in phrases}
_RELATION_OF = {phrase: how for how, phrases in RELATION_PHRASES.items() for phrase in phrases}
_TOKEN = re.compile(
    rf"\b(?P<background>{_any(world.BACKGROUNDS)}) background\b"
    rf"|\bbackground is (?P<background2>{_any(world.BACKGROUNDS)})\b"
    rf"|\btiny (?P<mark>(?:{_any(world.MARK_COLOURS)}) (?:{_any(world.MARKS)}))\b"
    rf"|\b(?P<count>{_any(COUNTS[1:])}) (?:shapes?|objects?|figures?)\b"
    rf"|\bis (?P<size>{_any(world.SIZES)})\b"
    rf"|\b(?P<relation>{_any(_RELATION_OF)})\b"
    rf"|\b(?P<place>{_any(_PLACE_OF)})\b"
    rf"|\b(?P<thing>(?:(?:{_any(world.SIZES)}) )?(?:(?:{_any(world.COLOURS)}) )?(?:{_any(world.SHAPES)}))(?:e?s)?\b"
    r"|\b(?P<it>it)\b"
)
_META = re.compile(rf"\b(?:{META_WORDS})\b")
# What carries no statement of its own: openings, transitions, verbs.
_HOLLOW = re.compile(
    r"\b(?:this|the|a|an|image|picture|scene|here|we|see|shows?|there|is|are|and|with|on|of|in|next|nearby|then|"
    r"meanwhile|finally|also|alongside|overall|sits?|appears?|lies?|against|plain|has|bears?|it|one|which|stands?)\b"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without their closing mark, empty ones left out."""
    return [part.strip() for part in re.split(r"[.!?;\n]+", text) if part.strip()]


@dataclass
class _Reader:
    """Reads one text; `last` is what "it" refers to, across sentences. Beside each fact stand the words that say it."""

    facts: list[tuple[Fact, str]] = field(default_factory=list)
    last: Obj | None = None

    def sentence(self, said: str) -> None:
        text = said.lower()
        said = said if len(said) == len(text) else text  # a few letters are two in lower case
        before, subject, current = len(self.facts), None, None
        place = how = None  # phrases waiting for the thing that they speak of
        landmark: Obj | None = None
        for match in _TOKEN.finditer(text):
            kind, value = str(match.lastgroup), match.group(str(match.lastgroup))
            words = said[slice(*match.span())]
            if kind in ("thing", "it"):
                obj = self._thing(value, words) if kind == "thing" else self.last
                if obj is None:
                    continue
                if how and subject is None and landmark is None:
                    landmark = obj  # "Below the circle is a star": the circle, named first, is the landmark
                    continue
                if how:
                    first, second = (subject, obj) if subject else (obj, landmark)
                    self.facts.append((("relation", first, _RELATION_OF[how.lower()], second), how))
                if place:
                    self.facts.append((("place", obj, _PLACE_OF[place.lower()]), place))
                how = place = None
                subject, current = subject or obj, obj
            elif kind == "relation":
                how = words
            elif kind == "place" and not current:
                place = words
            else:
                self._attribute(kind, value, current, words)
        self.last = subject or self.last
        rest = " ".join(_TOKEN.sub(" ", text).split())
        if _META.search(rest):
            self.facts.append((("meta", " ".join(text.split())), said))
        elif len(self.facts) == before and re.search(r"\w", _HOLLOW.sub(" ", rest)):
            self.facts.append((("unclear", " ".join(text.split())), said))

    def _thing(self, text: str, said: str) -> Obj:
        words = text.split()
        obj: Obj = (next((w for w in words if w in world.COLOURS), None), words[-1])
        sized = words[0] in world.SIZES
        self.facts.append((("exists", obj), said.split(maxsplit=1)[1] if sized else said))
        if sized:
            self.facts.append((("size", obj, words[0]), said.split()[0]))
        return obj

    def _attribute(self, kind: str, value: str, obj: Obj | None, said: str) -> None:
        """What is said of the picture, or of `obj`; nothing where there is none."""
        if kind.startswith("background"):
            self.facts.append((("background", value), said))
        elif kind == "count":
            self.facts.append((("count", COUNTS.index(value)), said))
        elif obj and kind == "place":
            self.facts.append((("place", obj, _PLACE_OF[value]), said))
        elif obj:  # a mark or a size
            self.facts.append(((kind, obj, *value.split()), said))


def read_facts(text: str) -> list[Fact]:
    """All facts that a text states, in order, repeated ones once."""
    return list(quoted_facts(text))


def quoted_facts(text: str) -> dict[Fact, str]:
    """The same facts, each with the words that say it first."""
    reader = _Reader()
    for part in sentences(text):
        reader.sentence(part)
    quoted: dict[Fact, str] = {}
    for fact, words in reader.facts:
        quoted.setdefault(fact, words)
    return quoted


def _name(obj: Obj) -> str:
    return f"{obj[0]} {obj[1]}" if obj[0] else obj[1]


def article(words: str) -> str:
    """The words behind "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def say(fact: Fact) -> str:
    """One fact as one self-contained sentence; `read_fact` reads it back."""
    kind, about = fact[:2]
    if kind == "exists":
        return f"There is {article(_name(about))}."
    if kind == "background":
        return f"The background is {about}."
    if kind == "count":
        return f"There {'is' if about == 1 else 'are'} {COUNTS[about]} shape{'s' if about != 1 else ''}."
    if kind in ("meta", "unclear"):
        return about[0].upper() + about[1:] + "."
    subject = f"The {_name(about)}"
    if kind == "size":
        return f"{subject} is {fact[2]}."
    if kind == "place":
        return f"{subject} is {PLACE_PHRASES[fact[2]][0]}."
    if kind == "mark":
        return f"{subject} has a tiny {fact[2]} {fact[3]}."
    return f"{subject} is {RELATION_PHRASES[fact[2]][0]} the {_name(fact[3])}."


def read_fact(assertion: str) -> Fact:
    """The one fact of an assertion: what it adds beyond that its objects exist."""
    facts = read_facts(assertion)
    special = [fact for fact in facts if fact[0] != "exists"]
    return (special or facts or [("unclear", assertion)])[-1]


def main_facts(scene: Scene) -> list[Fact]:
    """The facts of a scene as people would write them down: all but how its objects lie towards each other."""
    facts: list[Fact] = [("background", scene.background), ("count", len(scene.things))]
    for thing in scene.things:
        obj = (thing.colour, thing.shape)
        facts += [("exists", obj), ("size", obj, thing.size), ("place", obj, thing.place)]
        facts += [("mark", obj, *thing.mark)] if thing.mark else []
    return facts


def is_true(fact: Fact, scene: Scene) -> bool:
    """Whether a fact holds in a scene. Commentary and what says nothing are not true."""
    return fact in _facts_of(scene)


@lru_cache
def _facts_of(scene: Scene) -> set[Fact]:
    """All facts of a scene; of an object with its colour, and without."""
    facts: set[Fact] = {("background", scene.background), ("count", len(scene.things))}
    for thing, obj in _objects(scene):
        facts |= {("exists", obj), ("size", obj, thing.size), ("place", obj, thing.place)}
        if thing.mark:
            facts.add(("mark", obj, *thing.mark))
        others = [(other, relation(thing.place, there.place)) for there, other in _objects(scene)]
        facts |= {("relation", obj, how, other) for other, how in others if how}
    return facts


def _objects(scene: Scene) -> list[tuple[Thing, Obj]]:
    return [(thing, (colour, thing.shape)) for thing in scene.things for colour in (thing.colour, None)]


def is_pointable(fact: Fact) -> bool:
    """Whether a person could point at it: everything but commentary and what says nothing."""
    return fact[0] not in ("meta", "unclear")


def covered(unit: Fact, stated: set[Fact]) -> bool:
    """Whether a reference unit is stated in, or follows from, stated facts."""
    return bool(covering(unit, stated))


def covering(unit: Fact, stated: set[Fact]) -> set[Fact]:
    """The stated facts that a reference unit is stated in, or follows from.

    A relation follows from its inverse, existence from any fact about the object, and the number of
    objects from naming that many different ones.
    """
    if unit in stated:
        return {unit}
    if unit[0] == "relation":
        return {("relation", unit[3], INVERSE[unit[2]], unit[1])} & stated
    if unit[0] == "exists":
        return {fact for fact in stated if unit[1] in fact[1:]}
    if unit[0] == "count":
        named = {fact for fact in stated if fact[0] == "exists"}
        return named if len(named) == unit[1] else set()
    return set()
