"""``python main.py recaption``: settings from YAML and the command line, checked at once, then the run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from balcap.recaption.settings import Recaptioner


def main(args: Sequence[str] | None = None) -> None:
    """Run with these arguments; returns if all is well.

    Raises:
        SystemExit: with the status of `balcap.recaption.settings.Outcome`, or a message.
    """
    parser = ArgumentParser(
        prog="main.py recaption",
        description="Write new reference captions for a data set, and what they assert (arXiv 2605.07394).",
    )
    parser.add_argument("--config", action="config", help="Path to a configuration file; may be repeated.")
    parser.add_class_arguments(Recaptioner)
    settings = parser.instantiate(parser.parse_args(args))
    settings.pop("config", None)
    recaptioner = Recaptioner(**settings.as_dict())
    if problems := recaptioner.problems():
        _refuse(problems)
    _run(recaptioner)


def _run(recaptioner: Recaptioner) -> None:
    from balcap.data.sharegpt4v import DataError
    from balcap.judge import StoreError
    from balcap.recaption.checks import own_keys
    from balcap.recaption.journal import JournalError

    try:
        outcome = recaptioner.run()
    except JournalError as error:
        _refuse(error.problems)
    except (DataError, StoreError) as error:
        raise SystemExit(own_keys(str(error))) from None
    except OSError as error:
        raise SystemExit(
            f"out: cannot write {error.filename or recaptioner.files.journal} ({error.strerror}). What is there "
            "is kept: run the same command once there is room, and a folder that you may write to"
        ) from None
    except KeyboardInterrupt:  # before the first question
        raise SystemExit(128 + signal.SIGINT) from None
    else:
        print(outcome.message, file=sys.stderr if outcome.status else sys.stdout, flush=True)
        if outcome.status:
            raise SystemExit(outcome.status)


def _refuse(problems: list[str]) -> None:
    from balcap.cli import ConfigError  # brings Lightning along

    raise ConfigError(problems)
