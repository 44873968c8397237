"""``main.py serve``: from a run's config to the flags of a server, and the overlay that points a run to it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from balcap.cli import ConfigError
from balcap.commands import serve
from main import main
from tests.support import ROOT

SHAPES = [
    "--config",
    str(ROOT / "configs/shapes.yaml"),
    "--model.policy.model",
    str(ROOT / "assets/shapes-base"),
]


def shown(
    capsys: pytest.CaptureFixture[str], *args: str
) -> tuple[dict[str, Any], list[str], dict[str, str | None]]:
    """The printed config, the words of the command, and its flags with their values."""
    main(["serve", *SHAPES, *args])
    printed = capsys.readouterr().out
    *lines, command = printed.splitlines()
    words = shlex.split(command)
    pairs = zip(words, [*words[1:], "--"], strict=True)
    flags = {
        word: None if value.startswith("--") else value for word, value in pairs if word.startswith("--")
    }
    return yaml.safe_load("\n".join(lines)), words, flags


def test_the_flags_follow_from_the_run(capsys: pytest.CaptureFixture[str]):
    config, words, flags = shown(capsys, "--show", "--port", "8123")
    variables = ["VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]
    assert words[:5] == [*variables, "vllm", "serve", str(ROOT / "assets/shapes-base")]
    assert flags["--worker-extension-cls"] == "balcap.rollout.vllm.worker.WeightSync"
    assert flags["--dtype"] == "float32"
    assert flags["--logprobs-mode"] == "raw_logprobs"
    assert flags["--generation-config"] == "vllm"
    assert (flags["--host"], flags["--port"]) == ("127.0.0.1", "8123")
    own = json.loads((ROOT / "assets/shapes-base/processor_config.json").read_text())["image_processor"][
        "size"
    ]
    assert json.loads(flags["--mm-processor-kwargs"] or "") == {"size": own}
    assert "--enable-lora" not in flags
    assert json.loads(flags["--weight-transfer-config"] or "") == {"backend": "nccl"}
    assert "--revision" not in flags
    engine = config["model"]["engine"]
    assert engine == {
        "class_path": "balcap.rollout.VLLMServer",
        "init_args": {"urls": ["http://127.0.0.1:8123"]},
    }


def test_settings_of_the_run_change_them(capsys: pytest.CaptureFixture[str]):
    config, words, flags = shown(
        capsys,
        "--show",
        "--host=0.0.0.0",
        "--model.policy.dtype=bfloat16",
        "--model.policy.revision=v1",
        "--model.policy.max_pixels=12544",
        "--model.policy.lora={r: 9, target_modules: [q_proj]}",
        "--model.policy.freeze_vision=false",
        "--model.sampling.temperature=0.7",
        "--",
        "--gpu-memory-utilization",
        "0.8",
    )
    assert (flags["--max-lora-rank"], flags["--max-loras"]) == ("16", "1"), "the next rank that vLLM has"
    assert {"--enable-lora", "--enable-tower-connector-lora"} <= flags.keys()
    assert "--weight-transfer-config" not in flags, "adapters travel as files"
    assert (flags["--dtype"], flags["--revision"], flags["--tokenizer-revision"]) == ("bfloat16", "v1", "v1")
    assert flags["--logprobs-mode"] == "processed_logprobs"
    assert json.loads(flags["--mm-processor-kwargs"] or "")["size"]["longest_edge"] == 12544
    assert words[-2:] == ["--gpu-memory-utilization", "0.8"], "last, so that they override"
    (url,) = config["model"]["engine"]["init_args"]["urls"]
    assert url.endswith(":8000")
    assert "0.0.0.0" not in url


def test_a_4_bit_policy_gets_a_4_bit_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    four = ["--model.policy.load_in_4bit=true", "--model.policy.lora={r: 8, target_modules: [q_proj]}"]
    assert shown(capsys, "--show", *four)[2]["--quantization"] == "bitsandbytes"
    eight = shown(capsys, "--show", *four, "--", "--quantization", "fp8")[1]
    assert eight[-2:] == ["--quantization", "fp8"], "last, so that it overrides"
    monkeypatch.setattr("balcap.rollout.vllm.start.has_bitsandbytes", lambda: False)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SystemExit, match=r"pip install vllm-bnb-plugin.* -- --quantization fp8"):
        main(["serve", *SHAPES, *four])


def test_the_process_becomes_the_server(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    main(["serve", *SHAPES])
    ((_, command, environment),) = calls
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[1:5] == [*module, str(ROOT / "assets/shapes-base")]
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'balcap\[vllm\]'"):
        main(["serve", *SHAPES])


def test_a_config_that_cannot_work_is_refused():
    with pytest.raises(ConfigError) as refused:
        main(["serve", *SHAPES, "--model.policy.model=./nowhere", "--model.sampling.temperature=0", "--show"])
    assert "model.policy.model: nowhere is no folder" in str(refused.value)
    assert "model.sampling.temperature: 0.0 must be above 0" in str(refused.value)


def test_the_overlay_replaces_the_engine_of_a_run(capsys: pytest.CaptureFixture[str]):
    overlay = ROOT / "configs/engine/vllm_server.yaml"
    more = ["--model.engine.init_args.urls=[http://a:1, http://b:2]"]
    args = ["fit", "--config", str(ROOT / "configs/qwen7b.yaml"), "--config", str(overlay), *more]
    with pytest.raises(SystemExit, match="0"):
        main([*args, "--print_config"])
    engine = yaml.safe_load(capsys.readouterr().out)["model"]["engine"]
    assert engine["class_path"] == "balcap.rollout.VLLMServer"
    assert engine["init_args"]["urls"] == ["http://a:1", "http://b:2"]
    assert "max_sequences" not in engine["init_args"]


def test_wrong_settings_of_the_engine_are_refused_with_their_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    args = [
        "fit",
        *SHAPES,
        "--config",
        str(ROOT / "configs/engine/vllm_server.yaml"),
        f"--run_dir={tmp_path}",
    ]
    with pytest.raises((SystemExit, ValueError)) as refused:
        main([*args, "--model.engine.init_args.urls=[]"])
    said = str(refused.value) + capsys.readouterr().err
    assert "model.engine.init_args.urls: [] must name at least one server" in said
