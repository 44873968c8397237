"""The runs of a study: what each is made with, and how far its folder says it is."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from balcap.cli import BalCapCLI
from balcap.commands.study_settings import StudySettings
from balcap.report.run import read_metrics
from balcap.trainer.checkpoint import CheckpointError, find_checkpoint, read_checkpoint
from balcap.utils.run_folder import holds_fit
from callbacks.benchmark_eval import POLICY
from callbacks.run_config import changed_settings

MAIN = Path(__file__).parents[2] / "main.py"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: a setting with a seed.

    Attributes:
        name: ``<setting>-<seed>``.
        arm: name of the setting.
        seed: of it.
        folder: for all of it.
        arguments: of ``main.py fit`` and ``test``.
        config: the resolved config of its fit, nested; empty where it is not needed: of a run without a folder that is
            not to be taken on.
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
        if not self.config or not fit_ended(self.folder, self.config):
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
        if checkpoint is None or not self.config:
            return "to do"
        total = self.config["trainer"]["max_steps"]
        return f"goes on from step {read_checkpoint(checkpoint)['global_step']:,} of {total:,}"

    def problems(self) -> list[str]:
        """Why its folder cannot be that of this run."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            if holds_fit(self.folder):
                return [
                    f"{self.folder} holds a run without config.yaml; move it away, or choose another `out`"
                ]
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
        own = [score for name in wanted for key, score in found.get(name, {}).items() if "/" not in key]
        return all(name in found for name in wanted) and all(score["score"] is not None for score in own)


def fit_ended(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run folder is that of a fit that came to its own end: at its last step, its time or its budget.

    Args:
        folder: of the run.
        config: of the fit, resolved.

    The export is written then, whole or not at all. Without one it is the last checkpoint that tells, and a validation
    of its weights where the run validates.
    """
    if config["export"]["enabled"]:
        return (folder / "export").is_dir()
    checkpoint = find_checkpoint("last", folder)
    if checkpoint is None:
        return False
    step, total = read_checkpoint(checkpoint)["global_step"], config["trainer"]["max_steps"]
    metrics = read_metrics(folder / "metrics.csv") if (folder / "metrics.csv").is_file() else {}
    validated = [steps[-1] for name, (steps, _) in metrics.items() if name.startswith("val/")]
    return step >= total > 0 and (not validated or max(validated) >= step)


class _ParsedCLI(BalCapCLI):
    """The command line of ``fit`` alone, up to where anything is made of the config."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": BalCapCLI.subcommands()["fit"]}

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


def runs_of(settings: StudySettings, chosen: Collection[str]) -> list[StudyRun]:
    """All runs x seeds, with their configs resolved; the seeds of a run are together.

    Args:
        settings: of the study.
        chosen: names of runs that are to be taken on. The configs of others, a second each, are resolved only where a
            folder is held against them.

    Raises:
        SystemExit: a config does not parse; the command line has said why.
    """
    runs = []
    for name in settings.runs:
        arguments = settings.arguments(name)
        folders = {seed: settings.folder / f"{name}-{seed}" for seed in settings.seeds}
        needed = name in chosen or any(folder.is_dir() for folder in folders.values())
        try:
            config = resolved([*arguments, "--resume=auto"]) if needed else {}
        except SystemExit:
            print(f"The config is that of the run {name} of the study.", file=sys.stderr)
            raise
        for seed, folder in folders.items():
            own = config and config | {"seed_everything": seed, "run_dir": str(folder)}
            runs.append(StudyRun(folder.name, name, seed, folder, arguments, own, settings.evaluate))
    return runs


def run_problems(runs: Sequence[StudyRun]) -> list[str]:
    """Of configs and folders, all together."""
    problems = [problem for run in runs for problem in run.problems()]
    for run in {
        run.arm: run for run in runs if run.config
    }.values():  # others are not asked for, and not resolved
        if not run.config["export"]["enabled"] and run.config["trainer"]["max_steps"] <= 0:
            problems.append(
                f"trainer.max_steps: without an export only the last step says that {run.arm} has come to its end; "
                "set it, or export.enabled: true"
            )
        if run.evaluate and not run.config["benchmark_eval"]["benchmarks"]:
            problems.append(
                f"evaluate: the config of {run.arm} names no benchmarks (benchmark_eval.benchmarks); name some, or set "
                "evaluate: false"
            )
    return problems


def unfinished(runs: Sequence[StudyRun]) -> Iterator[tuple[str, str]]:
    """Names of the runs that are not done, and where they are."""
    for run in runs:
        if run.left():
            yield run.name, run.state()
