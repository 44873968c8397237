"""Weights for engines: the names on disk, and no more than what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.policy import Policy
from balcap.rollout.vllm.weights import trained_weights, weight_files
from balcap.rollout.vllm.worker import stored
from callbacks.export import export
from tests.support import ROOT
from tests.tiny_families import FAMILIES

Load = Callable[..., Policy]


def test_names_and_values_are_those_of_the_checkpoint(load: Load, folders: dict[str, Path], family: str):
    disk = load_file(folders[family] / "model.safetensors")
    sent = dict(trained_weights(load(freeze_vision=False)))
    assert sent.keys() == disk.keys()
    assert all(torch.equal(sent[name], disk[name]) for name in disk)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_qwen3_moe", "qwen3_5_moe"])
def test_experts_are_sent_and_exported_as_they_were_read(name: str, tmp_path: Path):
    folder = FAMILIES[name](tmp_path / "model")
    disk = load_file(folder / "model.safetensors")
    policy = Policy.load(PolicyConfig(str(folder), dtype="float32", freeze_vision=False), False)
    export(policy, tmp_path / "export")
    for found in (dict(trained_weights(policy)), load_file(tmp_path / "export/model.safetensors")):
        assert found.keys() == disk.keys()
        torch.testing.assert_close(found, disk, rtol=0, atol=0)


def test_frozen_weights_are_left_out(load: Load, folders: dict[str, Path], family: str):
    policy = load(freeze_vision=True)
    sent = dict(trained_weights(policy))
    assert len(sent) == sum(p.requires_grad for p in policy.model.parameters())
    left_out = load_file(folders[family] / "model.safetensors").keys() - sent.keys()
    assert left_out
    assert all(name.startswith(("visual.", "vision_tower.", "multi_modal_projector.")) for name in left_out)


def test_nothing_is_copied(load: Load):
    policy = load()
    own = {p.data_ptr() for p in policy.model.parameters()}
    for _, tensor in trained_weights(policy):
        assert tensor.data_ptr() in own
        assert not tensor.requires_grad


def test_tied_weights_are_named_once():
    policy = Policy.load(PolicyConfig(model=str(ROOT / "assets/shapes-base"), dtype="float32"), False)
    names = [name for name, _ in trained_weights(policy)]
    assert "lm_head.weight" not in names
    assert names.count("model.embed_tokens.weight") == 1


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_an_adapter_is_written_as_peft_saves_it(load: Load, load_in_4bit: bool):
    adapter = LoraSettings(target_modules=["q_proj", "down_proj"], r=4, alpha=12)
    policy = load(lora=adapter, load_in_4bit=load_in_4bit)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter)
    with weight_files(policy, None) as folder:
        disk = load_file(f"{folder}/adapter_model.safetensors")
        config = json.loads(Path(folder, "adapter_config.json").read_text())
    assert sorted(float(t.sum()) for t in disk.values()) == sorted(float(p.detach().sum()) for p in trained)
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert not Path(folder).exists()


@pytest.mark.parametrize("part_bytes", [2**30, 1])
def test_weights_are_written_into_the_folder_that_servers_share(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
):
    monkeypatch.setattr("balcap.rollout.vllm.weights.PART_BYTES", part_bytes)
    policy = load()
    with weight_files(policy, str(tmp_path)) as folder:
        assert Path(folder).parent == tmp_path
        assert Path(folder).stat().st_mode & 0o055 == 0o055, "servers may run under another name"
        disk = dict(stored(folder))
        assert len(list(Path(folder).iterdir())) == (1 if part_bytes > 10**6 else len(disk))
    sent = dict(trained_weights(policy))
    assert disk.keys() == sent.keys()
    assert all(torch.equal(disk[name], sent[name]) for name in disk)
    assert not list(tmp_path.iterdir())


def test_values_follow_the_policy(load: Load):
    policy = load()
    first = {name: tensor.clone() for name, tensor in trained_weights(policy)}
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 1
    assert all(torch.equal(tensor, first[name] + 1) for name, tensor in trained_weights(policy))
