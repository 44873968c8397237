"""What tests of studies share: processes that run in the test's own, and the table that a study ends in."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


class Here:
    """Processes that have run in this one as soon as they have started."""

    def __init__(self, cli: Any) -> None:
        self.cli, self.commands, self.fail = cli, [], ""

    def __call__(self, command: list[str], log: Path) -> Here:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("it went wrong\n")
        self.commands.append((command[2], log.parent.name))
        if log.parent.name != self.fail:
            self.cli(command[2:])
        self.status = int(log.parent.name == self.fail)
        return self

    def poll(self) -> int:
        return self.status

    def send_signal(self, sig: int, /) -> None:
        raise AssertionError("it has ended")


def table(out: Path) -> list[dict[str, str]]:
    with (out / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))
