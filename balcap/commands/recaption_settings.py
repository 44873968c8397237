"""The settings of ``recaption``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from balcap.commands.rows_settings import RowsSettings
from balcap.judge import Decompose, Recaption, Task


@dataclass
class RecaptionSettings(RowsSettings):
    """New reference captions for a data set, and what they assert.

    What is written at the end is a ShareGPT4V file in the order of the data set. The judge writes the captions and says
    what they assert; ``per_task.decompose`` may name another model for the latter, best that of the training run.

    Args:
        prompts: instructions, of which every image gets the one that its path and `seed` pick; null for the
            row's own question.
        seed: of the choice among `prompts`.
    """

    command: ClassVar[str] = "recaption"

    prompts: list[str] | None = None
    seed: int = 0

    def tasks(self) -> list[type[Task[Any]]]:
        return [Recaption, Decompose]

    def own_identity(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "seed": self.seed if self.prompts else None}
