"""``python main.py recaption``: new reference captions for a data set, from any model that litellm reaches.

The paper's data step (arXiv 2605.07394 has GPT-5-mini re-write the references of ShareGPT4V). What is written
is a ShareGPT4V file whose rows also hold the assertions of their caption, so that training asks nobody about
references.

`recaption_settings.py` holds the settings, `recaption_run.py` the run, `recaption_files.py` what it writes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from balcap.commands.recaption_settings import RecaptionSettings, own_keys
from balcap.config import ConfigError
from balcap.data.json_files import DataError
from balcap.judge import StoreError
from balcap.utils.arguments import Parser, SettingsFile


def main(args: Sequence[str] | None = None) -> None:
    """The command with these arguments; returns if all is well.

    Raises:
        SystemExit: with a status other than 0, or a message.
    """
    parser = Parser(
        prog="main.py recaption",
        description="Write new reference captions for a data set, and what they assert (arXiv 2605.07394).",
    )
    parser.add_argument(
        "--config", action=SettingsFile, help="Path to a configuration file; may be repeated."
    )
    parser.add_class_arguments(RecaptionSettings)
    values = parser.instantiate(parser.parse_args(args)).as_dict()
    values.pop("config", None)
    settings = RecaptionSettings(**values)
    if problems := settings.problems():
        raise ConfigError(problems)
    assert settings.judge is not None
    for line in settings.judge.settings.endings("take another judge.model, such as openai/gpt-6-luna"):
        print(line, file=sys.stderr, flush=True)
    from balcap.commands.recaption_run import RecaptionRun  # imports torch

    try:
        status, message = RecaptionRun(settings).run()
    except (DataError, StoreError) as error:
        raise SystemExit(own_keys(str(error))) from None
    except OSError as error:
        raise SystemExit(
            f"out: cannot write {error.filename or settings.out} ({error.strerror}). What was paid for is kept: "
            "run the same command once there is room, and a folder that you may write to"
        ) from None
    except KeyboardInterrupt:  # before the first question
        raise SystemExit(128 + signal.SIGINT) from None
    print(message, file=sys.stderr if status else sys.stdout, flush=True)
    if status:
        raise SystemExit(status)
