"""A judge that errs: the oracle's answers, changed by ``model.judge.params: {noise: {flip: 0.1}}``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Noise:
    """How a judge errs, each in [0, 1]; all 0 is the oracle.

    The same question gets the same answer: what is drawn depends on the image and the text that is judged.

    Attributes:
        flip: share of answers, whether an assertion is true or a unit covered, that are wrong.
        lenient: share of assertions that are not true, and of units that are not covered, that are taken for it.
        position: the same, growing from 0 for the first item of a list to this for the last; and the share of comparisons
            that the first caption wins, whatever it says.
        length: how much of what a caption lacks to a full mark for language it gets for its length alone, at 100 words.
    """

    flip: float = 0.0
    lenient: float = 0.0
    position: float = 0.0
    length: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= (value := getattr(self, field.name)) <= 1:
                raise ValueError(f"noise.{field.name}: {value} is outside [0, 1]")

    def said(self, right: bool, place: int, count: int, *about: str) -> bool:
        """What is said where `right` is, about item `place` of `count`.

        Args:
            about: image and texts of the question.
        """
        wrong = self.flip
        if not right:
            wrong += self.lenient + self.position * place / max(1, count - 1)
        return right != (drawn(*about) < wrong)

    def rated(self, score: float, text: str) -> float:
        """A mark for language, in [0, 1]."""
        return score + (1 - score) * self.length * min(1.0, len(text.split()) / 100)

    def first_wins(self, *about: str) -> bool:
        """Whether a comparison is decided by the order alone."""
        return drawn(*about) < self.position


def drawn(*about: str) -> float:
    """A number in [0, 1) that depends on these texts alone."""
    return int.from_bytes(hashlib.sha256("\0".join(about).encode()).digest()[:8]) / 2**64
