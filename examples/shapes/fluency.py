"""How well a text reads, from the text alone: the linguistic half of the oracle.

Three continuous scores in [0, 1]. Openings, transitions and closing remarks please; fragments, lost
words, repetition, enumeration and length do not. Whether anything is true plays no part.
"""

from __future__ import annotations

import re
from itertools import groupby

from examples.shapes.language import read_facts, sentences
from examples.shapes.scene import COLOURS, SHAPES

_VERB = re.compile(r"\b(?:is|are|sits?|shows?|appears?|lies?|has|feels?|evokes?|suggests?|creates?|see)\b")
_NOUN_PHRASE = rf"(?:(?:small|large|tiny) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)})\b"
_NOUN = re.compile(rf"(?<!\w){_NOUN_PHRASE}")
_DETERMINED_NOUN = re.compile(rf"\b(?:a|an|the|one) {_NOUN_PHRASE}")
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
        len(_NOUN.findall(text)) > len(_DETERMINED_NOUN.findall(text)),
    ]
    # A full stop lost between two sentences runs them together: the second capital gives it away.
    return 0.6 ** sum(slips) * 0.6 ** len(re.findall(r"(?<=\w )[A-Z]", raw))


def _clarity(sentence: str) -> float:
    """In [0, 1]: a sentence says one thing that can be understood, within some twenty words."""
    facts, words = read_facts(sentence), len(sentence.split())
    score = 0.3 if any(fact[0] == "unclear" for fact in facts) else 1.0
    if any(fact[0] == "exists" and fact[1][0] is None for fact in facts):
        score *= 0.75  # "a circle": which one?
    score *= 0.95 ** max(0, words - 20)
    return score if words >= 3 else score * 0.5


def _coherency(parts: list[str]) -> float:
    low = [part.lower() for part in parts]
    score = 0.6
    score += 0.15 * bool(_OPENING.match(low[0]))
    score += 0.15 * bool(_CLOSING.match(low[-1])) * (len(low) > 1)
    transitions = sum(bool(_TRANSITION.match(s)) for s in low)
    score += 0.1 * min(1.0, 2 * transitions / len(low))
    score *= 0.55 + 0.45 * len(set(low)) / len(low)  # repetition
    alike = max(len(list(run)) for _, run in groupby(low, key=lambda s: s.split()[:2]))
    score *= 0.85 ** (alike - 1)  # enumeration
    score *= 0.94 ** max(0, len(low) - 7)  # more than one can hold
    return score * (1.0 if len(low) > 1 else 0.75)


def rate(text: str) -> tuple[float, float, float]:
    """(clarity, fluency, coherency) of a text, each in [0, 1]; an empty text scores 0 throughout."""
    parts = sentences(text)
    if not parts:
        return 0.0, 0.0, 0.0
    ends = len(re.findall(r"[.!?;\n]+", text))
    clarity = sum(map(_clarity, parts)) / len(parts)
    fluency = sum(_grammar(part, i < ends) for i, part in enumerate(parts)) / len(parts)
    return clarity, fluency, _coherency(parts)
