"""What contradicts itself in a policy's settings is named by its key, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from balcap.policy import LoraSettings, PolicyConfig

HUB = "Qwen/Qwen2.5-VL-3B-Instruct"
LORA = LoraSettings(target_modules=["q_proj"])


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(HUB),
        PolicyConfig(HUB, lora=LORA, load_in_4bit=True),
        PolicyConfig(HUB, lora=LoraSettings(target_modules=r".*\.(q|v)_proj", r=1, dropout=0.5)),
        PolicyConfig(HUB, min_pixels=100, max_pixels=100),
        PolicyConfig(HUB, min_pixels=100),
    ],
)
def test_sound_settings_have_no_problems(config: PolicyConfig):
    assert config.problems() == []


@pytest.mark.parametrize(
    ("config", "key", "what"),
    [
        (PolicyConfig(HUB, lora=LoraSettings(target_modules=[])), "lora.target_modules", "nothing to adapt"),
        (PolicyConfig(HUB, lora=LoraSettings(target_modules="(q_proj")), "lora.target_modules", "'(q_proj'"),
        (PolicyConfig(HUB, lora=LoraSettings(target_modules=["q_proj"], r=0)), "lora.r", "0"),
        (PolicyConfig(HUB, lora=LoraSettings(target_modules=["q_proj"], dropout=1.0)), "lora.dropout", "1.0"),
        (
            PolicyConfig(HUB, lora=LoraSettings(target_modules=["q_proj"], dropout=-0.1)),
            "lora.dropout",
            "-0.1",
        ),
        (PolicyConfig(HUB, load_in_4bit=True), "load_in_4bit", "model.policy.lora"),
        (PolicyConfig(HUB, min_pixels=200, max_pixels=100), "min_pixels", "model.policy.max_pixels: 100"),
        (PolicyConfig("./nowhere"), "model", "nowhere"),
        (PolicyConfig("~/nowhere"), "model", "config.json"),
        (PolicyConfig("/no/such/folder"), "model", "/no/such/folder"),
        (PolicyConfig("runs/some/folder"), "model", "runs/some/folder"),
    ],
)
def test_each_problem_names_its_key(config: PolicyConfig, key: str, what: str):
    (problem,) = config.problems()
    assert problem.startswith(f"model.policy.{key}: ")
    assert what in problem


def test_all_problems_are_reported_together():
    lora = LoraSettings(target_modules=[], r=-1, dropout=2.0)
    config = PolicyConfig("./nowhere", lora=lora, min_pixels=2, max_pixels=1)
    keys = [problem.split(": ")[0] for problem in config.problems()]
    assert keys == [
        "model.policy.model",
        "model.policy.lora.target_modules",
        "model.policy.lora.r",
        "model.policy.lora.dropout",
        "model.policy.min_pixels",
    ]


def test_a_folder_needs_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert len(PolicyConfig("mine").problems()) == 1
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert PolicyConfig("mine").problems() == []
    assert PolicyConfig(str(tmp_path / "mine")).problems() == []
