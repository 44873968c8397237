"""What ``python main.py`` says without a command, or with one that there is not."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path


def list_commands(word: str, runs: Mapping[str, str], commands: Mapping[str, tuple[str, str]]) -> None:
    """Print a line for each command.

    Args:
        word: what was typed instead of a command, or nothing.
        runs: command -> what it is for.
        commands: command -> its module, whose first line says what it is for, and the function.

    Raises:
        SystemExit: with status 2 where there is a word.
    """
    lines = {**runs, **{name: _purpose(module) for name, (module, _) in commands.items()}}
    width = max(map(len, lines))
    table = "\n".join(f"  {name:{width}}  {text}" for name, text in lines.items())
    meant = {text.split()[0]: name for name, text in runs.items()} | {
        name: name for name in lines
    }  # train: fit
    found = [meant[near] for near in difflib.get_close_matches(word, meant, n=1)] if word else []
    out = sys.stderr if word else sys.stdout
    if word:
        print(f"Error: there is no command {word}.{f' Is it {found[0]}?' if found else ''}", file=out)
    print(f"Train, measure and use image captioners (arXiv 2605.07394). Commands:\n{table}", file=out)
    print(f"Next: python main.py {found[0] if found else '<command>'} --help", file=out)
    if word:
        raise SystemExit(2)


def _purpose(module: str) -> str:
    """The first line of the module, read and not imported."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition("``: ")[2].rstrip(".")
