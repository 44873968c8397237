"""A model family is one file; models of none take the naive path and are trained all the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from balcap.policy import LoraSettings, PolicyConfig, families
from balcap.policy.delta_net import chunk_size
from balcap.policy.families import Family, base_of, family_of
from balcap.policy.families.gemma3 import Gemma3
from balcap.policy.families.generic import Generic
from balcap.policy.families.glm4v import Glm4V
from balcap.policy.families.idefics3 import Idefics3
from balcap.policy.families.internvl import InternVL
from balcap.policy.families.llava import Llava, Mistral3
from balcap.policy.families.llava_next import LlavaNext, LlavaOnevision
from balcap.policy.families.qwen2_5_vl import Qwen2_5VL
from balcap.policy.families.qwen3_5 import Qwen3_5
from balcap.policy.families.qwen3_vl import Qwen3VL, add_features
from balcap.policy.memory import update_costs
from balcap.policy.policy import Policy
from balcap.policy.prompts import cat_padded
from balcap.types import Rollouts
from tests.pretend_device import PretendDevice
from tests.support import metrics
from tests.tiny_models import Alone, mixed_batch, rollouts_of

Load = Callable[..., Policy]
LENGTHS = [[3, 1, 5], [7, 2, 2], [4, 6, 1]]
ROWS = [0, 1, 2]


@pytest.fixture
def unknown(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an architecture that no family is for, now; its text model lies under ``model.text_model``."""
    others = tuple(one for one in families.FAMILIES if "idefics3" not in one.model_types)
    monkeypatch.setattr(families, "FAMILIES", others)
    return folder_of("idefics3")


@pytest.fixture
def load_unknown(unknown: Path) -> Load:
    def load(with_reference: bool = False, **config: Any) -> Policy:
        return Policy.load(PolicyConfig(str(unknown), **{"dtype": "float32"} | config), with_reference)

    return load


@pytest.fixture
def rollouts() -> Rollouts:
    return rollouts_of(mixed_batch(), LENGTHS, range(20, 300))


# ── which family, and what is language ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("qwen2_5_vl", Qwen2_5VL),
        ("qwen2_vl", Qwen2_5VL),
        ("llava", Llava),
        ("qwen3_vl", Qwen3VL),
        ("qwen3_vl_moe", Qwen3VL),
        ("glm4v", Glm4V),
        ("glm4v_moe", Glm4V),
        ("glm46v", Glm4V),
        ("mistral3", Mistral3),
        ("llava_next", LlavaNext),
        ("llava_onevision", LlavaOnevision),
        ("idefics3", Idefics3),
        ("smolvlm", Idefics3),
        ("internvl", InternVL),
        ("idefics2", Generic),
        ("qwen3_5", Qwen3_5),
        ("qwen3_5_moe", Qwen3_5),
        ("gemma3", Gemma3),
    ],
)
def test_the_family_follows_the_model_type(model_type: str, family: type[Family]) -> None:
    assert type(family_of(AutoConfig.for_model(model_type))) is family


def test_an_adapted_model_is_of_its_base_models_family(load: Load, family: str) -> None:
    policy = load(lora=LoraSettings(r=2))
    assert type(family_of(policy.model)) is {"qwen": Qwen2_5VL, "llava": Llava}[family]


def empty_model(model_type: str) -> Any:
    """Two layers each of vision and language, without storage."""
    config = AutoConfig.for_model(model_type)
    for part in (config.get_text_config(), config.vision_config):
        part.num_hidden_layers = 2
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:2]
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "language"),
    [
        ("qwen2_vl", ("model.language_model.", "lm_head.")),
        ("smolvlm", ("model.text_model.", "lm_head.")),
        ("idefics2", ("model.text_model.", "lm_head.")),
        ("gemma3", ("model.language_model.", "lm_head.")),
        ("qwen3_5", ("model.language_model.", "lm_head.")),
        ("qwen3_5_moe", ("model.language_model.", "lm_head.")),
        ("internvl", ("model.language_model.", "lm_head.")),
        ("kosmos-2", ("text_model.", "text_model.lm_head.")),
    ],
)
def test_the_text_model_is_found_wherever_it_lies(model_type: str, language: tuple[str, ...]) -> None:
    model = empty_model(model_type)
    assert family_of(model).language_prefixes(model) == language


def test_a_model_without_a_text_model_of_its_own_is_refused() -> None:
    model = empty_model("git")
    with pytest.raises(ValueError, match=r"^model\.policy\.model: in the architecture git no text model"):
        family_of(model).language_model(model)


# ── what is trained ──────────────────────────────────────────────────────────────────────────────────


