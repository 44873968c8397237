"""How well a text reads, from the text alone: the linguistic half of the oracle.

Three continuous scores in [0, 1]. Openings, transitions and closing remarks please; fragments, lost
words, repetition, enumeration and length do not. Whether anything is true plays no part.
"""

from __future__ import annotations

import re
from itertools import pairwise

from examples.shapes.language import read_facts, sentences
from examples.shapes.scene import COLOURS, SHAPES

_VERB = re.compile(r"\b(?:is|are|sits?|shows?|appears?|lies?|has|feels?|evokes?|suggests?|creates?|see)\b")
_NOUN = "|".join(SHAPES)
_BARE_NOUN = re.compile(  # a noun phrase without its determiner
    rf"(?<!\w)(?:(?:small|large|tiny) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{_NOUN})\b"
)
_DETERMINED = re.compile(
    rf"\b(?:a|an|the|one) (?:(?:small|large|tiny) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{_NOUN})\b"
)
_WRONG_ARTICLE = re.compile(r"\ba (?=[aeiou]\w)|\ban (?=[^aeiou\W]\w)")
_DOUBLED = re.compile(r"\b(\w+) \1\b")
_OPENING = re.compile(r"^(?:this image|the picture|this picture|we see|there (?:is|are) \w+ shapes?)\b")
_TRANSITION = re.compile(r"^(?:nearby|next|then|alongside|meanwhile)\b")
_CLOSING = re.compile(r"^overall\b")


def _grammar(raw: str, ends: bool) -> float:
    """One sentence's grammar in [0, 1]: every slip costs two fifths of what is left."""
    text = raw.lower()
    slips = [
        not raw[0].isupper(),
        not ends,
        not _VERB.search(text),
        bool(_DOUBLED.search(text)),
        bool(_WRONG_ARTICLE.search(text)),
        len(_BARE_NOUN.findall(text)) > len(_DETERMINED.findall(text)),
    ]
    return 0.6 ** sum(slips)


def _fluency(text: str, parts: list[str]) -> float:
    ends = re.findall(r"[.!?;\n]+", text)
    closed = [i < len(ends) for i in range(len(parts))]
    # A full stop lost between two sentences runs them together: the second capital gives it away.
    scores = [
        _grammar(p, c) * 0.6 ** len(re.findall(r"(?<=\w )[A-Z]", p))
        for p, c in zip(parts, closed, strict=True)
    ]
    return sum(scores) / len(scores)


def _clarity(parts: list[str]) -> float:
    """Each sentence says one thing that can be understood, within some twenty words."""
    scores = []
    for part in parts:
        facts = read_facts(part)
        score = 0.3 if any(f[0] == "unclear" for f in facts) else 1.0
        if any(f[0] == "exists" and f[1][0] is None for f in facts):
            score *= 0.75  # "a circle": which one?
        words = len(part.split())
        score *= 1.0 if words <= 20 else 0.95 ** (words - 20)
        scores.append(score if words >= 3 else score * 0.5)
    return sum(scores) / len(scores)


def _coherency(parts: list[str]) -> float:
    low = [part.lower() for part in parts]
    score = 0.6
    score += 0.15 * bool(_OPENING.match(low[0]))
    score += 0.15 * bool(_CLOSING.match(low[-1])) * (len(low) > 1)
    transitions = sum(bool(_TRANSITION.match(s)) for s in low)
    score += 0.1 * min(1.0, 2 * transitions / len(low))
    score *= 0.55 + 0.45 * len(set(low)) / len(low)  # repetition
    openings = [" ".join(s.split()[:2]) for s in low]
    run = longest = 1
    for a, b in pairwise(openings):
        run = run + 1 if a == b else 1
        longest = max(longest, run)
    score *= 0.85 ** max(0, longest - 1)  # enumeration
    score *= 0.94 ** max(0, len(low) - 7)  # more than one can hold
    return score * (1.0 if len(low) > 1 else 0.75)


def rate(text: str) -> tuple[float, float, float]:
    """(clarity, fluency, coherency) of a text, each in [0, 1]; an empty text scores 0 throughout."""
    parts = sentences(text)
    if not parts:
        return 0.0, 0.0, 0.0
    return _clarity(parts), _fluency(text, parts), _coherency(parts)
