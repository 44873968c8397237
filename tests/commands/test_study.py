"""Studies of the small world: runs x seeds, killed at any moment, refused where they contradict their folders."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from balcap.commands.study import main as study
from balcap.commands.study_runs import StudyRun, fit_ended
from balcap.commands.study_work import LOG, Work
from balcap.utils.errors import UserError
from examples.shapes.benchmarks import write_benchmarks
from tests.support import ROOT, metrics

ENDS = {"export": {"enabled": True}}


@pytest.fixture
def study_file(fit_arguments, tmp_path: Path):
    """`study_file(**keys)`: a study of two settings and two seeds, one step each, in a YAML."""

    def write(settings: dict[str, Any] | None = None, **keys: Any) -> str:
        flags = [word.removeprefix("--").partition("=") for word in fit_arguments()[3:]]
        shared = {name: value for name, _, value in flags if name != "run_dir"}
        short = {
            "trainer.max_steps": 1,
            "data.val_size": 2,
            "data.val_batch_size": 2,
            "model.sampling.max_tokens": 8,
        }
        content = {
            "out": str(tmp_path / "study"),
            "base": [str(ROOT / "configs/shapes.yaml")],
            "seeds": [0, 1],
            "runs": {
                "ours": None,
                "grpo": {"configs": [str(ROOT / "configs/methods/grpo.yaml")], "title": "GRPO"},
            },
            "settings": shared | short | (settings or {}),
            "evaluate": False,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content | keys, sort_keys=False))
        return str(path)

    return write


class _Here:
    """Processes that have run in this one as soon as they have started."""

    def __init__(self, cli: Any) -> None:
        self.cli, self.commands, self.fail = cli, [], ""

    def __call__(self, command: list[str], log: Path) -> _Here:
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


def _table(out: Path) -> list[dict[str, str]]:
    with (out / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_runs_what_is_left_and_ends_in_tables(study_file, cli, tmp_path: Path, capsys) -> None:
    twins, out = write_benchmarks(tmp_path / "twins", images=4), tmp_path / "study"
    benchmark = {
        "class_path": "balcap.benchmarks.BCapScore",
        "init_args": {
            "data": str(twins / "shapes.json"), "image_root": str(twins),
            "sampling": {"temperature": 0.0, "max_tokens": 8},
        },
    }  # fmt: skip
    own = {"benchmark_eval.benchmarks": [benchmark], "trainer.devices": 1}
    claims = [{"claim": "Ours is better", "run": "ours", "against": "grpo", "measure": "val/recall"}]
    file = study_file(own, evaluate=True, claims=claims, reference="grpo")
    here = _Here(cli)
    here.fail = "grpo-0"
    with pytest.raises(
        UserError, match=r"1 of 4 runs failed.*\n  - grpo-0: fit ended with status 1: it went wrong"
    ):
        study([file], Work(start=here))
    assert [name for name, _ in here.commands] == ["fit", "test", "fit", "test", "fit", "fit", "test"]
    rows = {(row["run"], row["measure"]): row for row in _table(out)}
    assert rows["grpo", "b_capscore"]["missing_seeds"] == "1"
    assert rows["ours", "b_capscore"]["difference_seeds"] == "1"

    here.fail, here.commands = "", []
    study([file], Work(start=here))
    assert here.commands == [("fit", "grpo-0"), ("test", "grpo-0")]
    rows = {(row["run"], row["measure"]): row for row in _table(out)}
    for row in rows.values():
        assert (row["seeds"], row["missing_seeds"]) == ("2", "0")
    for seed in (0, 1):
        scored = json.loads((out / f"ours-{seed}/benchmarks.json").read_text())["b_capscore"]
        assert float(rows["ours", "b_capscore"][f"seed_{seed}"]) == scored["score"]
        last = metrics(out / f"ours-{seed}")[-1]
        assert float(rows["ours", "val/recall"][f"seed_{seed}"]) == float(last["val/recall"])
    assert rows["ours", "b_capscore"]["images"] == "4"
    assert rows["ours", "val/recall"]["images"] == "2"
    assert (
        "**does not show**" in (out / "study.md").read_text() or "**holds**" in (out / "study.md").read_text()
    )
    capsys.readouterr()
    study([file, "--dry_run"])
    printed = capsys.readouterr().out
    assert "4 of 4 runs are done; left: 0 x fit, 0 x test" in printed
    assert printed.splitlines()[2].split() == ["2", "grpo-0", "done"]

    with pytest.raises(
        UserError, match=r"ours-0: made with other settings: model\.num_captions 3 -> 4; restore it"
    ):
        study([study_file(own | {"model.num_captions": 4}, evaluate=True)])


def test_a_study_that_is_killed_goes_on_to_the_same_table(study_file, cli, tmp_path: Path) -> None:
    file = study_file({"trainer.max_steps": 3}, seeds=[0])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study([file, f"--out={whole}"], Work(start=_Here(cli)))

    command = [sys.executable, str(ROOT / "main.py"), "study", file, f"--out={killed}"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 240
    while not list(killed.glob("*/metrics.csv")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(3 * random.random())  # before, in or after a step
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "study.csv").exists()
    holders = [int(path.read_text().split()[1]) for path in killed.glob("*/.lock")]
    assert holders

    here = _Here(cli)
    study([file, f"--out={killed}"], Work(start=here))  # waits for what the kill has left
    assert not [pid for pid in holders if Path(f"/proc/{pid}").exists()]
    assert _table(killed) == _table(whole)
    for path in sorted(killed.glob("*-?")):
        assert [row["step"] for row in metrics(path) if row["train/loss"]] == ["1", "2", "3"]


def test_an_end_that_was_killed_is_made_up_for(study_file, cli, tmp_path: Path) -> None:
    file = study_file(seeds=[0], runs={"ours": None})
    study([file], Work(start=_Here(cli)))
    folder = tmp_path / "study/ours-0"
    before, expected = _table(tmp_path / "study"), (folder / "metrics.csv").read_text().splitlines()
    # as if the kill had come between the last checkpoint and the last validation
    shutil.rmtree(folder / "export")
    (folder / "metrics.csv").write_text("\n".join(expected[:-1]) + "\n")
    for path in folder.glob("rollouts/val-00000001*"):
        path.unlink()
    assert not fit_ended(folder, ENDS)
    here = _Here(cli)
    study([file], Work(start=here))
    assert here.commands == [("fit", "ours-0")]
    assert _table(tmp_path / "study") == before
    assert fit_ended(folder, ENDS)


@pytest.mark.parametrize(("step", "validated", "ended"), [(5, 5, True), (5, 0, False), (4, 4, False)])
def test_without_an_export_checkpoint_and_validation_tell(
    tmp_path: Path, step: int, validated: int, ended: bool
) -> None:
    config = {"trainer": {"max_steps": 5}, "export": {"enabled": False}}
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {}, "global_step": step, "balcap": {}}, tmp_path / "checkpoints/last.ckpt")
    (tmp_path / "metrics.csv").write_text(f"step,val/recall\n{validated},0.5\n")
    assert fit_ended(tmp_path, config) == ended


class _Waits(StudyRun):
    """A run that waits for Ctrl-C, and takes a moment to end."""

    def left(self) -> list[str]:
        return ["fit", "test"]

    def command(self, name: str) -> list[str]:
        code = (
            "import time\ntry:\n  print('ready', flush=True); time.sleep(60)\n"
            "except KeyboardInterrupt:\n  time.sleep(0.3); print('saved', flush=True); raise SystemExit(1)"
        )
        return [sys.executable, "-c", code]


def test_ctrl_c_ends_all_runs_in_their_own_way(tmp_path: Path) -> None:
    runs = [_Waits(name, name, 0, tmp_path / name, [], {}, True) for name in "abc"]
    logs = [tmp_path / f"{name}/{LOG}" for name in "ab"]

    def press() -> None:
        while not all(log.exists() and "ready" in log.read_text() for log in logs):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    work = Work(at_once=2)
    presser = threading.Thread(target=press)
    presser.start()
    work.run(runs)
    presser.join()
    assert work.stopped == signal.SIGINT
    assert work.failures == []
    assert [log.read_text() for log in logs] == ["ready\nsaved\n"] * 2
    assert not (tmp_path / f"c/{LOG}").exists()


def test_a_process_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from balcap.commands.study_work import start;"
        "child = start([sys.executable, '-c', 'import time; time.sleep(60)'], Path(sys.argv[1]) / 'log');"
        "print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    pid, deadline = int(done.stdout), time.monotonic() + 30
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    """A zombie that nobody collects is not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/study/*.yaml")), ids=lambda path: path.stem)
def test_a_study_of_the_project_parses(file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(file.read_text())
    study([str(file), "--dry_run", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    total = len(content["runs"]) * len(content.get("seeds", [0, 1, 2]))
    assert f"0 of {total} runs are done; left: {total} x fit, {total} x test" in printed
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_study_are_named_together(study_file, capsys) -> None:
    claims = [
        {"claim": "c", "run": "theirs", "measure": "dcscore"},
        {"claim": "c", "run": "ours", "measure": "dcscore", "expect": "equal"},
    ]
    file = study_file(
        {"run_dir": "runs/a"}, claims=claims, reference="nobody", seeds=[1, 1], trade_off=["dcscore"]
    )
    with pytest.raises(UserError) as refused:
        study([file, "--only=9", "--jobs=0"])
    for key in ("seeds: ", "trade_off: ", "settings: run_dir", "reference: there is no run nobody; there are ours, grpo",
                "claims[0].run: ", "claims[1].within: ", "jobs: ", "only: "):  # fmt: skip
        assert f"  - {key}" in str(refused.value), key


def test_a_setting_that_there_is_not_is_named_with_its_run(study_file, capsys) -> None:
    with pytest.raises(SystemExit):
        study([study_file({"model.num_captains": 4}), "--dry_run"])
    printed = capsys.readouterr().err
    assert "--model.num_captains=4. Is it model.num_captions?" in printed
    assert "the run ours of the study" in printed
    with pytest.raises(SystemExit):
        study([study_file(seed=[0]), "--dry_run"])
    assert "there is no setting seed. Is it seeds?" in capsys.readouterr().err


def test_a_benchmark_is_needed_to_evaluate(study_file) -> None:
    with pytest.raises(UserError, match=r"evaluate: the config of ours names no benchmarks"):
        study(
            [study_file({"benchmark_eval.benchmarks": None}, evaluate=True, runs={"ours": None}), "--dry_run"]
        )


def test_slurm_gets_an_index_for_each_run(study_file, tmp_path: Path, capsys) -> None:
    file = study_file(runs={"ours": None}, seeds=[0, 1, 2, 3])
    study([file, "--launcher", "slurm", "--jobs=2"])
    script = (tmp_path / "study/study.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in script
    last = script.splitlines()[-1]
    assert last.endswith(f' main.py study --config {file} --only "$SLURM_ARRAY_TASK_ID"')
    assert subprocess.run(["bash", "-n", str(tmp_path / "study/study.sbatch")]).returncode == 0
    assert (
        f"sbatch --gres=gpu:1 --cpus-per-task=8 --time=24:00:00 {tmp_path}/study/study.sbatch"
        in capsys.readouterr().out
    )
