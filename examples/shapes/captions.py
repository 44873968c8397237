"""Writers of captions: the reference, a clean describer, and one that errs as real captioners do."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from examples.shapes import scene as world
from examples.shapes.language import COUNTS, PLACE_PHRASES, RELATION_PHRASES, article
from examples.shapes.scene import Scene, Thing, relation

QUESTIONS = (
    "Describe this image in detail.",
    "What do you see in this picture?",
    "Please write a detailed description of this image.",
    "Can you describe the scene in this picture?",
    "Give a detailed caption for this image.",
    "What is shown in this image?",
    "Tell me what this picture contains.",
    "Explain what is visible in this image.",
    "Write a caption that covers everything in this picture.",
    "Provide a description of the given image.",
)
OPENINGS = (
    "This image shows {n} on a {bg} background.",
    "The picture shows {n} against a {bg} background.",
    "There {be} {n} on a plain {bg} background.",
    "We see {n} on a {bg} background.",
)
TRANSITIONS = ("Nearby, ", "Next, ", "Then, ", "Alongside, ", "Meanwhile, ")
META = (
    "The composition feels calm and balanced.",
    "The arrangement evokes a playful mood.",
    "The scene suggests harmony and depth.",
    "It is a striking and beautiful picture.",
    "The colours create an inviting atmosphere.",
    "The viewer feels a sense of wonder.",
)
CLOSINGS = (
    "Overall, the composition feels calm and balanced.",
    "Overall, the scene suggests harmony and depth.",
    "Overall, the picture creates an inviting atmosphere.",
)


@dataclass(frozen=True)
class Style:
    """How much a describer says, each a probability."""

    opening: float = 0.7
    size: float = 0.8
    place: float = 0.9
    mark: float = 0.5
    relation: float = 0.5
    transition: float = 0.3
    meta_opening: float = 0.08
    closing: float = 0.15
    enumerate_: float = 0.15  # "There is a ... There is a ...": complete, and dull


REFERENCE = Style(opening=1, size=1, place=1, mark=1, relation=1, meta_opening=0, closing=0, enumerate_=0)
FLAWED = Style(opening=0.55, size=0.65, place=0.75, mark=0.6, relation=0.25, closing=0.3, enumerate_=0.3)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _sentence(thing: Thing, style: Style, rng: np.random.Generator, dull: bool) -> str:
    """One sentence about one thing, in one of several orders."""
    size = f"{thing.size} " if rng.random() < style.size else ""
    name = article(f"{size}{thing.colour} {thing.shape}")
    mark = f" with a tiny {thing.mark[0]} {thing.mark[1]}" if thing.mark and rng.random() < style.mark else ""
    if rng.random() >= style.place:
        return f"There is {name}{mark}."
    where = _pick(rng, PLACE_PHRASES[thing.place])
    forms = (
        f"There is {name}{mark} {where}.",
        f"{where} is {name}{mark}.",
        f"{name}{mark} sits {where}.",
        f"{name} appears {where}{mark and '. It has' + mark.removeprefix(' with')}.",
    )
    return forms[0] if dull else _pick(rng, forms)


def _relation_sentence(things: tuple[Thing, ...], rng: np.random.Generator) -> str | None:
    pairs = [(a, b, how) for a, b in permutations(things, 2) if (how := relation(a.place, b.place))]
    if not pairs:
        return None
    a, b, how = pairs[int(rng.integers(len(pairs)))]
    return f"The {a.colour} {a.shape} is {_pick(rng, RELATION_PHRASES[how])} the {b.colour} {b.shape}."


def describe(scene: Scene, rng: np.random.Generator, style: Style) -> list[str]:
    """True sentences about a scene, places in reading order, so that what comes next is known."""
    out = []
    n = len(scene.things)
    if rng.random() < style.meta_opening:
        out.append(_pick(rng, META))
    if rng.random() < style.opening:
        number = f"{COUNTS[n]} shape{'s' if n > 1 else ''}"
        opening = _pick(rng, OPENINGS)
        out.append(opening.format(n=number, bg=scene.background, be="is" if n == 1 else "are"))
    dull = rng.random() < style.enumerate_
    for i, thing in enumerate(scene.things):
        text = _sentence(thing, style, rng, dull)
        if i and not dull and rng.random() < style.transition:
            text = _pick(rng, TRANSITIONS) + text[0].lower() + text[1:]
        out.append(text[0].upper() + text[1:])
    if n > 1 and rng.random() < style.relation and (link := _relation_sentence(scene.things, rng)):
        out.append(link)
    if rng.random() < style.closing:
        out.append(_pick(rng, CLOSINGS))
    return out


def closing_remark(rng: np.random.Generator) -> str:
    """Commentary that rounds a text off."""
    return _pick(rng, CLOSINGS)


def reference(scene: Scene, rng: np.random.Generator) -> str:
    """All there is to say: more facts than a fluent caption holds."""
    return " ".join(describe(scene, rng, REFERENCE))


def clean(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of varied completeness and phrasing."""
    return " ".join(describe(scene, rng, Style()))


