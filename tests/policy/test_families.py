"""A model family is one file; models of none take the naive path and are trained all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from balcap.policy import LoraSettings, PolicyConfig, families
from balcap.policy.families import Family, base_of, family_of
from balcap.policy.families.gemma3 import Gemma3
from balcap.policy.families.generic import Generic
from balcap.policy.families.llava import Llava
from balcap.policy.families.qwen2_5_vl import Qwen2_5VL
from balcap.policy.families.qwen3_5 import Qwen3_5
from balcap.policy.memory import update_costs
from balcap.policy.policy import Policy
from balcap.policy.prompts import cat_padded
from balcap.types import Rollouts
from tests.support import metrics
from tests.tiny_models import Alone, mixed_batch, rollouts_of, tiny_idefics3

Load = Callable[..., Policy]
LENGTHS = [[3, 1, 5], [7, 2, 2], [4, 6, 1]]
ROWS = [0, 1, 2]


@pytest.fixture(scope="session")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an architecture that no family is for; its text model lies under ``model.text_model``."""
    return tiny_idefics3(tmp_path_factory.mktemp("models") / "idefics3")


@pytest.fixture
def load_unknown(idefics3: Path) -> Load:
    def load(with_reference: bool = False, **config: Any) -> Policy:
        return Policy.load(PolicyConfig(str(idefics3), **{"dtype": "float32"} | config), with_reference)

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
        ("qwen3_5", Qwen3_5),
        ("qwen3_5_moe", Qwen3_5),
        ("gemma3", Gemma3),
        ("smolvlm", Generic),
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


MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
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
    load_unknown: Load, idefics3: Path, rollouts: Rollouts
) -> None:
    policy = load_unknown()
    prompts = policy.encode(rollouts.batch)
    assert [item["pixel_values"].shape[1] for item in prompts.items] == [17, 9, 9]  # tiles
    assert not policy.shared_prefix
    assert policy.flops(rollouts, prompts, ROWS) is None
    expected, expected_entropies = Alone("idefics3", idefics3).logps(rollouts, 0.7)
    logps, entropies = policy.logps(rollouts, prompts, ROWS, 0.7, entropy=True)
    torch.testing.assert_close(logps, expected, atol=3e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, expected_entropies, atol=3e-6, rtol=1e-6)
    some, _ = policy.logps(rollouts, prompts, [1, 0], 0.7)
    torch.testing.assert_close(some, expected[[1, 0]], atol=3e-6, rtol=1e-6)


def test_an_unknown_architecture_trains_from_the_command_line(
    fit_arguments: Callable[..., list[str]], cli: Callable[[list[str]], None], idefics3: Path, tmp_path: Path
) -> None:
    options = {"model.policy.model": idefics3, "model.sampling.max_tokens": 4, "trainer.max_steps": 1}
    options |= {"trainer.limit_val_batches": 0, "model.policy.gradient_checkpointing": "true"}
    cli(fit_arguments(**options, run_dir=tmp_path / "run"))
    row = next(row for row in metrics(tmp_path / "run") if row["train/loss"])
    assert float(row["train/grad_norm"]) >= 0
    assert "train/tflops" not in row


# ── a family from outside ────────────────────────────────────────────────────────────────────────────


class Idefics3(Family):
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
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, Idefics3()))
    policy = load_unknown(freeze_vision=False)
    assert policy.shared_prefix
    Idefics3.layers.clear()
    logps, _ = policy.logps(rollouts, policy.encode(rollouts.batch), ROWS)
    assert Idefics3.layers == [0, 1]
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-6)
    logps.sum().backward()
    theirs = dict(base_of(naive.model).named_parameters())
    for name, parameter in base_of(policy.model).named_parameters():
        gradient = theirs[name].grad
        if gradient is not None:
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name
