"""Every overlay in configs/engine is an engine, on top of any run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from balcap.cli import ConfigError
from balcap.rollout import HFGenerate, RolloutEngine, VLLMInProcess, VLLMServer, vllm_or_hf
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
    args = ["fit", "--config", str(config), "--config", str(overlay), *local]
    if overlay.stem == "vllm_fp8" and "lora" not in yaml.safe_load(config.read_text())["model"]["policy"]:
        with pytest.raises(ConfigError, match=r"engine\.init_args\.options\.quantization: .*lora"):
            ParsedCLI(args=args)
        args += ["--model.engine.init_args.options", "{kv_cache_dtype: fp8}"]
    cli = ParsedCLI(args=args)
    assert isinstance(cli.model.pipeline.engine, RolloutEngine)
    wanted = yaml.safe_load(overlay.read_text())["model"]["engine"]["class_path"]
    assert f"balcap.rollout.{type(cli.model.pipeline.engine).__name__}" == wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("installed", [True, False], ids=["vLLM", "no vLLM"])
def test_a_large_config_samples_with_vllm_where_it_is_installed(
    installed: bool, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    for module in ("balcap.config", "balcap.rollout.auto"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: name if installed else None)
    local = ["--data.image_root", str(world), "--run_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    cli = ParsedCLI(args=["fit", "--config", str(ROOT / "configs/qwen7b_qlora.yaml"), *local])
    engine = cli.model.pipeline.engine
    if installed:
        assert isinstance(engine, VLLMInProcess)
        assert (engine.gpu_memory_utilization, engine.max_model_len) == (0.5, 2048)
    else:
        assert isinstance(engine, HFGenerate)
        assert engine.max_sequences == 16


def test_without_vllm_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("balcap.rollout.auto.find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        vllm_or_hf()
    (line,) = caplog.messages
    assert 'pip install -e ".[vllm]"' in line
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        vllm_or_hf(gpu_memory_utilization=2.0)


def test_overlays_name_their_command():
    for overlay in OVERLAYS:
        assert f"--config configs/engine/{overlay.name}" in overlay.read_text()


def test_a_url_holds_no_password() -> None:
    with pytest.raises(ValueError, match=r"api_key_env") as caught:
        VLLMServer(["http://me:s3cret@host:8000"])
    assert "s3cret" not in str(caught.value)
