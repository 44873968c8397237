"""``python main.py annotate``: write questions or rubrics about your images into their rows, for CapRL or RubiCap.

CapRL (arXiv 2509.22647) rewards what questions about the image a caption answers, RubiCap (arXiv 2603.09160) what
criteria it meets. Both are written beforehand, by a judge that sees the image and the reference.

`annotate_settings.py` holds its own settings, `annotate_run.py` what it asks; all else is that of `rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from balcap.commands.annotate_settings import AnnotateSettings
from balcap.commands.rows import run_command


def main(args: Sequence[str] | None = None) -> None:
    """The command with these arguments; see `run_command`."""
    run_command(args, "Write questions or rubrics about images into their rows.", AnnotateSettings, _run)


def _run(settings: AnnotateSettings) -> Any:
    from balcap.commands.annotate_run import AnnotateRun  # imports torch

    return AnnotateRun(settings)
