"""The export of a LoRA run is a model for every command, and can be merged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from balcap.config import ConfigError
from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.config import PolicyError
from balcap.policy.loading import load_model
from balcap.policy.policy import Policy
from callbacks.export import ExportPolicy
from main import main
from tests.tiny_models import mixed_batch, rollouts_of

LORA = LoraSettings(target_modules=["q_proj", "v_proj"], r=4, alpha=8)


def _config(folder: Path, **settings: object) -> PolicyConfig:
    return PolicyConfig(str(folder), dtype="float32", **settings)


@pytest.fixture
def trained(folders: dict[str, Path], family: str) -> Policy:
    """A policy whose adapter does something."""
    policy = Policy.load(_config(folders[family], lora=LORA), with_reference=False)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return policy


@pytest.fixture
def export(trained: Policy, tmp_path: Path) -> Path:
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    ExportPolicy().on_fit_end(trainer, SimpleNamespace(policy=trained))  # type: ignore[arg-type]
    return tmp_path / "export"


def _logps(policy: Policy) -> torch.Tensor:
    rollouts = rollouts_of(mixed_batch(), [[3, 1, 5], [7, 2, 2], [4, 6, 1]], range(20, 300))
    policy.model.eval()
    with torch.no_grad():
        return policy.logps(rollouts, policy.encode(rollouts.batch), [0, 1, 2])[0]


@pytest.mark.parametrize("lora", [None, LORA], ids=["its own settings", "the config's"])
def test_an_adapter_goes_on_as_the_policy_that_was_exported(
    trained: Policy, export: Path, folders: dict[str, Path], family: str, lora: LoraSettings | None
) -> None:
    config = _config(export, lora=lora)
    assert config.problems() == []
    policy = Policy.load(config, with_reference=False)
    torch.testing.assert_close(_logps(policy), _logps(trained))
    names = [{n for n, p in one.named_parameters() if p.requires_grad} for one in (policy, trained)]
    assert names[0] == names[1] != set()
    assert policy.source == str(folders[family].resolve())  # what engines load


def test_the_reference_of_an_adapter_that_goes_on_is_that_adapter(
    trained: Policy, export: Path, tmp_path: Path
) -> None:
    settings = json.loads((export / "adapter_config.json").read_text())
    (export / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.5}))
    policy = Policy.load(_config(export), with_reference=True)
    trainable = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, weight in trained.named_parameters() if weight.requires_grad}
    rollouts = rollouts_of(mixed_batch(), [[3, 1, 5], [7, 2, 2], [4, 6, 1]], range(20, 300))
    prompts = policy.encode(rollouts.batch)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.mul_(-2.0)
    before = _logps(policy)
    policy.train()  # with dropout, which is not the reference's
    torch.testing.assert_close(policy.reference_logps(rollouts, prompts, [0, 1, 2]), _logps(trained))
    assert policy.model.training
    assert trainable == {name for name, weight in policy.named_parameters() if weight.requires_grad}
    torch.testing.assert_close(_logps(policy), before)  # the policy's own adapter is on again
    assert (before - _logps(trained)).abs().max() > 0.01
    policy.save_pretrained(tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").glob("**/*.safetensors")] == [
        "adapter_model.safetensors"
    ]


def test_an_adapter_that_transformers_would_hide_is_refused(export: Path) -> None:
    with pytest.raises(PolicyError, match="is an adapter on the hub; download it"):
        load_model(_config(export))


def test_an_adapter_is_merged_into_one_model(trained: Policy, export: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "merged"
    arguments = [
        "export",
        "--model.policy.model",
        str(export),
        "--model.policy.dtype",
        "float32",
        "--out",
        str(out),
    ]
    main([*arguments, "--merge"])
    assert str(out) in capsys.readouterr().out
    AutoModelForImageTextToText.from_pretrained(out)
    assert not (out / "adapter_config.json").exists()
    torch.testing.assert_close(
        _logps(Policy.load(_config(out), with_reference=False)), _logps(trained), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ConfigError) as refused:
        main(arguments)
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["merge", "out"]


def test_an_adapter_that_cannot_be_used_is_refused_by_its_key(
    export: Path, folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    (problem,) = _config(export, lora=LoraSettings(r=8, alpha=8)).problems()
    assert problem.startswith("model.policy.lora.r: 8 ")
    path = export / "adapter_config.json"
    own = json.loads(path.read_text())
    for change, expected in (
        (
            {"base_model_name_or_path": "/no/such/base"},
            "model.policy.model: /no/such/base, the base of the adapter",
        ),
        ({"peft_type": "IA3"}, f"model.policy.model: {export} is an adapter of the kind IA3"),
    ):
        path.write_text(json.dumps(own | change))
        assert _config(export).problems()[0].startswith(expected)
    path.write_text("{")
    assert "cannot be read" in _config(export).problems()[0]
    other = folders["llava" if family == "qwen" else "qwen"]
    path.write_text(json.dumps(own | {"base_model_name_or_path": str(other)}))
    with pytest.raises(PolicyError, match=r"model\.policy\.model: .* cannot be loaded"):
        Policy.load(_config(export), with_reference=False)


def test_a_vision_adapter_stays_frozen_with_vision(folders: dict[str, Path], tmp_path: Path) -> None:
    both = LoraSettings(target_modules=r".*(qkv|q_proj)", r=4, alpha=8)
    policy = Policy.load(_config(folders["qwen"], lora=both, freeze_vision=False), with_reference=False)
    policy.model.save_pretrained(tmp_path)
    policy.encoder.processor.save_pretrained(tmp_path)
    frozen, free = (
        Policy.load(_config(tmp_path, freeze_vision=f), with_reference=False) for f in (True, False)
    )
    assert frozen.vision_is_frozen
    assert not free.vision_is_frozen
    assert {n for n, p in frozen.named_parameters() if p.requires_grad and "visual" in n} == set()


def test_every_command_takes_the_export_of_a_lora_run(
    fit_arguments, cli, world: Path, tmp_path: Path
) -> None:
    lora = "{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"
    options = {
        "data.val_size": 2,
        "model.num_captions": 2,
        "model.sampling.max_tokens": 4,
        "trainer.max_steps": 1,
    }
    cli(fit_arguments(**options, **{"model.policy.lora": lora}))
    export = {"model.policy.model": tmp_path / "run/export", "model.policy.lora": lora}
    cli(fit_arguments(**options, **export, run_dir=tmp_path / "again", **{"model.kl_coef": 0.1}))
    assert (tmp_path / "again/export/adapter_config.json").is_file()
    one = tmp_path / "one"
    one.mkdir()
    os.link(next((world / "shapes").iterdir()), one / "a.png")
    cli(fit_arguments("predict", **export, run_dir=tmp_path / "captions", **{"data.predict_from": one}))
    assert len((tmp_path / "captions/captions.jsonl").read_text().splitlines()) == 1
