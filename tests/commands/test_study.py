"""Studies of the small world: runs x seeds, killed at any moment, refused where they contradict their folders."""

from __future__ import annotations

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

import pytest
import torch
import yaml

from balcap.commands.study import main as study
from balcap.commands.study_runs import StudyRun, fit_ended
from balcap.commands.study_work import LOG, Work
from balcap.utils.errors import UserError
from examples.shapes.benchmarks import write_benchmarks
from tests.commands.study_fakes import Here, table
from tests.support import ROOT, metrics

ENDS = {"export": {"enabled": True}}


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
    here = Here(cli)
    here.fail = "grpo-0"
    with pytest.raises(
        UserError, match=r"1 of 4 runs failed.*\n  - grpo-0: fit ended with status 1: it went wrong"
    ):
        study([file], Work(start=here))
    assert [name for name, _ in here.commands] == ["fit", "test", "fit", "test", "fit", "fit", "test"]
    assert "grpo-0: to do; its figures are missing." in capsys.readouterr().err
    rows = {(row["run"], row["measure"]): row for row in table(out)}
    assert rows["grpo", "b_capscore"]["missing_seeds"] == "1"
    assert rows["ours", "b_capscore"]["difference_seeds"] == "1"

    here.fail, here.commands = "", []
    study([file], Work(start=here))
    assert here.commands == [("fit", "grpo-0"), ("test", "grpo-0")]
    rows = {(row["run"], row["measure"]): row for row in table(out)}
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


def test_a_study_that_is_killed_goes_on_to_the_sametable(study_file, cli, tmp_path: Path) -> None:
    file = study_file({"trainer.max_steps": 3}, seeds=[0])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study([file, f"--out={whole}"], Work(start=Here(cli)))

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

    here = Here(cli)
    study([file, f"--out={killed}"], Work(start=here))  # waits for what the kill has left
    assert not [pid for pid in holders if Path(f"/proc/{pid}").exists()]
    assert table(killed) == table(whole)
    for path in sorted(killed.glob("*-?")):
        assert [row["step"] for row in metrics(path) if row["train/loss"]] == ["1", "2", "3"]


def test_an_end_that_was_killed_is_made_up_for(study_file, cli, tmp_path: Path) -> None:
    file = study_file(seeds=[0], runs={"ours": None})
    study([file], Work(start=Here(cli)))
    folder = tmp_path / "study/ours-0"
    before, expected = table(tmp_path / "study"), (folder / "metrics.csv").read_text().splitlines()
    # as if the kill had come between the last checkpoint and the last validation
    shutil.rmtree(folder / "export")
    (folder / "metrics.csv").write_text("\n".join(expected[:-1]) + "\n")
    for path in folder.glob("rollouts/val-00000001*"):
        path.unlink()
    assert not fit_ended(folder, ENDS)
    here = Here(cli)
    study([file], Work(start=here))
    assert here.commands == [("fit", "ours-0")]
    assert table(tmp_path / "study") == before
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
    assert (
        f"0 of {total} runs are done; left: {total} x fit, {total if content.get('evaluate', True) else 0} x test"
        in printed
    )
    assert list(tmp_path.iterdir()) == []


