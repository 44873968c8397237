"""``python main.py report``: what runs have learned, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from balcap.report.page import write_report
from balcap.report.run import Run, labelled
from balcap.utils.arguments import Parser
from balcap.utils.errors import UserError
from balcap.utils.run_folder import write_problem


def report(runs: Sequence[str], out: str | None = None) -> Path:
    """Write the report of a run, or of several that are compared.

    Args:
        runs: run folders.
        out: the HTML file; None for ``report.html`` in the folder of a single run, and else here.

    Raises:
        UserError: a folder holds no run, or the file cannot be written.
    """
    path = Path(out) if out else (Path(runs[0]) if len(runs) == 1 else Path()) / "report.html"
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder; name a file, such as {path / 'report.html'}")
    if why := write_problem(path.parent):
        raise UserError(f"--out: {why}; name another file")
    return write_report(labelled([Run.read(run) for run in dict.fromkeys(runs)]), path)


def main(args: Sequence[str]) -> None:
    """``python main.py report RUN [RUN …] [--out FILE]``."""
    parser = Parser(
        prog="main.py report",
        description="Curves, captions before and after with their verdicts, costs: one HTML file that needs no network.",
    )
    parser.add_argument("runs", nargs="+", help="Run folders; several are compared.")
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="The file (default: report.html in the run's folder, of several here).",
    )
    given = parser.parse_args(list(args))
    path = report(given.runs, given.out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")
