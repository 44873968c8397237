"""Tutorials as a reader follows them: files are written and commands typed, in order, into one shell.

A tutorial consists of fenced blocks of these kinds, and no others:

==================================  =========================================================================
``bash``                            commands, which are executed
``bash``, first line ``# needs …``  commands for which this machine lacks something: they run with `checked` programs
``<language> title="<file>"``       a file, which is written; the line before names it, since GitHub shows no titles
``text``                            lines of the output of the commands before; numbers may differ, ``…`` is any text
==================================  =========================================================================

Run as a script, this is the server of `tests.warm_python` whose commands are checked where ``CHECKED`` is set.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from tests import warm_python
from tests.support import ROOT

_BLOCK = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_END = "--8<-- end of block"
_SHIMS = {
    "torchrun": 'exec python torchrun "$@"',
    "pip": 'exec python pip "$@"',
    "srun": 'while [ "$1" != python ]; do shift; done; exec "$@"',
    "sbatch": 'exec bash -eu "$@"',
    "make": 'exec /usr/bin/make --dry-run "$@"',
}
"""Programs that are checked -> what they run instead."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: where it begins in the tutorial.
        kind: ``run``, ``check``, ``file`` or ``output``.
        title: the file's name.
        text: what stands in it.
    """

    line: int
    kind: str
    title: str
    text: str


def blocks(tutorial: str) -> list[Block]:
    """The blocks of a tutorial.

    Raises:
        ValueError: a block of another kind, or one that is not closed.
    """
    found = []
    for match in _BLOCK.finditer(tutorial):
        line, (language, options, text) = tutorial.count("\n", 0, match.start()) + 1, match.groups()
        before = tutorial[: match.start()].rstrip().rpartition("\n")[2]
        title = re.fullmatch(r' title="([^"]+)"', options)
        if language == "bash" and not options:
            kind = "check" if text.startswith("# needs ") else "run"
        elif language == "text" and not options:
            kind = "output"
        elif language not in ("", "bash", "text") and title and f"`{title.group(1)}`" in before:
            kind = "file"
        else:
            raise ValueError(f"line {line}: ```{language}{options} is no kind of block that tutorials have")
        found.append(Block(line, kind, title.group(1) if title else "", text))
    if tutorial.count("```") != 2 * len(found):
        raise ValueError("a fence is not closed, or stands within a line")
    return found


def script(tutorial: list[Block], programs: Path) -> str:
    """What a reader types, for bash; a line with `_END` follows the output of each block.

    Args:
        tutorial: its blocks.
        programs: folder of the checked programs.
    """
    lines = ["set -euo pipefail"]
    for block in tutorial:
        if block.kind == "file":
            lines += [
                f"mkdir -p $(dirname {block.title}); cat > {block.title} <<'--8<--'",
                block.text + "--8<--",
            ]
        elif block.kind == "check":
            lines += [
                f'before=$PATH; export CHECKED=1 PATH="{programs}:$PATH"',
                block.text,
                "for job in $(jobs -p); do wait $job; done; unset CHECKED; PATH=$before",
            ]
        elif block.kind == "run":
            lines.append(block.text)
        lines.append(f"echo '{_END}'")
    return "\n".join(lines)


def outputs(printed: str) -> list[str]:
    """What each block printed, by the output of `script`; the last one ended early where there are fewer than blocks."""
    return [part.removeprefix("\n") for part in printed.split(_END)][:-1]


def missing_lines(expected: str, printed: str) -> list[str]:
    """Lines of `expected` that are not in `printed`, numbers, spaces and colours aside."""
    there = [_plain(line) for line in printed.splitlines()]
    return [
        line
        for line in expected.splitlines()
        if line.strip() not in ("", "…")
        and not any(re.search(re.escape(_plain(line)).replace("…", ".*"), other) for other in there)
    ]


def _plain(line: str) -> str:
    without_colours = re.sub(r"\x1b\[[\d;]*m", "", line.split("\r")[-1])
    return re.sub(r"[\s─━]+", " ", re.sub(r"-?\d+(?:[.,]\d+)*", "#", without_colours)).strip()


def write_programs(folder: Path) -> None:
    """`_SHIMS` as files."""
    for name, command in _SHIMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)


def checked(argv: list[str]) -> list[str]:
    """What runs in place of ``python <argv>`` where something is missing: as much of it as is possible without.

    Raises:
        ValueError: there is no such check.
    """
    from balcap.cli import BalCapCLI
    from balcap.commands import serve

    if "CHECKED" not in os.environ:
        return argv
    first, *rest = argv
    if first == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(rest)
        return checked([launched.training_script, *launched.training_script_args])
    if first == "pip" and rest[0] == "install":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for one in rest[1:]:
            if (wanted := re.fullmatch(r"\.\[(.*)\]", one)) and not set(wanted.group(1).split(",")) <= set(
                extras
            ):
                raise ValueError(f"pyproject.toml has not all of the extras {one}")
            if one.endswith((".lock", ".txt")) and not (ROOT / one).exists():
                raise ValueError(f"there is no {one}")
        return ["-c", ""]
    commands = BalCapCLI.subcommands()
    if first == "main.py" and (
        rest[0] in commands or rest[0] == "serve"
    ):  # only its parser is made, for speed
        own = "fit" if rest[0] == "serve" else rest[0]
        BalCapCLI.subcommands = staticmethod(lambda: {own: commands[own]})
    if first == "main.py" and rest[0] in commands:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of the process
        return [*argv, "--print_config"]
    if first == "main.py" and rest[0] == "serve":
        serve.server_flags = (
            lambda policy, sampling: []
        )  # those that the model's processor, on the hub, decides
        serve.main(["--show", *rest[1:]])
        return ["-c", ""]
    raise ValueError(f"no check of: {' '.join(argv)}")


if __name__ == "__main__":
    warm_python.serve(sys.argv[1], checked)
