"""The settings of ``annotate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from balcap.commands.rows_settings import RowsSettings
from balcap.judge import Task
from balcap.judge.tasks import Quiz, WriteQuestions, WriteRubric


@dataclass
class AnnotateSettings(RowsSettings):
    """Questions or rubrics about images, in their rows.

    What is written at the end are the rows as they were, with one more key, ``questions`` or ``rubric``, and
    ``questions_model`` or ``rubric_model``. Rows that get none, because their image or the judge fails, are kept without.

    Args:
        what: ``questions``, which CapRL needs, or ``rubric``, which RubiCap needs.
        number: questions or criteria of an image, at most.
        trials: every question is answered so often with the image and as often without it, its choices in another order each
            time. It is kept if it is right every time with the image, and not every time without: a guess may be right
            once. 0 keeps all. Of questions alone.
    """

    command: ClassVar[str] = "annotate"

    what: Literal["questions", "rubric"] | None = None
    number: int = 8
    trials: int = 2

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.what is None:
            problems.append("what is required: questions (for CapRL) or rubric (for RubiCap)")
        for key, least in (("number", 1), ("trials", 0)):
            if getattr(self, key) < least:
                problems.append(f"{key}: {getattr(self, key)} must be at least {least}")
        return problems

    @property
    def writes(self) -> type[Task[Any]]:
        """The task that writes them."""
        return WriteQuestions if self.what == "questions" else WriteRubric

    @property
    def checks(self) -> int:
        """Trials, with the image and as often without."""
        return self.trials if self.what == "questions" else 0

    def tasks(self) -> list[type[Task[Any]]]:
        return [self.writes, *([Quiz] if self.checks else [])]

    def own_identity(self) -> dict[str, Any]:
        return {"what": self.what, "number": self.number, "trials": self.checks}
