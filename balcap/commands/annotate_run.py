"""An annotation run: rows in, rows with questions or a rubric out (`rows_run.py`)."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from balcap.commands.annotate_settings import AnnotateSettings
from balcap.commands.rows_run import RowsRun
from balcap.judge import JudgeFailure
from balcap.judge.tasks import Quiz, WrittenQuestion
from balcap.judge.tasks.answer import Choice


class AnnotateRun(RowsRun):
    """Row by row. Further rows of an image get what its first row gets."""

    settings: AnnotateSettings

    def __init__(self, settings: AnnotateSettings) -> None:
        super().__init__(settings)
        self.done = "have questions" if settings.what == "questions" else "have a rubric"

    async def ask_chunk(self, rows: Sequence[int]) -> None:
        await asyncio.gather(*map(self._annotate, rows))

    async def _annotate(self, row: int) -> None:
        images, settings = await self.read_images(row), self.settings
        if images is None or self.is_ending():
            return
        reference = "\n".join(self.table[row]["captions"] or ())
        (written,) = await self.judge.ask(settings.writes, [reference], image=images, number=settings.number)
        if isinstance(written, JudgeFailure):
            self.give_up(row, written.kind, str(written))
        elif settings.what == "rubric":
            rubric = [{"criterion": one.criterion, "weight": int(one.weight)} for one in written]
            self.settle(row, rubric, answers=1)
        else:
            await self._check(row, images, written)

    async def _check(self, row: int, images: tuple[bytes, ...], written: list[WrittenQuestion]) -> None:
        """Keep the questions that the image answers, always, and their wording does not, always."""
        trials, name = self.settings.checks, self.table[row]["sample_id"]
        quizzes = [
            (seen, quiz_of(written, f"{name}/{trial}")) for trial in range(trials) for seen in (images, ())
        ]
        if self.is_ending():
            return
        asked = [self.judge.ask(Quiz, items, image=seen) for seen, (items, _) in quizzes]
        seeing, blind = [True] * len(written), [trials > 0] * len(written)  # right in all trials so far
        for answers, (seen, (_, places)) in zip(await asyncio.gather(*asked), quizzes, strict=True):
            for number, (answer, place) in enumerate(zip(answers, places, strict=True)):
                if isinstance(answer, JudgeFailure):
                    self.give_up(row, answer.kind, str(answer))
                    return
                (seeing if seen else blind)[number] &= answer == place
        kept = [
            asdict(one)
            for one, shown, guessed in zip(written, seeing, blind, strict=True)
            if shown and not guessed
        ]
        if kept:
            self.settle(row, kept, answers=1 + len(quizzes) * len(written))
        else:
            self.give_up(row, "no_questions", "none is answered by the image and not by its own words")

    def new_row(self, row: int, raw: Any) -> Any:
        """As it was, with the annotation where there is one; nothing of rows that are left for the next run, or out."""
        first, what = self.same.get(row, row), self.settings.what
        if (answer := self.answered.get(first)) is not None:
            return {
                **raw,
                what: json.loads(answer),
                f"{what}_model": self.settings.asked_model(self.settings.writes),
            }
        return raw if first in self.quarantine else None


def quiz_of(questions: Sequence[WrittenQuestion], seed: str) -> tuple[list[Choice], list[int]]:
    """The questions with their choices shuffled, always alike for the same seed; and the places of the right ones."""
    draw = random.Random(seed)
    options = [draw.sample(question.choices, len(question.choices)) for question in questions]
    items: list[Choice] = [
        {"question": one.question, "options": of} for one, of in zip(questions, options, strict=True)
    ]
    return items, [of.index(one.answer) for one, of in zip(questions, options, strict=True)]
