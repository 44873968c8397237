"""A run folder belongs to one process, and to one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from balcap.config import ConfigError
from balcap.utils.errors import UserError
from balcap.utils.run_folder import in_use, write_problem
from callbacks.caption_writer import CaptionWriter
from tests.support import ROOT

HOLD = "import sys, time; from balcap.utils.run_folder import in_use\n"
HOLD += "with in_use(sys.argv[1]): print('held', flush=True); time.sleep(600)"


def test_a_folder_is_held_until_its_process_ends_however_it_does(fit_arguments, cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid} on"), in_use(run):
        pass
    for command in ("fit", "validate"):
        with pytest.raises(SystemExit, match="is in use by process"):
            cli(fit_arguments(command))
    process.kill()
    process.wait()
    with in_use(run):
        pass
    with in_use(run):  # and let go
        pass


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "checkpoints/step-00000001.ckpt"])
def test_a_run_is_not_overwritten_whatever_it_has_logged(
    fit_arguments, cli, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError) as refused:
        cli([*fit_arguments(), "--trainer.logger", "false"])
    (problem,) = refused.value.problems
    assert problem.startswith("run_dir: ")
    assert path.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(fit_arguments, cli, tmp_path: Path, monkeypatch) -> None:
    assert write_problem(tmp_path / "a" / "b") is None
    (tmp_path / "file").write_text("")
    assert write_problem(tmp_path / "file" / "b") == f"{tmp_path}/file is no folder"
    with pytest.raises(ConfigError) as refused:
        cli(fit_arguments(run_dir="/dev/null/x"))
    assert [p for p in refused.value.problems if p.startswith("run_dir: /dev/null/x cannot be made")]
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert write_problem(tmp_path / "a") == f"{tmp_path} cannot be written"


def test_captions_of_one_file_are_made_with_one_model_and_its_settings(tmp_path: Path) -> None:
    writer = CaptionWriter(str(tmp_path / "captions.jsonl"))
    assert writer.problems() == []
    (tmp_path / "captions.settings.json").write_text('{"model.policy.model": "a", "data.prompts": ["Say."]}')
    writer.settings = {"model.policy.model": "b", "data.prompts": ["Say."]}
    assert writer.problems() == []  # there is no caption yet
    (tmp_path / "captions.rank1.jsonl").write_text("{}\n")
    (problem,) = writer.problems()
    assert problem.startswith("model.policy.model: ")
    assert "was made with a, not b" in problem
    writer.settings["model.policy.model"] = "a"
    assert writer.problems() == []
