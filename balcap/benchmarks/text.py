"""What can be said of captions without a judge: repetition, variety, commentary. Logged at every validation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
# Of the picture's effect, its maker's craft or the describer: nothing that one could point at.
_META = re.compile(
    r"\b(?:moods?|atmospher\w*|ambian\w*|ambien\w*|evok\w+|convey\w*|suggest(?:s|ing)|feelings?|sense of|"
    r"adds? (?:a |an |to |depth|interest)|adding (?:a |an |to |depth|interest)|harmon\w+|serene|serenity|tranquil\w*|"
    r"inviting|captivat\w+|composition|visual(?:ly)? (?:appeal\w*|interest\w*|striking)|storytelling|viewers?|"
    r"overall|in summary|in conclusion)\b",
    re.IGNORECASE,
)


def ngrams(caption: str, n: int) -> list[tuple[str, ...]]:
    """Runs of `n` words, in lower case."""
    words = _WORD.findall(caption.lower())
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def distinct_n(captions: Sequence[str], n: int = 2) -> float:
    """Different n-grams / all n-grams over all captions, in [0, 1] (arXiv 1510.03055); NaN where there are none. Falls with
    the number of captions: compare only equal numbers."""
    grams = [gram for caption in captions for gram in ngrams(caption, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repeated_ngrams(caption: str, n: int = 4) -> float:
    """Share of a caption's n-grams that stood in it before, in [0, 1]; 0 for a short one."""
    grams = ngrams(caption, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def meta_commentary(caption: str) -> float:
    """Share of a caption's sentences with words of mood, effect or composition, in [0, 1]; of English alone, and by a list
    of words: a trend, no judgment. 0 for an empty caption."""
    sentences = [part for part in _SENTENCE.findall(caption) if part.strip()]
    return fmean(bool(_META.search(part)) for part in sentences) if sentences else 0.0


def text_statistics(captions: Sequence[str]) -> dict[str, float]:
    """``distinct_2``, ``repeated_4grams`` and ``meta_commentary`` of some captions: of all together, and two means."""
    if not captions:
        return {}
    return {
        "distinct_2": distinct_n(captions),
        "repeated_4grams": fmean(map(repeated_ngrams, captions)),
        "meta_commentary": fmean(map(meta_commentary, captions)),
    }
