"""The questions that tests put to a judge, one task each, through `Judge.ask`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from balcap.judge import Decompose, Judge, JudgeFailure, Match, Rate, Rating, Verdict, Verify


async def decompose(judge: Judge, captions: Sequence[str]) -> list[list[str] | None]:
    """Assertions of each caption, None where the judge failed."""
    answers = await judge.ask(Decompose, captions)
    return [None if isinstance(answer, JudgeFailure) else answer for answer in answers]


async def verify(judge: Judge, image: bytes, assertions: Sequence[str]) -> list[Verdict]:
    """One verdict per assertion; raises the first failure."""
    return _answers(await judge.ask(Verify, assertions, image=image))


async def match(judge: Judge, units: Sequence[str], assertions: Sequence[str]) -> list[bool]:
    """Whether the assertions cover each unit; raises the failure."""
    return _answers(await judge.ask(Match, [tuple(assertions)], units=tuple(units)))[0]


async def rate(judge: Judge, caption: str) -> Rating:
    """The rating; raises the failure."""
    return _answers(await judge.ask(Rate, [caption]))[0]


def _answers(answers: Sequence[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, JudgeFailure):
            raise answer
    return list(answers)
