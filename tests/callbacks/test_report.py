"""The report at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from balcap.module import BalCapModule
from balcap.utils.errors import RunStopped

FitArguments = Callable[..., list[str]]
CLI = Callable[[list[str]], Any]


def test_a_fit_leaves_a_report_a_readme_and_a_model_card(
    fit_arguments: FitArguments, cli: CLI, tmp_path: Path
) -> None:
    args = fit_arguments(**{"trainer.max_steps": 1, "report.enabled": True})
    cli(args)
    folder = tmp_path / "run"
    page = (folder / "report.html").read_text()
    assert "b-CapScore of held-out captions" in page
    assert page.count('src="data:image/jpeg') > 0  # the images that the run has kept
    assert "# " in (folder / "README.md").read_text()
    assert ModelCard.load(folder / "export/README.md").data.pipeline_tag == "image-text-to-text"


def test_a_report_that_fails_is_a_warning(
    fit_arguments: FitArguments, cli: CLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("callbacks.report.write_report", fail)
    args = fit_arguments(**{"trainer.max_steps": 1, "report.enabled": True})
    warned: list[str] = []
    monkeypatch.setattr("callbacks.report.rank_zero_warn", warned.append)
    cli(args)
    assert warned == [f"{tmp_path}/run/report.html could not be written: RuntimeError: no ink"]
    folder = tmp_path / "run"
    assert (folder / "README.md").is_file()
    assert (folder / "export/config.json").is_file()


def test_a_run_that_stops_has_a_report_after_its_checkpoint(
    fit_arguments: FitArguments, cli: CLI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shaped, written = BalCapModule.transform_rewards, []

    def stop_at_the_second(module: BalCapModule, *given: Any) -> Any:
        if module.global_step:
            raise RunStopped("enough")
        return shaped(module, *given)

    def write(runs: Any, path: Path) -> Path:
        written.append((runs[0].steps, (path.parent / "checkpoints/last.ckpt").is_file()))
        return path

    monkeypatch.setattr(BalCapModule, "transform_rewards", stop_at_the_second)
    monkeypatch.setattr("callbacks.report.write_report", write)
    options = {"trainer.max_steps": 3, "report.enabled": True, "checkpoint.every_n_train_steps": 50}
    with pytest.raises(SystemExit, match="Stopped: enough"):
        cli(fit_arguments(**options))
    assert written == [(1, True)]


def test_it_can_be_turned_off(fit_arguments: FitArguments, cli: CLI, tmp_path: Path) -> None:
    args = fit_arguments(**{"trainer.max_steps": 1, "report.enabled": False})
    cli(args)
    folder = tmp_path / "run"
    assert not (folder / "report.html").exists()
    assert not (folder / "README.md").exists()
