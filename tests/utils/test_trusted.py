"""Configs from elsewhere name no code of other packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from balcap.utils.errors import UserError
from balcap.utils.trusted import check_trusted
from main import main
from tests.support import ROOT


def test_every_config_of_the_project_is_trusted() -> None:
    for config in (ROOT / "configs").rglob("*.yaml"):
        check_trusted(["fit", "--config", str(config)])


@pytest.mark.parametrize(
    "text",
    [
        "model: {rewards: [{class_path: evil.Reward}]}",
        "model: {rewards: [evil.Reward]}",
        "model: {judge: {init_args: {providers: {mine: evil.judges.Mine}}}}",
        "trainer: {callbacks: [{class_path: os.path.Evil}]}",
    ],
)
def test_other_code_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    for args in (["--config", str(tmp_path / "c.yaml")], [f"--config={tmp_path / 'c.yaml'}"]):
        with pytest.raises(UserError, match=r"^--trusted_only: (evil|os)\.\S+ would run"):
            check_trusted(["fit", *args])


def test_arguments_count_too_and_file_names_do_not() -> None:
    check_trusted(["fit", "--model.optimizer=torch.optim.SGD", "--data.data", "rows.json", "--x", "gpt-4.1"])
    with pytest.raises(UserError, match=r"evil\.SGD"):
        check_trusted(["fit", "--model.optimizer", "evil.SGD"])


def test_the_flag_stops_a_command_before_anything_is_imported(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{rewards: [no.such.module]}}\nrun_dir: {tmp_path}/run\n")
    with pytest.raises(SystemExit, match=r"no\.such\.module would run code"):
        main(["fit", "--trusted_only", "--config", str(tmp_path / "c.yaml")])


def test_configs_that_a_study_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "method.yaml").write_text("model: {advantage: evil.Advantage}")
    (tmp_path / "study.yaml").write_text(f"runs: {{mine: {{configs: [{tmp_path}/method.yaml]}}}}")
    with pytest.raises(UserError, match=r"evil\.Advantage"):
        check_trusted(["study", str(tmp_path / "study.yaml")])