def test_the_papers_study_can_be_asked_in_the_second_world(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    worlds = ["configs/shapes.yaml", "configs/worlds/second.yaml"]
    words = [f"--base={json.dumps(worlds)}", f"--out={tmp_path}", "--seeds=[10]", "--only_runs=full,grpo"]
    study(["configs/study/paper.yaml", *words, "--dry_run"])
    assert "0 of 2 runs are done" in capsys.readouterr().out


def test_a_study_is_taken_in_parts(study_file, cli, tmp_path: Path, capsys) -> None:
    runs = {"ours": None, "half": {"settings": {"model.weights.recall": 0.5}}, "more": None}
    groups = {"weights": {"runs": ["ours", "half"], "title": "Weights"}, "rest": {"runs": ["ours", "more"]}}
    file, out = study_file(seeds=[0], runs=runs, groups=groups), tmp_path / "study"
    with pytest.raises(UserError, match=r"only_runs: there is no run or group theirs; there are ours, half"):
        study([file, "--only_runs", "ours, theirs"])
    study([file, "--only_runs=weights", "--dry_run"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed[:2]] == [["0", "ours-0"], ["1", "half-0"]]
    assert listed[2].startswith("0 of 2 runs are done")

    here = Here(cli)
    study([file, "--only_runs=half"], Work(start=here))
    assert here.commands == [("fit", "half-0")]
    found = {(row["group"], row["run"]): row for row in table(out) if row["measure"] == "val/recall"}
    assert list(found) == [("Weights", "ours"), ("Weights", "half"), ("rest", "ours"), ("rest", "more")]
    assert [row["missing_seeds"] for row in found.values()] == ["1", "0", "1", "1"]
    assert "ours-0, more-0: to do; their figures are missing." in (out / "study.md").read_text()

    here.commands = []
    study([file, "--only_runs", "weights", "--only", "0"], Work(start=here))
    assert here.commands == [("fit", "ours-0")]
    study([file, "--only_runs", "weights"], Work(start=here))
    assert len(here.commands) == 1  # what is done is not run again, and the rest was not asked for
    row = next(row for row in table(out) if (row["group"], row["run"]) == ("Weights", "half"))
    assert row["difference_seeds"] == "1"
    study([file, "--only_runs=rest", "--launcher=slurm"])
    assert "#SBATCH --array=0-1\n" in (out / "study.sbatch").read_text()
    assert "--only_runs=rest --only" in (out / "study.sbatch").read_text()


def test_groups_that_contradict_the_runs_are_refused(study_file) -> None:
    groups = {
        "ours": {"runs": ["ours"]},
        "none": {"runs": []},
        "odd": {"runs": ["theirs"], "reference": "ours"},
    }
    with pytest.raises(UserError) as refused:
        study([study_file(groups=groups)])
    for line in ("groups.ours: a run has this name", "groups.none.runs: name at least one", "groups.odd.reference: ours",
                 "groups.odd.runs[0]: there is no run theirs", "groups: no table shows grpo"):  # fmt: skip
        assert f"  - {line}" in str(refused.value), line


def test_all_problems_of_a_study_are_named_together(study_file, capsys) -> None:
    claims = [
        {"claim": "c", "run": "theirs", "measure": "dcscore"},
        {"claim": "c", "run": "ours", "measure": "dcscore", "expect": "equal"},
        {"claim": "c", "run": "ours", "measure": "val/recall@soon"},
    ]
    file = study_file(
        {"run_dir": "runs/a"}, claims=claims, reference="nobody", seeds=[1, 1], trade_off=["dcscore@1"]
    )
    with pytest.raises(UserError) as refused:
        study([file, "--only=9", "--jobs=0"])
    for key in ("seeds: ", "trade_off: ", "settings: run_dir", "reference: there is no run nobody; there are ours, grpo",
                "claims[0].run: ", "claims[1].within: ", "claims[2].measure: 'val/recall@soon' must be a metric",
                "trade_off: 'dcscore@1' must be", "jobs: ", "only: "):  # fmt: skip
        assert f"  - {key}" in str(refused.value), key


def test_an_empty_key_is_as_if_it_were_not_there(study_file, capsys) -> None:
    study([study_file(claims=None, trade_off=None, groups=None), "--dry_run"])
    assert "0 of 4 runs are done" in capsys.readouterr().out
    with pytest.raises(UserError, match="runs: there is none"):
        study([study_file(runs=None), "--dry_run"])


def test_without_an_export_only_a_last_step_ends_a_run(study_file) -> None:
    file = study_file({"export.enabled": False, "trainer.max_steps": -1, "trainer.max_epochs": 1})
    with pytest.raises(
        UserError, match=r"trainer\.max_steps: without an export only the last step says that ours"
    ):
        study([file, "--dry_run"])


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
