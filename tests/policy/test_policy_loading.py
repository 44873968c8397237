"""What is trained, what is frozen, and what the KL term is measured against."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from balcap.policy import LoraSettings, PolicyConfig
from balcap.policy.config import PolicyError
from balcap.policy.loading import load_model, load_processor
from balcap.policy.policy import Policy
from balcap.types import Rollouts
from tests.tiny_models import mixed_batch, rollouts_of

Load = Callable[..., Policy]
ROWS = [0, 1, 2]
VISION = {"qwen": ("model.visual.",), "llava": ("model.vision_tower.", "model.multi_modal_projector.")}
FIRST_LAYER = {"qwen": "model.language_model.layers.0", "llava": "model.language_model.layers.0"}


def lora(*targets: str, **settings: object) -> LoraSettings:
    return LoraSettings(target_modules=list(targets or ("q_proj", "v_proj")), r=4, alpha=8, **settings)


@pytest.fixture
def rollouts() -> Rollouts:
    return rollouts_of(mixed_batch(), [[3, 1, 5], [7, 2, 2], [4, 6, 1]], range(20, 300))


def step(policy: Policy, rollouts: Rollouts, lr: float = 0.05) -> Tensor:
    """One optimizer step that makes these captions likelier; returns the log-probs before it."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), ROWS)
    (-logps.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return logps.detach()


def trained_names(policy: Policy) -> set[str]:
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


def adapted(policy: Policy) -> set[str]:
    """Full names of the layers that carry an adapter, as in the base model."""
    return {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name in trained_names(policy)
        if ".lora_A." in name
    }


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_of_an_adapter_is_the_base_model(load: Load, rollouts: Rollouts):
    base = load()
    prompts = base.encode(rollouts.batch)
    expected = base.logps(rollouts, prompts, ROWS)[0].detach()
    policy = load(with_reference=True, lora=lora())
    assert policy.reference is None, "no second copy in memory"
    assert torch.equal(step(policy, rollouts), expected), "a fresh adapter changes nothing"
    assert torch.equal(policy.reference_logps(rollouts, prompts, ROWS), expected)
    after, _ = policy.logps(rollouts, prompts, ROWS)
    assert after.sum() > expected.sum() + 1.0
    reference = policy.reference_logps(rollouts, prompts, ROWS)
    assert torch.equal(reference, expected)
    assert not reference.requires_grad
    assert torch.equal(policy.logps(rollouts, prompts, ROWS)[0], after), "the adapter is on again"


def test_the_reference_needs_no_request_where_there_is_an_adapter(load: Load, rollouts: Rollouts):
    policy = load(with_reference=False, lora=lora())
    assert policy.reference_logps(rollouts, policy.encode(rollouts.batch), ROWS).isfinite().all()


def test_only_the_adapter_is_trained(load: Load, rollouts: Rollouts):
    for freeze in (True, False):
        policy = load(lora=lora(), freeze_vision=freeze)
        before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
        assert trained_names(policy)
        assert all(".lora_" in name for name in trained_names(policy))
        step(policy, rollouts)
        moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved
        assert moved <= trained_names(policy)


def test_targets_as_names_or_as_an_expression(load: Load, family: str):
    both = adapted(load(lora=lora("q_proj", "v_proj")))
    assert both == {f"model.language_model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qv"}
    expression = LoraSettings(target_modules=r".*\.(q_proj|v_proj)", r=4)
    assert adapted(load(lora=expression)) == both
    one = f"{FIRST_LAYER[family]}.mlp.up_proj"
    assert adapted(load(lora=lora(one))) == {one}  # a full name hits itself only
    assert adapted(load(lora=lora("self_attn.q_proj"))) == {n for n in both if n.endswith("q_proj")}
    with pytest.raises(ValueError, match="matches no linear layer"):
        load(lora=lora("_proj"))  # no part of a name


def test_vision_layers_are_adapted_only_when_they_are_trained(load: Load, family: str):
    everything = LoraSettings(target_modules=".*", r=4)
    frozen, free = adapted(load(lora=everything)), adapted(load(lora=everything, freeze_vision=False))
    assert not any(name.startswith(VISION[family]) for name in frozen)
    assert frozen == {name for name in free if not name.startswith(VISION[family])}
    vision = [name for name in free if name.startswith(VISION[family])]
    assert len({name.split(".")[1] for name in vision}) == len(VISION[family]), "tower and projector"


def test_a_target_that_matches_nothing_names_what_there_is(load: Load, family: str):
    vision_only = {"qwen": "qkv", "llava": "fc1"}[family]
    for targets, idle in (
        (["q_pro"], "'q_pro'"),
        (["q_proj", "typo", "v_proj"], "'typo'"),  # half of what was meant is not what was meant
        ([vision_only], f"'{vision_only}'"),
        ("lm_.*_proj", "'lm_.*_proj'"),
    ):
        with pytest.raises(ValueError, match=r"model\.policy\.lora\.target_modules") as caught:
            load(lora=LoraSettings(target_modules=targets, r=4))
        message = str(caught.value)
        assert f"target_modules: {idle} matches no linear layer" in message
        assert "q_proj, up_proj, v_proj" in message
        assert "model.visual" not in message
        assert ", fc1" not in message, "layers that may not be trained are no help"


# ── full tuning ──────────────────────────────────────────────────────────────────────────────────────


def test_freeze_vision_freezes_tower_and_projector_and_nothing_else(load: Load, family: str):
    names = {name for name, _ in load(freeze_vision=False).model.named_parameters()}
    assert trained_names(load(freeze_vision=False)) == names
    vision = {name for name in names if name.startswith(VISION[family])}
    assert any("merger" in n or "projector" in n for n in vision)
    assert trained_names(load()) == names - vision
    assert "lm_head.weight" in trained_names(load())


def test_frozen_vision_gets_no_gradient(load: Load, family: str, rollouts: Rollouts):
    policy = load()
    policy.logps(rollouts, policy.encode(rollouts.batch), ROWS)[0].sum().backward()
    with_gradient = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert with_gradient == trained_names(policy)


def test_the_reference_of_full_tuning_is_a_frozen_copy(load: Load, rollouts: Rollouts):
    policy = load(with_reference=True)
    prompts = policy.encode(rollouts.batch)
    expected = step(policy, rollouts, lr=0.01)
    assert torch.equal(policy.reference_logps(rollouts, prompts, ROWS), expected)
    assert (policy.logps(rollouts, prompts, ROWS)[0] - expected).abs().max() > 0.1
    assert not any(p.requires_grad for p in policy.reference.parameters())
    assert {id(p) for p in policy.parameters() if p.requires_grad} == {
        id(p) for p in policy.model.parameters() if p.requires_grad
    }


def test_the_reference_stays_in_evaluation_mode(load: Load):
    policy = load(with_reference=True)
    nn.ModuleList([policy]).train()  # as a LightningModule would
    assert policy.model.training
    assert not any(module.training for module in policy.reference.modules())


def test_no_reference_says_what_to_do(load: Load, rollouts: Rollouts):
    policy = load()
    assert policy.reference is None
    with pytest.raises(RuntimeError, match=r"without a reference; model\.kl_coef must then be 0"):
        policy.reference_logps(rollouts, policy.encode(rollouts.batch), ROWS)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("freeze_vision", [False, True])
def test_gradient_checkpointing_recomputes_and_changes_nothing(
    load: Load, family: str, rollouts: Rollouts, adapter: bool, freeze_vision: bool
):
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = load(
            lora=lora() if adapter else None,
            freeze_vision=freeze_vision,
            gradient_checkpointing=checkpointing,
        )
        policy.model.train()
        count = [0]
        layer = policy.model.get_submodule(
            ("base_model.model." if adapter else "") + FIRST_LAYER[family] + ".mlp"
        )
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        policy.logps(rollouts, policy.encode(rollouts.batch), ROWS)[0].sum().backward()
        gradients.append({n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None})
        calls.append(count[0])
    assert calls == [1, 2], "in backward every layer runs once more"
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_flows_back_into_a_frozen_tower(load: Load, rollouts: Rollouts, checkpointing: bool):
    for freeze in (True, False):
        policy = load(freeze_vision=freeze, gradient_checkpointing=checkpointing)
        policy.model.train()
        item = policy.encode(rollouts.batch).items[0]
        grid = {k: v for k, v in item.items() if k == "image_grid_thw"}
        features = policy.model.get_image_features(item["pixel_values"], **grid).pooler_output[0]
        assert features.requires_grad is not freeze


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_weights_train_an_adapter_on_the_cpu(load: Load, rollouts: Rollouts):
    import bitsandbytes as bnb

    policy = load(lora=lora(), load_in_4bit=True, gradient_checkpointing=True)
    policy.model.train()
    quantised = [m for m in policy.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(quantised) >= 14
    assert {m.weight.quant_type for m in quantised} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in quantised), "double quantisation"
    prompts = policy.encode(rollouts.batch)
    for _ in range(
        2
    ):  # the second matrix of a fresh adapter is 0, so that its first gets no gradient at first
        logps, _ = policy.logps(rollouts, prompts, ROWS)
        assert logps.isfinite().all()
        gradients = torch.autograd.grad(logps.sum(), [p for p in policy.parameters() if p.requires_grad])
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)
        step(policy, rollouts)
    assert all(".lora_" in name for name in trained_names(policy))
    reference = policy.reference_logps(rollouts, prompts, ROWS)
    assert (reference - policy.logps(rollouts, prompts, ROWS)[0]).abs().max() > 0.1


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_weights_pass_gradients_on_after_they_were_sampled_from(load: Load, rollouts: Rollouts):
    policy = load(lora=lora(), load_in_4bit=True)
    step(policy, rollouts)  # a fresh adapter's first matrices get no gradient
    prompts = policy.encode(rollouts.batch)
    found = []
    for _ in range(2):
        policy.model.train()
        logps, _ = policy.logps(rollouts, prompts, ROWS)
        found.append(torch.autograd.grad(logps.sum(), [p for p in policy.parameters() if p.requires_grad]))
        policy.model.eval()
        with torch.no_grad():  # where bitsandbytes would pack them
            policy.logps(rollouts, prompts, ROWS)
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    torch.testing.assert_close(found[1], found[0])


