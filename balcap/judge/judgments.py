"""The answers of a judge to one batch of rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Judgments:
    """Answers per kind of judgment; B and G as in `balcap.types`.

    Attributes:
        answers: task name -> ``[B][G]`` answers, None where the judge failed. For the four tasks:
            ``decompose``: list[str]; ``verify``: list[Verdict], one per assertion of the same caption;
            ``match``: list[bool], one per unit of the same reference; ``rate``: Rating.
        units: ``[B]`` units of the references, None where decomposing the reference failed or was not needed.
        failures: task name -> number of answers that are missing.
        reasons: a few distinct reasons of failure, worded for a person.
    """

    answers: Mapping[str, Sequence[Sequence[Any | None]]]
    units: Sequence[Sequence[str] | None]
    failures: Counter[str] = field(default_factory=Counter)
    reasons: Sequence[str] = ()

    def __getitem__(self, task: str) -> Sequence[Sequence[Any | None]]:
        return self.answers[task]

    def __contains__(self, task: str) -> bool:
        return task in self.answers
