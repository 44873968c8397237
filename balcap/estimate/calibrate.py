"""Measured figures in the place of assumptions: from units that are paid for, and from the ledger of a run."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

from balcap.estimate.forecast import Sample
from balcap.estimate.language import Language
from balcap.estimate.rehearsal import PaidAnswers, open_to_read
from balcap.estimate.usage import Key, Usage, Usages
from balcap.judge import Decompose, Judge
from balcap.judge.prompt import Question

_LEAST_UNITS = 30  # that say more than the assumption
_LEAST_CALLS = 8


def with_paid_units(
    samples: Sequence[Sample], judge: Judge, paid: PaidAnswers | None
) -> list[list[str] | None]:
    """What each reference asserts, where the data hold it or the judge has said it before."""
    found: list[list[str] | None] = []
    task = Decompose()
    question = Question(task, {}, judge.settings.routes(task.name), judge.settings.images)
    for sample in samples:
        if sample.reference_units is not None:
            found.append(list(sample.reference_units))
            continue
        keys = question.keys((sample.reference,))
        answers = list(paid.get_many(keys).values()) if paid is not None else []
        found.append(json.loads(answers[0]) if answers else None)
    return found


def language_of_units(
    language: Language, references: Sequence[str], units: Sequence[Sequence[str] | None]
) -> Language | None:
    """`language` with the sizes of these references and their units; None if they are too few to tell."""
    known = [(text, made) for text, made in zip(references, units, strict=True) if made]
    said = [unit for _, made in known for unit in made]
    if len(said) < _LEAST_UNITS:
        return None
    return replace(
        language,
        words_per_assertion=sum(len(text.split()) for text, _ in known) / len(said),
        words_in_assertion=sum(len(unit.split()) for unit in said) / len(said),
    )


@dataclass(frozen=True)
class Booked:
    """What a ledger says of one kind of judgment by one model.

    Attributes:
        answered: calls that were answered, and what they used.
        all: all calls, failed ones and repetitions included.
        per_call, per_item: tokens (in, out) that a call and each of its items use.
    """

    answered: Usage
    all: Usage
    per_call: tuple[float, float]
    per_item: tuple[float, float]


def read_ledger(path: str | Path) -> dict[Key, Booked]:
    """A ledger's figures, where it holds enough calls to tell.

    Raises:
        ValueError: if there is no such file or it is no ledger; for a person.
    """
    connection = open_to_read(path)
    if connection is None:
        raise ValueError(f"ledger: {path} does not exist")
    try:
        rows = connection.execute(
            "SELECT task, model, outcome = 'ok', items, tokens_in, tokens_out FROM calls"
        ).fetchall()
    except sqlite3.Error as error:
        raise ValueError(f"ledger: {path} is no ledger of judgments ({error})") from None
    finally:
        connection.close()
    found = {}
    for key in sorted({(task, model) for task, model, *_ in rows}):
        mine = [row[2:] for row in rows if row[:2] == key]
        good = [row[1:] for row in mine if row[0]]
        if len(good) >= _LEAST_CALLS:
            found[key] = _booked(good, [row[1:] for row in mine])
    return found


def _booked(good: Sequence[Sequence[int]], everything: Sequence[Sequence[int]]) -> Booked:
    lines = [_line([row[0] for row in good], [row[column] for row in good]) for column in (1, 2)]
    return Booked(
        answered=_sum(good),
        all=_sum(everything),
        per_call=(lines[0][0], lines[1][0]),
        per_item=(lines[0][1], lines[1][1]),
    )


def _sum(rows: Sequence[Sequence[int]]) -> Usage:
    return Usage(len(rows), *(float(sum(row[column] for row in rows)) for column in range(3)))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares ``y = a + b x`` with a, b >= 0; (0, mean ratio) where x does not vary."""
    n, mean_x, mean_y = len(x), sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in x)
    slope = sum((x[i] - mean_x) * (y[i] - mean_y) for i in range(n)) / spread if spread else mean_y / mean_x
    slope = min(max(slope, 0.0), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def as_booked(used: Usages, booked: Mapping[Key, Booked]) -> Usages:
    """`used` with the tokens that the ledger's calls took for as many calls and items, and its repetitions."""
    found = Usages()
    for key, usage in used.items():
        found[key] = usage
        if (known := booked.get(key)) is not None:
            tokens = [
                usage.calls * call + usage.items * item
                for call, item in zip(known.per_call, known.per_item, strict=True)
            ]
            again = known.all.calls / known.answered.calls
            found[key] = Usage(
                usage.calls * again,
                usage.items * again,
                tokens[0] * known.all.tokens_in / known.answered.tokens_in,
                tokens[1] * known.all.tokens_out / known.answered.tokens_out,
            )
    return found


def language_of_ledger(
    language: Language, booked: Mapping[Key, Booked], used: Usages, captions: int
) -> Language | None:
    """`language` under which captions make as many verified assertions as in the ledger.

    Args:
        language: that `used` was played with.
        booked: the ledger; it must hold ``verify`` and ``rate``.
        used: by the run as it was played.
        captions: of one image, over all of its visits, that share their verdicts; 1 if each has its own.

    Returns:
        None where the ledger cannot tell.
    """
    wanted, played = _verified_per_caption(booked), _verified_per_caption(used)
    if wanted is None or played is None:
        return None
    ratio = wanted / played
    if captions > 1:
        growth = language.growth + log(ratio) / log(captions)
        bounded = min(1.0, max(0.0, growth))
        ratio = captions ** (growth - bounded)
        language = replace(language, growth=bounded)
    return replace(language, words_per_assertion=language.words_per_assertion / ratio)


def _verified_per_caption(used: Mapping[Key, Booked] | Usages) -> float | None:
    """Assertions that are verified for each caption that is rated."""
    items = {"verify": 0.0, "rate": 0.0}
    for (task, _), usage in used.items():
        if task in items:
            items[task] += usage.answered.items if isinstance(usage, Booked) else usage.items
    return items["verify"] / items["rate"] if items["verify"] and items["rate"] else None
