"""Studies of the small world: runs x seeds, killed at any moment, refused where they contradict their folders."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from balcap.commands.study import main as study
from balcap.commands.study_runs import Work, fit_ended, resolved, start
from balcap.utils.errors import UserError
from examples.shapes.benchmarks import write_benchmarks
from tests.support import ROOT, metrics


@pytest.fixture
def study_file(fit_arguments, tmp_path: Path):
    """`study_file(**keys)`: a study of two settings and two seeds, one step each, in a YAML."""

    def write(settings: dict[str, Any] | None = None, **keys: Any) -> str:
        flags = [word.removeprefix("--").partition("=") for word in fit_arguments()[3:]]
        shared = {name: value for name, _, value in flags if name != "run_dir"}
        short = {"trainer.max_steps": 1, "data.val_size": 2, "data.val_batch_size": 2, "model.sampling.max_tokens": 8}
        content = {
            "out": str(tmp_path / "study"),
            "base": [str(ROOT / "configs/shapes.yaml")],
            "seeds": [0, 1],
            "runs": {"ours": None, "grpo": {"configs": [str(ROOT / "configs/methods/grpo.yaml")], "title": "GRPO"}},
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
    with pytest.raises(UserError, match=r"1 of 4 runs failed.*\n  - grpo-0: fit ended with status 1: it went wrong"):
        study([file], Work(start=here))
    assert [name for name, _ in here.commands] == ["fit", "test", "fit", "test", "fit", "fit", "test"]
    rows = {(row["run"], row["measure"]): row for row in _table(out)}
    assert rows["grpo", "b_capscore"]["missing_seeds"] == "1"
    assert rows["ours", "b_capscore"]["difference_seeds"] == "1"

    capsys.readouterr()
    study([file, "--dry_run"])
    printed = capsys.readouterr().out
    assert "3 of 4 runs are done; left: 1 x fit, 1 x test" in printed
    assert printed.splitlines()[2].split() == ["2", "grpo-0", "to", "do"]

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
    assert "**does not show**" in (out / "study.md").read_text() or "**holds**" in (out / "study.md").read_text()
    here.commands = []
    study([file], Work(start=here))
    assert here.commands == []

    with pytest.raises(UserError, match=r"ours-0: made with other settings: model\.num_captions 3 -> 4; restore it"):
        study([study_file(own | {"model.num_captions": 4}, evaluate=True)])


def test_a_study_that_is_killed_goes_on_to_the_same_table(study_file, tmp_path: Path) -> None:
    file = study_file({"trainer.max_steps": 3}, seeds=[0])
    command = [sys.executable, str(ROOT / "main.py"), "study", file, "--jobs", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def begin(out: Path) -> subprocess.Popen[str]:
        cache = f"--settings={{model.judge.cache: {out}.sqlite}}"
        return subprocess.Popen(
            [*command, f"--out={out}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    process = begin(killed)
    deadline = time.monotonic() + 120
    while not list(killed.glob("*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "study.csv").exists()
    first, second = begin(killed), begin(whole)
    for other in (first, second):
        output, _ = other.communicate(timeout=200)
        assert other.returncode == 0, output
    assert _table(killed) == _table(whole)
    for run in ("ours-0", "grpo-0"):
        trained = [row["step"] for row in metrics(killed / run) if row["train/loss"]]
        assert trained == ["1", "2", "3"]
