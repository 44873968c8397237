"""Every overlay in configs/engine is an engine, on top of any run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from balcap.rollout import RolloutEngine
from balcap.rollout.vllm.server import VLLMServer
from tests.support import ROOT
from tests.test_cli import CONFIGS, ParsedCLI

OVERLAYS = sorted(ROOT.glob("configs/engine/*.yaml"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_engine_goes_with_every_run(
    config: Path, overlay: Path, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr("balcap.config.find_spec", lambda name: name)  # as if vLLM were installed
    local = ["--data.image_root", str(world), "--run_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    local += ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.precision", "32-true"]
    if config.stem == "shapes":
        local += ["--data.data", str(world / "shapes.json")]
    cli = ParsedCLI(args=["fit", "--config", str(config), "--config", str(overlay), *local])
    assert isinstance(cli.model.pipeline.engine, RolloutEngine)
    wanted = yaml.safe_load(overlay.read_text())["model"]["engine"]["class_path"]
    assert f"balcap.rollout.{type(cli.model.pipeline.engine).__name__}" == wanted


def test_overlays_name_their_command():
    for overlay in OVERLAYS:
        assert f"--config configs/engine/{overlay.name}" in overlay.read_text()


def test_a_url_holds_no_password() -> None:
    with pytest.raises(ValueError, match=r"api_key_env") as caught:
        VLLMServer(["http://me:s3cret@host:8000"])
    assert "s3cret" not in str(caught.value)
