"""Train, validate and use a captioner: ``python main.py {fit,validate,predict} --config configs/shapes.yaml``."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; `args` defaults to the command line. Tests call this in process."""
    from balcap.cli import BalCapCLI

    BalCapCLI(args=args)


if __name__ == "__main__":
    main()
