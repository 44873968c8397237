"""The processes of a study: some at a time, stopped together, and none that outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from balcap.utils.errors import UserError
from balcap.utils.run_folder import in_use

if TYPE_CHECKING:
    from balcap.commands.study_runs import StudyRun

LOG = "study.log"
"""In a run's folder: what its processes print."""
PATIENCE_S = 60.0
"""How long a run may be held by a process that a killed study has left, and which writes its checkpoint."""


class Process(Protocol):
    """What of `subprocess.Popen` is used."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...


@dataclass
class Work:
    """Takes runs to their ends in processes, some at a time.

    A run that fails is reported and ends no other. Ctrl-C and SIGTERM are passed on once to each process, which ends with
    a checkpoint. A process dies with this one, however that ends (on Linux).

    Attributes:
        at_once: processes at a time.
        start: makes one of a command, which prints into a file.
        failures: a line for each run that failed.
    """

    at_once: int = 1
    start: Callable[[list[str], Path], Process] = field(default_factory=lambda: start)
    failures: list[str] = field(default_factory=list)
    _signals: list[int] = field(default_factory=list)
    _working: list[_Working] = field(default_factory=list)

    def run(self, runs: Sequence[StudyRun]) -> None:
        """Everything that is left of these runs."""
        waiting = [one for one in map(_Working, runs) if one.left]
        ends = (signal.SIGINT, signal.SIGTERM)
        before = {sign: signal.signal(sign, self._stop) for sign in ends}
        try:
            while self._working or (waiting and not self.stopped):
                while waiting and not self.stopped and len(self._working) < self.at_once:
                    one = waiting.pop(0)
                    self._working.append(one)
                    self._next(one)
                for one in list(self._working):
                    if one.process is None:
                        continue
                    if one.process.poll() is not None:
                        self._ended(one)
                        continue
                    for sign in self._signals[one.told :]:
                        one.process.send_signal(sign)
                    one.told = len(self._signals)
                time.sleep(0.05)
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    @property
    def stopped(self) -> int | None:
        """The signal that has ended the work; None while there is none."""
        return self._signals[-1] if self._signals else None

    def _next(self, one: _Working) -> None:
        try:
            wait_until_free(one.run.folder)
        except UserError as error:
            self._working.remove(one)
            self._failed(f"{one.run.name}: {error}")
            return
        print(f"{one.run.name}: {one.left[0]} …", flush=True)
        one.process = self.start(one.run.command(one.left[0]), one.run.folder / LOG)

    def _ended(self, one: _Working) -> None:
        assert one.process is not None
        status, name = one.process.poll(), one.left.pop(0)
        if status == 0 and one.left and not self.stopped:
            self._next(one)
            return
        self._working.remove(one)
        if status == 0:
            print(f"{one.run.name}: {'done' if not one.left else 'stopped'}", flush=True)
        elif self.stopped:
            print(f"{one.run.name}: stopped", flush=True)
        else:
            log = one.run.folder / LOG
            self._failed(f"{one.run.name}: {name} ended with status {status}: {_last_line(log)} ({log})")

    def _failed(self, line: str) -> None:
        self.failures.append(line)
        print(line, flush=True)

    def _stop(self, sign: int, _: Any) -> None:
        self._signals.append(sign)
        print("stopping: the runs write their checkpoints", flush=True)


@dataclass
class _Working:
    """A run with what it needs, its process, and how many signals this has got."""

    run: StudyRun
    left: list[str] = field(init=False)
    process: Process | None = None
    told: int = 0

    def __post_init__(self) -> None:
        self.left = self.run.left()


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that Ctrl-C reaches it through us alone; it gets SIGTERM when we die."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
        )


def _die_with(parent: int) -> Callable[[], None]:
    """A function that makes the process that calls it get SIGTERM when `parent` ends."""
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1  # PR_SET_PDEATHSIG

    def tie() -> None:
        prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)

    return tie


def wait_until_free(folder: Path) -> None:
    """Wait for a process that still holds a run folder.

    Raises:
        UserError: it holds it for more than `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with in_use(folder):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