def test_freezing_vision_of_an_unknown_architecture_leaves_its_language_trained(
    load_unknown: Load, rollouts: Rollouts
) -> None:
    """``model.text_model`` taken for vision would leave the head alone."""
    policy = load_unknown()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    (-policy.logps(rollouts, policy.encode(rollouts.batch), ROWS)[0].sum()).backward()
    optimizer.step()
    moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    language = {name for name in before if name.startswith(("model.text_model.", "lm_head."))}
    assert moved == language
    assert sum(".layers." in name for name in language) == 2 * (7 + 2)  # linear layers and norms
    assert policy.vision_is_frozen
    assert not load_unknown(freeze_vision=False).vision_is_frozen


PARTS = {
    "pixtral": ("language_model", {"vision_tower", "multi_modal_projector"}),
    "mistral3": ("language_model", {"vision_tower", "multi_modal_projector"}),
    "llava_next": ("language_model", {"vision_tower", "multi_modal_projector", "image_newline"}),
    "llava_onevision": ("language_model", {"vision_tower", "multi_modal_projector", "image_newline"}),
    "smolvlm": ("text_model", {"vision_model", "connector"}),
    "idefics3": ("text_model", {"vision_model", "connector"}),
    "internvl": ("language_model", {"vision_tower", "multi_modal_projector"}),
    "internvl_qwen3": ("language_model", {"vision_tower", "multi_modal_projector"}),
    "internvl_qwen3_moe": ("language_model", {"vision_tower", "multi_modal_projector"}),
}
"""Name in `tests.tiny_families` -> the text model and what is vision, below ``model``."""


@pytest.mark.parametrize("name", PARTS)
def test_vision_is_frozen_and_language_trained_or_adapted(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    def load(**config: Any) -> Policy:
        return Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32", **config), False)

    text, vision = PARTS[name]
    parts: dict[bool, set[str]] = {True: set(), False: set()}
    for full_name, parameter in load().model.named_parameters():
        parts[parameter.requires_grad].add(full_name.removeprefix("model.").split(".")[0])
    assert parts == {True: {text, "lm_head"}, False: vision}
    experts = name == "internvl_qwen3_moe"  # theirs are no linear layers
    projections = [f"self_attn.{x}" for x in "qkvo"] + ([] if experts else ["mlp.gate", "mlp.up", "mlp.down"])
    language = {f"model.{text}.layers.{i}.{x}_proj" for i in (0, 1) for x in projections}
    assert adapted(load(lora=LoraSettings(r=2))) == language
    everywhere = adapted(load(lora=LoraSettings(r=2), freeze_vision=False))
    assert language < everywhere
    assert {one.split(".")[1] for one in everywhere - language} == vision - {"image_newline"}


def adapted(policy: Policy) -> set[str]:
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names}


def test_lora_without_targets_adapts_all_linear_layers_but_the_head(load: Load, load_unknown: Load) -> None:
    projections = (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    )
    for policy, text in (
        (load(lora=LoraSettings(r=2)), "language_model"),
        (load_unknown(lora=LoraSettings(r=2)), "text_model"),
    ):
        assert adapted(policy) == {f"model.{text}.layers.{i}.{x}_proj" for i in (0, 1) for x in projections}
    with_vision = adapted(load(lora=LoraSettings(r=2), freeze_vision=False))
    assert any("vis" in name for name in with_vision)
    assert "lm_head" not in with_vision


ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
DENSE = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GLM = (*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("name", "layers", "of_vision"),
    [
        ("qwen3_vl", DENSE, "model.visual.deepstack_merger_list.1.linear_fc2"),
        ("qwen3_vl_moe", ATTENTION, "model.visual.deepstack_merger_list.1.linear_fc2"),
        ("glm4v", GLM, "model.visual.merger.gate_proj"),
        ("glm4v_moe", ATTENTION, "model.visual.blocks.1.attn.qkv"),
        ("glm46v", GLM, "model.visual.merger.gate_proj"),
    ],
)
def test_what_is_trained_by_name(
    name: str, layers: tuple[str, ...], of_vision: str, folder_of: Callable[[str], Path]
) -> None:
    def loaded(**config: Any) -> Policy:
        return Policy.load(
            PolicyConfig(str(folder_of(name)), dtype="float32", **config), with_reference=False
        )

    count = 3 if name.startswith("qwen3_vl") else 2
    language = {f"model.language_model.layers.{i}.{layer}" for i in range(count) for layer in layers}
    assert adapted(loaded(lora=LoraSettings(r=2))) == language
    with_vision = adapted(loaded(lora=LoraSettings(r=2), freeze_vision=False))
    assert language | {of_vision} <= with_vision
    assert {part.split(".")[1] for part in with_vision - language} == {"visual"}
    frozen = loaded()
    parts = {n.split(".")[1]: p.requires_grad for n, p in frozen.model.named_parameters()}
    assert parts == {"visual": False, "language_model": True, "weight": True}  # and the head
    assert frozen.vision_is_frozen


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj"]])
def test_layers_that_peft_takes_for_experts_are_refused(
    targets: list[str], folder_of: Callable[[str], Path]
) -> None:
    config = PolicyConfig(str(folder_of("glm4v_moe")), dtype="float32", lora=LoraSettings(targets, r=2))
    with pytest.raises(ValueError, match=r"^model\.policy\.lora\.target_modules: peft .* glm4v_moe .*q_proj"):
        Policy.load(config, with_reference=False)


