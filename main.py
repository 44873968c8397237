"""Train, measure and use a captioner: ``python main.py {fit,validate,test,predict} --config configs/shapes.yaml``;
``check``, ``plan`` and ``estimate`` take the same and look at a run before it starts.

``recaption --config configs/recaption.yaml`` writes the references that it is trained on, ``annotate`` questions or rubrics;
``study`` makes many runs of one question; ``serve`` starts a vLLM server that samples for a run; ``push`` uploads an export;
``general`` runs lmms-eval; ``cache`` and ``ledger`` show what judges have answered and cost.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "init": ("balcap.commands.init", "main"),
    "recaption": ("balcap.commands.recaption", "main"),
    "annotate": ("balcap.commands.annotate", "main"),
    "cache": ("balcap.commands.ledger", "run_cache"),
    "ledger": ("balcap.commands.ledger", "run_ledger"),
    "report": ("balcap.commands.report", "main"),
    "study": ("balcap.commands.study", "main"),
    "export": ("balcap.commands.export", "main"),
    "push": ("balcap.commands.push", "main"),
    "general": ("balcap.commands.general", "main"),
    "serve": ("balcap.commands.serve", "main"),
}
"""Commands beside Lightning's own -> module and function that run them."""

RUNS = {
    "fit": "train a captioner",
    "check": "whether model and engine do what training relies on, on a few of your images",
    "plan": "whether a fit has enough memory on its GPUs; nothing is loaded",
    "estimate": "what the judge of a fit will cost; nothing is paid",
    "validate": "rewards of captions of held-out images",
    "predict": "captions of your images",
    "test": "benchmarks of captioners",
}
"""Lightning's commands, all with the config of a run, and what each is for."""

TRUSTED_ONLY = "--trusted_only"
"""Any command with it refuses a config that names code of other packages."""

CHANGED = "--changed"
"""Any command that reads a config prints, with it, the settings that are not as by default, and ends."""


def share_cores() -> None:
    """How torch's idle OpenMP threads wait, unless the user has said so; to be called before torch is imported.

    Waiting threads spin. Beside other programs that costs them and us most of the machine, so they sleep at once
    there, and soon elsewhere; docs/performance.md has the figures.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1)
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE"} if busy else {"GOMP_SPINCOUNT": "20000"}


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; `args` defaults to the command line. Tests call this in process."""
    from balcap.utils.errors import UserError, next_line

    share_cores()
    given = sys.argv if args is None else ["main.py", *args]
    try:
        if TRUSTED_ONLY in given:
            from balcap.utils.trusted import check_trusted

            given.remove(TRUSTED_ONLY)
            check_trusted(given[1:])
        if CHANGED in given:
            words = [word for word in given[1:] if word not in (CHANGED, "--print_config")]
            given[1:] = [*words[:1], "--print_config=skip_default", *words[1:]]
        command, *rest = given[1:] or [""]
        if command in ("", "-h", "--help") or not (
            command.startswith("-") or command in {**RUNS, **COMMANDS}
        ):
            from balcap.commands.listing import list_commands

            list_commands("" if command.startswith("-") else command, RUNS, COMMANDS)
            return
        if command in COMMANDS:
            module, function = COMMANDS[command]
            getattr(import_module(module), function)(rest)
            return
        from balcap.cli import BalCapCLI

        BalCapCLI(
            args=None if args is None else given[1:]
        )  # None: Lightning reads sys.argv, which it prefers
    except UserError as error:
        raise SystemExit(f"Error: {error}{next_line(given[1:], [str(error)])}") from None


if __name__ == "__main__":
    main()
