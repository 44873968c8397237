"""``python main.py study``: runs x seeds of one question, resumable; ends in a table, a figure and a page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from balcap.commands.study_settings import StudySettings
from balcap.utils.arguments import Parser, SettingsFile
from balcap.utils.errors import UserError
from balcap.utils.files import atomic_write
from balcap.utils.run_folder import write_problem

if TYPE_CHECKING:
    from balcap.commands.study_runs import StudyRun
    from balcap.commands.study_work import Work
    from balcap.report.study import Study


def main(args: Sequence[str], work: Work | None = None) -> None:
    """``python main.py study FILE [--dry_run] [--jobs N] [--launcher slurm] [--only_runs NAMES] [--only INDEX]
    [--<setting> …]``.

    Args:
        args: of the command line.
        work: what takes the runs to their ends; None for processes of this machine.

    Raises:
        UserError: the settings contradict themselves or a run's folder, or a run has failed.
        SystemExit: it was stopped.
    """
    words = list(args)
    if words and not words[0].startswith("-"):
        words.insert(0, "--config")
    parser = _parser()
    given = parser.parse_args(words).as_dict()
    file = given.pop("config")
    if not file:
        raise UserError("name the study's file, such as: python main.py study configs/study/methods.yaml")
    jobs, launcher, only, dry_run = (given.pop(name) for name in ("jobs", "launcher", "only", "dry_run"))
    only_runs = given.pop("only_runs")
    settings = StudySettings.of(given)
    problems = settings.problems()
    if jobs < 1:
        problems.append(f"jobs: {jobs} must be at least 1")
    names, unknown = (list(settings.runs), []) if only_runs is None else settings.chosen(only_runs)
    if unknown or not names:
        there = ", ".join([*settings.runs, *settings.groups])
        problems.append(f"only_runs: there is no run or group {', '.join(unknown)}; there are {there}")
    total = len(names) * len(settings.seeds)
    if only is not None and not 0 <= only < total:
        problems.append(f"only: {only} must be from 0 to {total - 1}: an index of --dry_run")
    if settings.out and (why := write_problem(settings.out)):
        problems.append(f"out: {why}")
    _refuse(problems)

    from balcap.commands.study_runs import run_problems, runs_of
    from balcap.commands.study_work import Work

    runs = runs_of(settings, names)
    _refuse(run_problems(runs))
    chosen = [run for run in runs if run.arm in names]
    if dry_run:
        list_runs(chosen)
        return
    if launcher == "slurm":
        write_slurm(settings.folder, words, total, jobs)
        return
    work = work or Work(jobs)
    chosen = chosen if only is None else [chosen[only]]
    work.run(chosen)
    if work.stopped:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + work.stopped)
    if only is None:
        from balcap.report.study_page import attention, write_study

        results = study_of(settings, runs)
        written = write_study(results, settings.folder)
        for line in attention(results):
            print(line, file=sys.stderr)
        print(f"Results: {', '.join(map(str, written))}")
    if work.failures:
        lines = "\n".join(f"  - {failure}" for failure in work.failures)
        raise UserError(
            f"{len(work.failures)} of {len(chosen)} runs failed; the same command tries again:\n{lines}"
        )


def study_of(settings: StudySettings, runs: Sequence[StudyRun]) -> Study:
    """What the folders of the runs say; of those that are not done, nothing."""
    from balcap.commands.study_runs import unfinished
    from balcap.report.run import Run
    from balcap.report.study import Arm, Group, Study

    left = dict(unfinished(runs))
    arms = []
    for name, own in settings.runs.items():
        found = {
            run.seed: None if run.name in left else Run.read(run.folder) for run in runs if run.arm == name
        }
        arms.append(Arm(name, (own.title if own else None) or name, found))
    return Study(
        title=settings.title or settings.folder.name,
        arms=arms,
        reference=settings.reference or arms[0].name,
        groups=[Group(of.title or name, of.runs, of.reference) for name, of in settings.groups.items()],
        claims=settings.claims,
        given_measures=settings.measures,
        curve=settings.curve,
        axes=settings.trade_off,
        unfinished=left,
    )


def list_runs(runs: Sequence[StudyRun]) -> None:
    """Print index, name and state of each run, and how many commands are left."""
    width = max(len(run.name) for run in runs)
    for index, run in enumerate(runs):
        print(f"{index:4}  {run.name:{width}}  {run.state()}")
    left = [run.left() for run in runs]
    counts = {name: sum(name in of for of in left) for name in ("fit", "test")}
    done = sum(not of for of in left)
    print(f"{done} of {len(runs)} runs are done; left: {counts['fit']} x fit, {counts['test']} x test")


def write_slurm(folder: Path, words: Sequence[str], total: int, jobs: int) -> None:
    """Write ``study.sbatch``, a job array with an index for each run, and say how to submit it."""
    script = folder / "study.sbatch"
    again = _without_launcher(words)
    command = shlex.join([sys.executable, "main.py", "study", *again])
    limit = f"%{jobs}" if jobs > 1 else ""
    with atomic_write(script) as file:
        file.write(
            f"""#!/bin/bash
#SBATCH --job-name=study-{folder.name}
#SBATCH --array=0-{total - 1}{limit}
#SBATCH --output={folder}/slurm-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Keys come from the environment: sbatch --export=ALL takes yours.
export SLURM_JOB_NAME=bash  # so that Lightning starts the processes of a run itself
cd {shlex.quote(str(Path.cwd()))}
exec {command} --only "$SLURM_ARRAY_TASK_ID"
"""
        )
    print(f"{script}: {total} jobs. Submit it with what one run needs, for example:")
    print(f"  sbatch --gres=gpu:1 --cpus-per-task=8 --time=24:00:00 {script}")
    print("When they have ended, this runs what is left, and writes the tables:")
    print(f"  python main.py study {shlex.join(again)}")


def _without_launcher(words: Sequence[str]) -> list[str]:
    """The command line without what is for submitting alone."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--launcher", "--jobs"):
            skip = True
        elif not word.startswith(("--launcher=", "--jobs=")):
            kept.append(word)
    return kept


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"this study cannot run. Nothing was started; change:\n{lines}")


def _parser() -> Parser:
    parser = Parser(
        prog="main.py study",
        description="Runs x seeds of one question. What is done is not run again: the same command goes on.",
    )
    parser.add_argument(
        "--config", action=SettingsFile, help="The study's YAML; the first word may be its path."
    )
    parser.add_class_arguments(StudySettings)
    parser.add_argument("--dry_run", action="store_true", help="List what is done and what is left, and end.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at once, on the same devices.")
    parser.add_argument(
        "--launcher",
        type=Literal["local", "slurm"],
        default="local",
        help="slurm: write a job-array script instead of running, and say how to submit it.",
    )
    parser.add_argument(
        "--only_runs",
        type=str,
        default=None,
        help="Take on these alone: names of runs and of groups, with commas between. Tables are written; what is not "
        "finished is missing there.",
    )
    parser.add_argument(
        "--only", type=int, default=None, help="Run the one of this index (--dry_run shows them); no tables."
    )
    return parser