_VALUES = {"colour": world.COLOURS, "shape": world.SHAPES, "size": world.SIZES, "place": world.PLACES}


def _mark(rng: np.random.Generator) -> tuple[str, str]:
    return _pick(rng, world.MARK_COLOURS), _pick(rng, world.MARKS)


def corrupt(thing: Thing, rng: np.random.Generator) -> Thing:
    """The thing with one wrong attribute."""
    name = _pick(rng, (*_VALUES, "mark"))
    value: Any = _mark(rng) if name == "mark" else _pick(rng, _VALUES[name])
    return replace(thing, **{name: value})


def _invent(rng: np.random.Generator) -> Thing:
    mark = _mark(rng) if rng.random() < 0.5 else None
    return Thing(**{name: _pick(rng, values) for name, values in _VALUES.items()}, mark=mark)


def _break_grammar(text: str, rng: np.random.Generator) -> str:
    """One slip: a lost article, a lost verb, a doubled word, a lost capital or full stop."""
    slip = int(rng.integers(5))
    words = text.split()
    if slip == 0:
        words = [w for w in words if w.lower() not in ("a", "an", "the")] or words
    elif slip == 1:
        words = [w for w in words if w not in ("is", "are", "sits", "appears", "shows", "has")] or words
    elif slip == 2:
        i = int(rng.integers(len(words)))
        words.insert(i, words[i])
    text = " ".join(words)
    if slip == 3:
        return text[0].lower() + text[1:]
    return re.sub(r"\.$", "", text) if slip == 4 else text


def flawed(scene: Scene, rng: np.random.Generator) -> str:
    """A caption with the faults of real captioners, each drawn on its own, so that none is bound to another.

    About a third of the things left out, some invented, wrong attributes, commentary that cannot be
    pointed at, repetition, broken grammar, and a length from a third to three times the reference.
    """
    return " ".join(_flawed_sentences(scene, rng))


def _flawed_sentences(scene: Scene, rng: np.random.Generator) -> list[str]:
    kept = [t for t in scene.things if rng.random() < 0.67]
    things = [corrupt(t, rng) if rng.random() < 0.2 else t for t in kept]
    things += [_invent(rng) for _ in range(int(rng.random() < 0.3))]
    things.sort(key=lambda t: world.PLACES.index(t.place))
    background = scene.background if rng.random() < 0.85 else _pick(rng, world.BACKGROUNDS)
    if things:
        out = describe(Scene(tuple(things), background), rng, FLAWED)
    else:
        out = [f"This image shows a {background} background."]
    for _ in range(int(rng.choice(3, p=(0.45, 0.35, 0.2)))):
        out.insert(int(rng.integers(len(out) + 1)), _pick(rng, META))
    length = rng.random()
    if length < 0.2:
        out = out[: max(1, len(out) // 3)]
    elif length > 0.75:
        for _ in range(int(rng.integers(1, 2 + len(out)))):
            i = int(rng.integers(len(out)))
            out.insert(i + 1, out[i] if rng.random() < 0.7 else _pick(rng, META))
    return [_break_grammar(text, rng) if rng.random() < 0.4 else text for text in out]


def flawed_of_length(scene: Scene, rng: np.random.Generator, words: int) -> str:
    """A flawed caption of about so many words: cut after the sentence that ends nearest, never to nothing, or grown by
    sentences about things that are there (two of five) or are not (two of five) and by commentary."""
    out = _flawed_sentences(scene, rng)
    while (now := _words(out)) < words:
        kind = rng.random()
        if kind < 0.8:
            there = scene.things[int(rng.integers(len(scene.things)))]
            text = _sentence(there if kind < 0.4 else _invent(rng), FLAWED, rng, dull=False)
        else:
            text = _pick(rng, META)
        out.append(text[0].upper() + text[1:])
    while len(out) > 1 and abs(_words(out[:-1]) - words) <= abs(now - words):
        out.pop()
        now = _words(out)
    return " ".join(out)


def _words(parts: list[str]) -> int:
    return sum(len(part.split()) for part in parts)
