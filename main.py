"""Train, validate and use a captioner: ``python main.py {fit,estimate,validate,predict} --config configs/shapes.yaml``.

``recaption --config configs/recaption.yaml`` writes the references that it is trained on; ``serve`` starts a vLLM
server that samples for a run; ``cache`` and ``ledger`` show what judges have answered and cost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "recaption": ("balcap.recaption.cli", "main"),
    "cache": ("balcap.judge.inspect", "run_cache"),
    "ledger": ("balcap.judge.inspect", "run_ledger"),
    "serve": ("balcap.rollout.serve", "main"),
}
"""Commands beside Lightning's own -> module and function that run them."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; `args` defaults to the command line. Tests call this in process."""
    command, *rest = (sys.argv[1:] if args is None else args) or [""]
    if command in COMMANDS:
        module, function = COMMANDS[command]
        getattr(import_module(module), function)(rest)
        return
    from balcap.cli import BalCapCLI

    BalCapCLI(args=args)


if __name__ == "__main__":
    main()
