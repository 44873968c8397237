"""The runs of a study: what each is made with, how far its folder says it is, and the processes that take it on."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from balcap.cli import BalCapCLI
from balcap.commands.study_settings import StudySettings
from balcap.report.run import Run
from balcap.trainer.checkpoint import CheckpointError, find_checkpoint, read_checkpoint
from balcap.utils.errors import UserError
from balcap.utils.run_folder import holds_fit, in_use
from callbacks.benchmark_eval import POLICY
from callbacks.run_config import changed_settings

MAIN = Path(__file__).parents[2] / "main.py"
LOG = "study.log"
"""In a run's folder: what its processes print."""
PATIENCE_S = 60.0
"""How long a run may be held by a process that a killed study has left, and which writes its checkpoint."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: a setting with a seed.

    Attributes:
        name: ``<setting>-<seed>``.
        arm: name of the setting.
        seed: of it.
        folder: for all of it.
        arguments: of ``main.py fit`` and ``test``.
        config: the resolved config of its fit, nested.
        evaluate: whether its policy is measured.
    """

    name: str
    arm: str
    seed: int
    folder: Path
    arguments: list[str]
    config: Mapping[str, Any]
    evaluate: bool

    def left(self) -> list[str]:
        """Commands that it still needs, of ``fit`` and ``test``, by its folder."""
        if not fit_ended(self.folder):
            return ["fit", "test"] if self.evaluate else ["fit"]
        return ["test"] if self.evaluate and not self._tested() else []

    def state(self) -> str:
        """For a person."""
        left = self.left()
        if not left:
            return "done"
        if left == ["test"]:
            return "trained, benchmarks are left"
        try:
            checkpoint = find_checkpoint("last", self.folder)
        except CheckpointError as error:
            return f"no checkpoint can be read: {error}"
        if checkpoint is None:
            return "to do"
        total = self.config["trainer"]["max_steps"]
        return f"goes on from step {read_checkpoint(checkpoint)['global_step']:,} of {total:,}"

    def problems(self) -> list[str]:
        """Why its folder cannot be that of this run."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            if holds_fit(self.folder):
                return [f"{self.folder} holds a run without config.yaml; move it away, or choose another `out`"]
            return []
        changes = [
            change
            for change in changed_settings(path.read_text(), yaml.safe_dump(self.config))
            if change.split(" ")[0] != "run_dir"  # the folder may have been moved
        ]
        way_out = "restore it, or choose another `out`"
        return [f"{self.folder}: made with other settings: {change}; {way_out}" for change in changes]

    def command(self, name: str) -> list[str]:
        """That a process runs."""
        resume = ["--resume=auto"] if name == "fit" else ["--ckpt_path=last"]
        own = [f"--run_dir={self.folder}", f"--seed_everything={self.seed}", *resume]
        return [sys.executable, str(MAIN), name, *self.arguments, *own]

    def _tested(self) -> bool:
        """Whether every benchmark has a score for every captioner."""
        try:
            found = json.loads((self.folder / "benchmarks/comparison.json").read_text())["models"]
        except FileNotFoundError:
            return False
        wanted = [POLICY, *(self.config["benchmark_eval"]["models"] or {})]
        own = [
            score for name in wanted for key, score in found.get(name, {}).items() if "/" not in key
        ]
        return all(name in found for name in wanted) and all(score["score"] is not None for score in own)


def fit_ended(folder: Path) -> bool:
    """Whether a run folder is that of a fit that came to its own end: at its last step, its time or its budget.

    The export is written then, whole or not at all. Without one it is the last checkpoint that tells, and a validation
    of its weights where the run validates.
    """
    if not (folder / "config.yaml").is_file():
        return False
    run = Run.read(folder)
    if run.setting("export.enabled", True):
        return (folder / "export").is_dir()
    checkpoint = find_checkpoint("last", folder)
    if checkpoint is None:
        return False
    step = read_checkpoint(checkpoint)["global_step"]
    validated = [steps[-1] for name, (steps, _) in run.metrics.items() if name.startswith("val/")]
    return step >= run.setting("trainer.max_steps", 0) > 0 and (not validated or max(validated) >= step)


class _ParsedCLI(BalCapCLI):
    """The command line up to where anything is made of the config."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def resolved(arguments: Sequence[str]) -> dict[str, Any]:
    """The config of a fit with these arguments, as its ``config.yaml`` will have it.

    Raises:
        SystemExit: the command line has said what is wrong with them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        cli = _ParsedCLI(args=["fit", *arguments])
    return yaml.safe_load(cli._parser("fit").dump(cli.config["fit"], skip_none=False))


def runs_of(settings: StudySettings) -> list[StudyRun]:
    """All runs x seeds, with their configs resolved; the seeds of a run are together.

    Raises:
        SystemExit: a config does not parse; the command line has said why.
    """
    runs = []
    for name in settings.runs:
        arguments = settings.arguments(name)
        try:
            config = resolved([*arguments, "--resume=auto"])
        except SystemExit:
            print(f"This is of the run {name} of the study.", file=sys.stderr)
            raise
        for seed in settings.seeds:
            folder = settings.folder / f"{name}-{seed}"
            own = config | {"seed_everything": seed, "run_dir": str(folder)}
            runs.append(StudyRun(folder.name, name, seed, folder, arguments, own, settings.evaluate))
    return runs


def run_problems(runs: Sequence[StudyRun]) -> list[str]:
    """Of configs and folders, all together."""
    problems = [problem for run in runs for problem in run.problems()]
    for run in {run.arm: run for run in runs}.values():
        if run.evaluate and not run.config["benchmark_eval"]["benchmarks"]:
            problems.append(
                f"evaluate: the config of {run.arm} names no benchmarks (benchmark_eval.benchmarks); name some, or set "
                "evaluate: false"
            )
    return problems


class Process(Protocol):
    """What of `subprocess.Popen` is used."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...


@dataclass
class Work:
    """Takes runs to their ends in processes, some at a time.

    A run that fails is reported and ends no other. Ctrl-C and SIGTERM are passed on once to each process, which ends with
    a checkpoint; then `stopped` is the signal. A process dies with this one, however that ends (on Linux).

    Attributes:
        at_once: processes at a time.
        start: makes one of a command, which prints into a file.
        failures: a line for each run that failed.
        stopped: signal that has ended the work; None while there is none.
    """

    at_once: int = 1
    start: Callable[[list[str], Path], Process] = field(default_factory=lambda: start)
    failures: list[str] = field(default_factory=list)
    stopped: int | None = None
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
                for one in [one for one in self._working if one.process and one.process.poll() is not None]:
                    self._ended(one)
                time.sleep(0.05)
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    def _next(self, one: _Working) -> None:
        wait_until_free(one.run.folder)
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
            self.failures.append(f"{one.run.name}: {name} ended with status {status}: {_last_line(log)} ({log})")
            print(self.failures[-1], flush=True)

    def _stop(self, sign: int, _: Any) -> None:
        self.stopped = sign
        print("stopping: the runs write their checkpoints", flush=True)
        for one in self._working:
            if one.process is not None and one.process.poll() is None:
                one.process.send_signal(sign)


@dataclass
class _Working:
    """A run with what it needs, and its process."""

    run: StudyRun
    left: list[str] = field(init=False)
    process: Process | None = None

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


def unfinished(runs: Sequence[StudyRun]) -> Iterator[tuple[str, str]]:
    """Names of the runs that are not done, and where they are."""
    for run in runs:
        if run.left():
            yield run.name, run.state()