def test_features_are_added_as_the_models_own_without_waiting(folder_of: Callable[[str], Path]) -> None:
    language = AutoModelForImageTextToText.from_pretrained(folder_of("qwen3_vl")).model.language_model
    states, features = torch.randn(2, 7, 4), torch.randn(5, 4)
    placeholders = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 1]]).bool()
    expected = language._deepstack_process(states, placeholders, features)
    with PretendDevice(states, placeholders, features) as device:
        found = add_features(states, placeholders, features)
        assert device.waits == []
    assert torch.equal(found, expected)


MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DELTA_NET = tuple(
    f"linear_attn.{x}" for x in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
)
SHARED_EXPERT = ("mlp.shared_expert_gate", *(name.replace("mlp", "mlp.shared_expert") for name in MLP))


@pytest.mark.parametrize(
    ("name", "layers", "vision"),
    [
        ("qwen3_5", (DELTA_NET + MLP, ATTENTION + MLP), "model.visual."),
        ("qwen3_5_moe", (DELTA_NET + SHARED_EXPERT, ATTENTION + SHARED_EXPERT), "model.visual."),
        (
            "gemma3",
            (ATTENTION + MLP, ATTENTION + MLP),
            ("model.vision_tower.", "model.multi_modal_projector."),
        ),
    ],
)
def test_what_is_frozen_and_adapted_by_name(
    name: str,
    layers: tuple[tuple[str, ...], ...],
    vision: str | tuple[str, ...],
    folder_of: Callable[[str], Path],
) -> None:
    def policy(**options: Any) -> Policy:
        return Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32", **options), False)

    frozen = policy()
    assert frozen.vision_is_frozen
    for parameter, weight in frozen.model.named_parameters():
        assert weight.requires_grad is not parameter.startswith(vision), parameter
    names = {f"model.language_model.layers.{i}.{x}" for i, linears in enumerate(layers) for x in linears}
    assert adapted(policy(lora=LoraSettings(r=2))) == names
    beyond = adapted(policy(lora=LoraSettings(r=2), freeze_vision=False)) - names
    assert beyond
    assert all(linear.startswith(vision) for linear in beyond)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "gemma3"])
def test_what_is_not_counted_is_not_reported(
    name: str, folder_of: Callable[[str], Path], rollouts: Rollouts
) -> None:
    """Delta nets and windows have neither the operations nor the memory of attention to all tokens before."""
    policy = Policy.load(PolicyConfig(str(folder_of(name)), dtype="float32"), False)
    assert policy.shared_prefix
    assert policy.flops(rollouts, policy.encode(rollouts.batch), ROWS) is None
    assert update_costs(policy.model) is None


@pytest.mark.parametrize(
    ("targets", "freeze_vision"), [(["lm_head"], True), ([r"out_proj"], False), (r".*vision.*fc1", False)]
)
def test_a_policy_that_would_not_train_its_language_model_is_refused(
    load_unknown: Load, targets: list[str] | str, freeze_vision: bool
) -> None:
    with pytest.raises(
        ValueError, match=r"^model\.policy\.lora\.target_modules, model\.policy\.freeze_vision: no"
    ):
        load_unknown(lora=LoraSettings(targets, r=2), freeze_vision=freeze_vision)


# ── images of different shapes in one batch ──────────────────────────────────────────────────────────


def test_images_of_different_shapes_are_padded_at_their_ends() -> None:
    first, second = torch.ones(1, 2, 3, 2), torch.full((2, 1, 3, 4), 2.0)
    out = cat_padded([first, second])
    assert out.shape == (3, 2, 3, 4)
    assert out[0].sum() == first.sum()
    assert torch.equal(out[:1, :, :, :2], first)
    assert torch.equal(out[1:, :1], second)
    assert not out[1:, 1:].any()
    mask = cat_padded([torch.ones(1, 2, 3, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.long)])
    assert mask.dtype == torch.long
    assert mask[1].tolist() == [[1, 0, 0], [0, 0, 0]]


