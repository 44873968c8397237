"""``python main.py recaption``: new reference captions for a data set, from any model that litellm reaches.

The paper's data step (arXiv 2605.07394 has GPT-5-mini re-write the references of ShareGPT4V). What is written
is a ShareGPT4V file whose rows also hold the assertions of their caption, so that training asks nobody about
references.

`recaption_settings.py` holds its own settings, `recaption_run.py` what it asks; all else is that of `rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from balcap.commands.recaption_settings import RecaptionSettings
from balcap.commands.rows import run_command

__all__ = ["RecaptionSettings", "main"]


def main(args: Sequence[str] | None = None) -> None:
    """The command with these arguments; see `run_command`."""
    description = "Write new reference captions for a data set, and what they assert (arXiv 2605.07394)."
    run_command(args, description, RecaptionSettings, _run)


def _run(settings: RecaptionSettings) -> Any:
    from balcap.commands.recaption_run import RecaptionRun  # imports torch

    return RecaptionRun(settings)
