"""What commands that ask a judge about all rows of a data set have in common: their command line and how they end.

`rows_settings.py` holds their settings, `rows_run.py` the run, `rows_files.py` what it writes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from balcap.commands.rows_settings import RowsSettings, own_keys
from balcap.config import ConfigError
from balcap.data.json_files import DataError
from balcap.judge import StoreError
from balcap.utils.arguments import Parser, SettingsFile

if TYPE_CHECKING:
    from balcap.commands.rows_run import RowsRun


def run_command(
    args: Sequence[str] | None,
    description: str,
    settings_type: type[RowsSettings],
    make_run: Callable[[Any], RowsRun],
) -> None:
    """A command with these arguments; returns if all is well.

    Args:
        args: of the command line.
        description: what the command is for.
        settings_type: its settings.
        make_run: settings -> the run.

    Raises:
        SystemExit: with a status other than 0, or a message.
    """
    parser = Parser(prog=f"main.py {settings_type.command}", description=description)
    parser.add_argument(
        "--config", action=SettingsFile, help="Path to a configuration file; may be repeated."
    )
    parser.add_class_arguments(settings_type)
    values = parser.instantiate(parser.parse_args(args)).as_dict()
    values.pop("config", None)
    settings = settings_type(**values)
    if problems := settings.problems():
        raise ConfigError(problems)
    assert settings.judge is not None
    for line in settings.judge.settings.endings("take another judge.model, such as openai/gpt-6-luna"):
        print(line, file=sys.stderr, flush=True)
    try:
        status, message = make_run(settings).run()
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