def test_weights_are_those_on_disk(load: Load, family: str, folders: dict[str, Path]):
    theirs = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.float32).state_dict()
    ours = load().model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_attention_implementation_is_passed_on(load: Load, rollouts: Rollouts):
    eager, sdpa = load(attn_implementation="eager"), load(attn_implementation="sdpa")
    assert eager.model.config._attn_implementation == "eager"
    prompts = eager.encode(rollouts.batch)
    torch.testing.assert_close(
        eager.logps(rollouts, prompts, ROWS)[0], sdpa.logps(rollouts, prompts, ROWS)[0], atol=1e-4, rtol=0
    )


# ── whose code runs ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", ["config.json", "processor_config.json"])
def test_code_that_comes_with_a_model_is_never_run(folders: dict[str, Path], tmp_path: Path, part: str):
    folder, mark = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(folders["qwen"], folder)
    (folder / "theirs.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import Qwen2_5_VLForConditionalGeneration as Model, Qwen2_5_VLProcessor as Processor\n"
        "from transformers import Qwen2_5_VLConfig as Config\n"
    )
    names = {"AutoConfig": "Config", "AutoModelForImageTextToText": "Model", "AutoProcessor": "Processor"}
    for name in {"config.json", part}:
        settings = json.loads((folder / name).read_text())
        settings["auto_map"] = {auto: f"theirs.{cls}" for auto, cls in names.items()}
        settings.pop("processor_class", None)
        if "model_type" in settings:
            settings["model_type"] = "theirs"
        (folder / name).write_text(json.dumps(settings))
    with pytest.raises(PolicyError, match="code of its own, which is never run"):
        load_model(PolicyConfig(str(folder)))
    with contextlib.suppress(
        PolicyError
    ):  # where the files name a class of transformers as well, that one is taken
        load_processor(PolicyConfig(str(folder)))
    assert not mark.exists()