def test_an_unknown_architecture_is_scored_as_each_example_alone(
    load_unknown: Load, unknown: Path, rollouts: Rollouts
) -> None:
    policy = load_unknown()
    prompts = policy.encode(rollouts.batch)
    assert [item["pixel_values"].shape[1] for item in prompts.items] == [17, 9, 9]  # tiles
    assert not policy.shared_prefix
    assert policy.flops(rollouts, prompts, ROWS) is None
    expected, expected_entropies = Alone("idefics3", unknown).logps(rollouts, 0.7)
    logps, entropies = policy.logps(rollouts, prompts, ROWS, 0.7, entropy=True)
    torch.testing.assert_close(logps, expected, atol=3e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, expected_entropies, atol=3e-6, rtol=1e-6)
    some, _ = policy.logps(rollouts, prompts, [1, 0], 0.7)
    torch.testing.assert_close(some, expected[[1, 0]], atol=3e-6, rtol=1e-6)


def test_an_unknown_architecture_trains_from_the_command_line(
    fit_arguments: Callable[..., list[str]], cli: Callable[[list[str]], None], unknown: Path, tmp_path: Path
) -> None:
    options = {"model.policy.model": unknown, "model.sampling.max_tokens": 4, "trainer.max_steps": 1}
    options |= {"trainer.limit_val_batches": 0, "model.policy.gradient_checkpointing": "true"}
    cli(fit_arguments(**options, run_dir=tmp_path / "run"))
    row = next(row for row in metrics(tmp_path / "run") if row["train/loss"])
    assert float(row["train/grad_norm"]) >= 0
    assert "train/tflops" not in row


# ── a family from outside ────────────────────────────────────────────────────────────────────────────


class Outside(Family):
    """All that it takes to share the prefix of a model whose image features enter as plain embeddings."""

    model_types = ("idefics3",)
    text_types = ("llama",)
    layers: list[int] = []  # noqa: RUF012

    def num_features(self, config: Any, item: dict[str, Tensor]) -> int:
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return item["pixel_values"].shape[1] * side**2

    def language_model_inputs(
        self, model: Any, features: Any, placeholders: Tensor, layout: Any
    ) -> dict[str, Any]:
        assert placeholders.sum() == sum(len(image.embeds) for image in features)
        return {"for_attention": "seen"}

    def attention(self, module: Any, *args: Any, for_attention: str, **options: Any) -> Tensor:
        assert for_attention == "seen"
        self.layers.append(module.layer_idx)
        return super().attention(module, *args, **options)


def test_a_new_family_shares_the_prefix(
    load_unknown: Load, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    naive = load_unknown(freeze_vision=False)
    expected, _ = naive.logps(rollouts, naive.encode(rollouts.batch), ROWS)
    expected.sum().backward()
    monkeypatch.setattr(families, "_others", [])
    policy = load_unknown(freeze_vision=False, family=f"{__name__}.Outside")
    assert policy.shared_prefix
    Outside.layers.clear()
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), ROWS)
    assert Outside.layers == [0, 1]
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-6)
    logps.sum().backward()
    theirs = dict(base_of(naive.model).named_parameters())
    for name, parameter in base_of(policy.model).named_parameters():
        gradient = theirs[name].grad
        if gradient is not None:
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name


def test_a_family_may_take_the_place_of_one_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("idefics3")
    assert type(family_of(config)) is Idefics3
    monkeypatch.setattr(families, "_others", [])
    assert families.load_family(f"{__name__}.Outside") is family_of(config)


def test_a_family_of_another_architecture_is_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "_others", [])
    config = PolicyConfig(str(folder_of("qwen3_vl")), dtype="float32", family=f"{__name__}.Outside")
    with pytest.raises(
        ValueError, match=r"^model\.policy\.family: .*Outside is for idefics3, .* is a qwen3_vl"
    ):
        Policy.load(config, False)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("tests.policy.test_families.Nothing", "no attribute"),
        ("tests.policy.test_families.ROWS", "no attribute"),
        ("balcap.policy.families.Family", "sets no model_types"),
    ],
)
def test_what_is_no_family_is_refused_by_its_key(path: str, why: str) -> None:
    problems = [one for one in PolicyConfig("a/b", family=path).problems() if "model.policy.family" in one]
    assert len(problems) == 1
    assert why in problems[0]


def test_chunks_of_a_delta_net_are_as_many_as_before_and_hold_little_padding() -> None:
    assert [chunk_size(length) for length in (1, 64, 65, 199, 413)] == [1, 64, 33, 50, 59]
    for length in range(1, 700):
        chunks = math.ceil(length / 64)
        assert 0 <= chunks * chunk_size(length) - length < chunks
