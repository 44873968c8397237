"""Captions that nobody has written yet, and how a judge would take them apart: sizes, not content."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

TOKENS_PER_WORD = 1.3
"""Of English, where the policy's tokenizer is not at hand."""

_WORD = re.compile(r"\w+")
_FILLER = re.compile(
    r"(an?|the|this|that|these|those|there|its?|is|are|was|were|be|been|has|have|had|of|in|on|at|to|and|or|with|by|"
    r"for|from|as)"
)


@dataclass(frozen=True)
class Language:
    """How captions fall apart into assertions.

    Attributes:
        words_per_assertion: words of a caption for each assertion that it makes. 4.1 is DeCapBench: 21,215
            facts in 400 captions of ImageInWords of 217 words each.
        words_in_assertion: words of one assertion, which names anew what it is about.
        growth: n captions of one image hold ``n ** growth`` times as many different assertions as one; 0 if
            all say the same, 1 if they share nothing.
    """

    words_per_assertion: float = 4.1
    words_in_assertion: float = 6.5
    growth: float = 0.8

    def assertions(self, text: str) -> list[str]:
        """Stand-ins for the assertions of `text`: as many and as long, in its words. None for no words.

        A sentence that is repeated asserts nothing again.
        """
        sentences = dict.fromkeys(part.strip() for part in re.split(r"[.!?;\n]+", text))
        words = " ".join(sentences).split()
        if not words:
            return []
        count = max(1, round(len(words) / self.words_per_assertion))
        length = max(1, round(self.words_in_assertion))
        starts = [int(i * len(words) / count) for i in range(count)]
        windows = [[words[(start + k) % len(words)] for k in range(length)] for start in starts]
        return list(dict.fromkeys(f"{' '.join(window)}." for window in windows))


class Said:
    """What the captions of one image have asserted so far, caption after caption.

    Args:
        language: of the captions.
    """

    def __init__(self, language: Language):
        self.captions = 0
        self._language = language
        self._pool: dict[str, None] = {}  # in the order in which they were made
        self._owed = 0.0

    def assertions(self, caption: str) -> list[str]:
        """Assertions of the next caption, of which some were made before, as `Language.growth` says."""
        own = self._language.assertions(caption)
        fresh = [text for text in own if text not in self._pool]
        self.captions += 1
        growth = self._language.growth
        share = self.captions**growth - (self.captions - 1) ** growth
        self._owed += share * len(own)
        new = min(len(fresh), max(0, round(self._owed), len(own) - len(self._pool)))
        self._owed -= new
        old, pool = len(own) - new, list(self._pool)
        again = [pool[int(i * len(pool) / old)] for i in range(old)]
        self._pool.update(dict.fromkeys(fresh[:new]))
        return [*fresh[:new], *again]


def stand_in(reference: str, words: int, number: int) -> str:
    """A caption of `words` words: those of the reference in an order of their own, another for each `number`."""
    known = reference.split()
    if not known:
        return ""
    drawn = [known[i % len(known)] for i in range(max(1, words))]
    random.Random(f"{number} {reference}").shuffle(drawn)
    return " ".join(drawn)


def growth_of(groups: Sequence[Sequence[str]]) -> float | None:
    """`Language.growth` of real captions, without a judge; None where it cannot be told.

    Pairs of neighbouring words, fillers such as "the" and "is" left out, stand for assertions.

    Args:
        groups: captions of each image, at least two.
    """
    apart = together = 0
    for group in groups:
        pairs = [_pairs(caption) for caption in group]
        apart += sum(map(len, pairs))
        together += len(set().union(*pairs))
    size = sum(map(len, groups)) / len(groups) if groups else 0
    if size < 2 or not apart:
        return None
    return max(0.0, min(1.0, 1 + log(together / apart) / log(size)))


def _pairs(text: str) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for sentence in re.split(r"[.!?;\n]+", text.lower()):
        found |= set(pairwise(word for word in _WORD.findall(sentence) if not _FILLER.fullmatch(word)))
    return found
