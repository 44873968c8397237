"""Weights for engines: the names on disk, and no more than what is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from balcap.policy import LoraSettings
from balcap.policy.policy import Policy
from balcap.rollout.vllm.weights import adapter_weights, trained_weights

Load = Callable[..., Policy]


def test_names_and_values_are_those_of_the_checkpoint(load: Load, folders: dict[str, Path], family: str):
    disk = load_file(folders[family] / "model.safetensors")
    sent = dict(trained_weights(load(freeze_vision=False)))
    assert sent.keys() == disk.keys()
    assert all(torch.equal(sent[name], disk[name]) for name in disk)


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
    from balcap.policy import PolicyConfig
    from tests.support import ROOT

    policy = Policy.load(PolicyConfig(model=str(ROOT / "assets/shapes-base"), dtype="float32"), False)
    names = [name for name, _ in trained_weights(policy)]
    assert "lm_head.weight" not in names
    assert names.count("model.embed_tokens.weight") == 1


def test_an_adapter_is_what_peft_saves(load: Load, tmp_path: Path):
    policy = load(lora=LoraSettings(target_modules=["q_proj", "down_proj"], r=4, alpha=12))
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    policy.model.save_pretrained(tmp_path)
    config, tensors = adapter_weights(policy)
    disk = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == disk.keys()
    assert all(torch.equal(tensors[name], disk[name]) for name in disk)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert json.loads(json.dumps(config)).keys() >= {"r", "lora_alpha", "target_modules", "bias"}
    assert {k: config[k] for k in ("r", "lora_alpha", "bias")} == {
        k: saved[k] for k in ("r", "lora_alpha", "bias")
    }
    assert (config["r"], config["lora_alpha"]) == (4, 12)


@pytest.mark.parametrize("lora", [None, LoraSettings(target_modules=["q_proj"], r=2)])
def test_values_follow_the_policy(load: Load, lora: LoraSettings | None):
    policy = load(lora=lora)
    first = {
        p: v.clone()
        for p, v in (adapter_weights(policy)[1] if lora else dict(trained_weights(policy))).items()
    }
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 1
    again = adapter_weights(policy)[1] if lora else dict(trained_weights(policy))
    assert all(torch.equal(again[name], first[name] + 1) for name in first)
